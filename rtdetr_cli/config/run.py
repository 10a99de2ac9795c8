"""Resolve the settings of one training run, and keep where each value came from."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import BeforeValidator, create_model

from rtdetr_cli.config.presets import flatten, load_preset, read_toml
from rtdetr_cli.config.schema import ModelSpec, OptimSpec, Preset, Schema
from rtdetr_cli.config.settings import PUBLISHED_WEIGHTS, RunSettings, Setting, declarations
from rtdetr_cli.config.validation import validate
from rtdetr_cli.documents import Reader, plain, table, text
from rtdetr_cli.errors import UsageError
from rtdetr_cli.text import suggest

SETTINGS = declarations()
# Settings that may name a file or folder, and the words that do not.
NAMED: dict[str, tuple[str, ...]] = {
    "data": (),
    "images": (),
    "preset": (),
    "weights": (*PUBLISHED_WEIGHTS, "none"),
    "aug": ("auto", "recipe", "light", "none"),
}
TABLES = ("model", "optim", "official")  # of a preset, whose values a run can change
# Tables of config.toml: the sources of the values, and what the preset holds besides model and learning rates.
PROVENANCE = "provenance"
PRESET = "rest_of_preset"


def _field(setting: Setting) -> Any:
    annotation = setting.annotation
    return (Annotated[annotation, BeforeValidator(setting.parse)] if setting.parse else annotation, setting.default)


_SettingsModel = create_model("RunSettings", __base__=Schema, **{name: _field(s) for name, s in SETTINGS.items()})


def absolute(key: str, value: str) -> str:
    """Return the absolute path that a setting names; a word that names no file is returned as it is."""
    if value in NAMED[key] or (key == "preset" and not value.endswith(".toml")):
        return value
    return os.path.abspath(value)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A resolved run."""

    settings: RunSettings
    preset: Preset  # with every override applied
    provenance: Mapping[str, str]  # dotted key -> where its value came from, for all keys of both

    @property
    def imgsz(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        return self.settings.imgsz or self.preset.imgsz

    def source(self, key: str) -> str:
        """Return where the value of a dotted key came from."""
        return self.provenance.get(key, "default")

    def given(self, key: str) -> bool:
        """Return whether the user chose this value, by whatever means."""
        return self.source(key) not in ("default", "preset")

    def values(self) -> dict[str, Any]:
        """Return the value of every dotted key: the settings and the preset's tables."""
        values = flatten(self.settings)
        for name in TABLES:
            values |= flatten(getattr(self.preset, name), f"{name}.")
        return values

    def anchored(self) -> RunConfig:
        """Return the same run with absolute paths, so that it can be resumed from another folder."""
        given = {key: getattr(self.settings, key) for key in NAMED}
        paths: dict[str, Any] = {key: absolute(key, value) for key, value in given.items() if value is not None}
        return replace(self, settings=replace(self.settings, **paths))

    def to_toml(self) -> str:
        """Return the whole run as TOML, which `--config` reads back.

        It holds every value, so that a run stays the same when a default changes or its preset file is gone. The table
        `provenance` says who chose a value: the schedule may replace one that nobody chose.
        """
        tables = {
            **self.preset.model_dump(include={"model", "optim"}),
            PRESET: self.preset.model_dump(exclude={"model", "optim"}, exclude_none=True),
            PROVENANCE: {key: source for key, source in self.provenance.items() if self.given(key)},
        }
        settings = {key: value for key, value in flatten(self.settings).items() if value is not None}
        header = f"# Resolved settings of one run of rtdetr train. preset: {self.preset.name}\n"
        # TOML has no DEL in a text, and tomli_w does not escape it.
        return header + tomli_w.dumps({**settings, **tables}).replace("\x7f", "\\u007f")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def _written(source: str, key: str, value: Any) -> str:
    """Return a setting as the user wrote it in the flags, in `--set`, or in the file `source`."""
    if source == "flag":
        return f"{_flag(key)} {','.join(map(str, value)) if isinstance(value, (tuple, list)) else value}"
    if source == "--set":
        return f"--set {key}={value if isinstance(value, str) else _toml(value)}"
    return f"{source}: {key} = {_toml(value)}"


def parse_set(words: Sequence[str]) -> dict[str, Any]:
    """Read the `key=value` words of `--set`; a value that is not TOML is a string.

    Raises:
        UsageError: a word without `=`.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {word} is not key=value", hint="--set schedule=official", code="set-malformed")
        try:
            values[key.strip()] = tomllib.loads(f"v = {text}")["v"]
        except (ValueError, RecursionError):
            values[key.strip()] = text
    return values


def resolve_run(
    flags: Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    config_file: Path | None = None,
    inherited: tuple[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Resolve a run: a flag overrides `--set`, then the file, then inherited settings, the preset and the default.

    Args:
        flags: setting -> value, only those given on the command line.
        sets: the words of `--set`: keys of `RunSettings`, or of the preset's `TABLES`, such as `optim.lr`.
        config_file: TOML with the same keys.
        inherited: name of a source of settings that nobody wrote down, and those settings.

    Raises:
        UsageError: unknown keys or invalid values; all problems at once.
    """
    layers: list[tuple[str, Mapping[str, Any]]] = [inherited] if inherited is not None else []
    document: dict[str, Any] = {}
    rest: dict[str, Any] | None = None  # of a resolved preset
    # For the file of a resolved run: where each chosen value came from; the others were chosen by nobody.
    sources: Mapping[str, str] | None = None
    if config_file is not None:
        document = read_toml(config_file)
        sources = _take_table(document, PROVENANCE, text, config_file)
        rest = _take_table(document, PRESET, plain, config_file)
        if rest is not None and not isinstance(rest.get("official"), dict):
            raise UsageError(
                f"{config_file}: {PRESET} has no table official",
                hint=f"remove {PRESET} from the file",
                code="config-invalid",
            )
        layers.append((str(config_file), _dotted(document)))
    layers += [("--set", parse_set(sets)), ("flag", flags)]
    values: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    written: dict[str, str] = {}
    for source, given in layers:
        for key, value in given.items():
            values[key] = value
            written[key] = _written(source, key, value)
            if source == str(config_file) and sources is not None:
                provenance[key] = sources.get(key, "preset" if "." in key else "default")
            else:
                provenance[key] = _flag(key) if source == "flag" else source

    named = str(values.get("preset", SETTINGS["preset"].default))
    preset = _preset_values(named, rest if document.get("preset") == named else None)
    _refuse_unknown(values, preset, named, provenance)
    for key, value in values.items():
        table, dot, inner = key.partition(".")
        if dot:
            preset[table][inner] = value
    settings = {key: value for key, value in values.items() if key in SETTINGS}
    _derive(settings, preset, provenance, resolved=sources is not None)
    config = _validated(settings, preset, provenance, written)
    for key in config.values():
        provenance.setdefault(key, "default" if key in SETTINGS else "preset")
    return config


def _take_table(document: dict[str, Any], name: str, read: Reader[Any], file: Path) -> dict[str, Any] | None:
    """Remove a table from the document and return it, or None if there is none."""
    if name not in document:
        return None
    try:
        return table(read)(document.pop(name))
    except ValueError as error:
        raise UsageError(
            f"{file}: {name}: {error}", hint=f"remove {name} from the file", code="config-invalid"
        ) from None


def _preset_values(named: str, rest: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the plain values of the preset, or those that the file of a resolved run holds."""
    if rest is not None:
        # A key of an older version that has no meaning any more is dropped. The tables model and optim of the same
        # file hold every value of these two.
        known = {key: value for key, value in rest.items() if key in Preset.model_fields}
        return {**known, "model": ModelSpec().model_dump(), "optim": OptimSpec().model_dump()}
    return load_preset(named).model_dump()


def _refuse_unknown(
    values: Mapping[str, Any], preset: Mapping[str, Any], named: str, provenance: Mapping[str, str]
) -> None:
    tables = {name: list(preset[name]) for name in TABLES}
    known = [*SETTINGS, *(f"{name}.{key}" for name, keys in tables.items() for key in keys)]
    unknown = {key: suggest(key, known) for key in values if key not in known}
    if not unknown:
        return
    without_suggestion = {key.partition(".")[0] for key, near in unknown.items() if not near}
    lists = [f"keys of {name}: {', '.join(keys)}" for name, keys in tables.items() if name in without_suggestion]
    lists.append(f"rtdetr presets show {named} lists model.*, optim.* and official.*, rtdetr train --help the flags")
    raise UsageError(
        "; ".join(f"unknown key {key}{near} ({provenance[key]})" for key, near in unknown.items()),
        hint="; ".join(lists),
        code="config-invalid",
    )


def _derive(settings: dict[str, Any], preset: Mapping[str, Any], provenance: dict[str, str], *, resolved: bool) -> None:
    """Fill in the settings that follow from others and that nobody chose.

    The file of a `resolved` run has them, and one of an earlier version was trained with the plain defaults.
    """
    if resolved:
        return
    images = settings.get("overfit")
    default_batch = SETTINGS["effective_batch"].default
    if "effective_batch" not in settings and isinstance(images, int) and 0 < images < default_batch:
        settings["effective_batch"] = images
        provenance["effective_batch"] = "--overfit: a step sees each image once"
    if "weights" not in settings and preset.get("weights") is None:
        settings["weights"] = "none"
        provenance["weights"] = f"preset {preset.get('name')} has no published weights"
    untrained = settings.get("weights") == "none" and settings.get("schedule") != "official"
    if "optimizer" not in settings and untrained:
        settings["optimizer"] = "muon"
        provenance["optimizer"] = "random weights: Muon for the matrices of hidden layers (docs/learning.md)"


def _validated(
    settings: dict[str, Any], preset: dict[str, Any], provenance: dict[str, str], written: Mapping[str, str]
) -> RunConfig:
    problems: list[str] = []
    checked: list[Any] = []
    for schema, values, source in (
        (Preset, preset, f"preset {preset.get('name')}"),
        (_SettingsModel, settings, "settings"),
    ):
        try:
            checked.append(validate(schema, values, source=source, written=written))
        except UsageError as error:
            problems.append(error.message)
    if problems:
        raise UsageError("; ".join(problems), code="config-invalid")
    return RunConfig(RunSettings(**dict(checked[1])), checked[0], provenance)


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    dotted: dict[str, Any] = {}
    for key, value in values.items():
        dotted |= {f"{key}.{inner}": v for inner, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return dotted
