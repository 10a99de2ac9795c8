"""Import optional packages, with an error that says how to install a missing or broken one."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rtdetr_cli.errors import EnvironmentProblem


def import_package(module: str, title: str, *, extra: str = "") -> Any:
    """Import an optional package of an extra, which has the name of the module where it is not given.

    Raises:
        EnvironmentProblem: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        install = f"pip install 'rtdetr-cli[{extra or module}]'"
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise EnvironmentProblem(f"{title} is not installed", hint=install, code="package-missing") from None
        raise EnvironmentProblem(
            f"{title} is installed but does not import: {error}",
            hint=f"{install} --force-reinstall",
            code="package-broken",
        ) from error


def has_package(module: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return sys.modules.get(module) is not None or find_spec(module) is not None
