"""Find and read presets: TOML files under `presets/`, in a checkout, an editable install or a wheel."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rtdetr_cli.config.schema import Preset
from rtdetr_cli.config.settings import RunSettings
from rtdetr_cli.config.validation import validate
from rtdetr_cli.documents import read_bounded
from rtdetr_cli.errors import UsageError
from rtdetr_cli.text import suggest

ORDER = ("tiny", "r18", "r34", "r50m", "r50", "r101", "hgl", "hgx", "hgh")


def preset_folder() -> Path:
    """Return the folder that holds the presets: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, smallest first."""
    names = {p.stem for p in preset_folder().glob("*.toml")}
    return (*(n for n in ORDER if n in names), *sorted(names.difference(ORDER)))


def preset_path(name: str) -> Path:
    """Return the file of a preset, given its name or the path of a TOML file."""
    return Path(name) if name.endswith(".toml") else preset_folder() / f"{name}.toml"


def load_preset(name: str) -> Preset:
    """Read and validate one preset, given its name or the path of a TOML file.

    Raises:
        UsageError: there is no such preset, or the file is invalid (all problems at once).
    """
    path = preset_path(name)
    if not path.is_file():
        if name.endswith(".toml"):
            raise UsageError(f"preset file {name} does not exist", code="preset-unknown")
        raise UsageError(
            f"unknown preset {name}{suggest(name, preset_names())}; presets: {', '.join(preset_names())}",
            hint="rtdetr presets",
            code="preset-unknown",
        )
    return validate(Preset, read_toml(path), source=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: it cannot be read, or is not TOML (with the line).
    """
    try:
        return tomllib.loads(read_bounded(path).decode())
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            hint="for an example, see the config.toml of any run: runs/NAME/config.toml",
            code="config-unreadable",
        ) from error
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or deep lists
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(
            f"{path} is not valid TOML: {reason}",
            hint="write one setting per line, such as epochs = 50; for an example, see runs/NAME/config.toml",
            code="config-malformed",
        ) from error


def flatten(values: BaseModel | RunSettings, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value over all nested fields, in the schema's order."""
    names = type(values).model_fields if isinstance(values, BaseModel) else [f.name for f in fields(values)]
    flat: dict[str, Any] = {}
    for name in names:
        value = getattr(values, name)
        if isinstance(value, BaseModel):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def descriptions(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Return dotted key -> description over all nested fields, in the schema's order."""
    texts: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            texts.update(descriptions(field.annotation, f"{prefix}{name}."))
        else:
            texts[f"{prefix}{name}"] = field.description or ""
    return texts
