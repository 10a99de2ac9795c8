"""Give a command the flags of settings, from their declaration in `config/settings.py`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rtdetr_cli.config.settings import Setting, declarations

TRAIN_FLAGS = tuple(name for name, setting in declarations().items() if setting.flag)
"""Every setting that has a flag."""

SetFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting, such as schedule=official or optim.clip_norm=1 (repeatable). `rtdetr presets show NAME` "
        "lists model.*, optim.* and official.*; the config.toml of a run lists all settings.",
    ),
]


def with_setting_flags(
    names: Iterable[str], *, defaults: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the flags of settings before the command's other flags.

    The command receives the settings given on the command line as a dictionary, its first argument.

    Args:
        names: names of the settings.
        defaults: name -> where the value comes from, for a command whose defaults differ from those of the settings.
    """
    chosen = [declarations()[name] for name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_flags(context: typer.Context, **values: Any) -> None:
            flags = {setting.name: values.pop(setting.name) for setting in chosen}
            given = {
                name: str(value) if isinstance(value, Path) else value
                for name, value in flags.items()
                if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
            }
            command(given, **values)

        _, *others = inspect.signature(command, eval_str=True).parameters.values()
        arguments = [p for p in others if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        parameters = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in arguments),
            *(_parameter(setting, (defaults or {}).get(setting.name, "")) for setting in chosen),
            *(p for p in others if p not in arguments),
        ]
        with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_flags

    return decorate


def _parameter(setting: Setting, default_elsewhere: str) -> inspect.Parameter:
    # Anything but a path, a number or a switch is passed on as text until it is validated.
    kind: Any = next((k for k in (bool, int, float) if setting.kind in (k, k | None)), str)
    kind = Path if setting.is_path else kind
    option = typer.Option(
        *([setting.short] if setting.short else []),
        f"--{setting.name.replace('_', '-')}",
        help=setting.help,
        metavar=setting.metavar,
        show_default=default_elsewhere or setting.unset or True,
    )
    default = None if default_elsewhere or setting.default in (None, "", ()) else setting.default
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
