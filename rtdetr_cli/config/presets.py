"""Find, read and explain presets: TOML files under `presets/`, from a checkout, an editable install or a wheel."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rtdetr_cli.config.schema import Preset
from rtdetr_cli.config.wanted import wanted
from rtdetr_cli.errors import UsageError

M = TypeVar("M", bound=BaseModel)
ORDER = ("tiny", "r18", "r34", "r50m", "r50", "r101")


def preset_folder() -> Path:
    """Return the folder that holds the presets: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets, smallest first."""
    found = {p.stem for p in preset_folder().glob("*.toml")}
    return (*(n for n in ORDER if n in found), *sorted(found.difference(ORDER)))


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` when a known word is close, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def load_preset(name: str) -> Preset:
    """Read and validate one preset by its name, or by the path of a TOML file.

    Raises:
        UsageError: no such preset, or every problem of the file at once.
    """
    path = Path(name) if name.endswith(".toml") else preset_folder() / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise UsageError(f"preset file {name} does not exist", code="preset-unknown")
        raise UsageError(
            f"no preset is called {name}{suggest(name, preset_names())}; there are {', '.join(preset_names())}",
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
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}",
            hint="every run keeps its settings: runs/NAME/config.toml",
            code="config-unreadable",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not valid TOML: {error}",
            hint="lines such as epochs = 50; every run keeps one: runs/NAME/config.toml",
            code="config-malformed",
        ) from error


def validate(schema: type[M], values: dict[str, Any], *, source: str, places: Mapping[str, str] | None = None) -> M:
    """Build `schema` from plain values; all problems in one error, unknown keys with a suggestion.

    Args:
        schema: what is built.
        values: of its fields.
        source: where the values come from, for those that `places` does not name.
        places: dotted key -> how and where its value was written, such as `--batch foo`.

    Raises:
        UsageError: one sentence a problem, each with its dotted key or its place.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        known = places or {}
        problems = list(dict.fromkeys(_problems(schema, error, known)))
        own = [p for p in problems if p.startswith(tuple(known.values()))]
        rest = [p for p in problems if p not in own]
        told = own + ([f"{source}: " + "; ".join(rest)] if rest else [])
        raise UsageError("; ".join(told), code="config-invalid") from error


def _problems(schema: type[BaseModel], error: ValidationError, places: Mapping[str, str]) -> Iterator[str]:
    for item in error.errors():
        keys = [str(k) for k in item["loc"]]
        dotted = ".".join(keys)
        # A fault in one part of a value, or in one of the types it may have, is a fault of the key.
        place = next((places[k] for k in (dotted, ".".join(keys[:2]), *keys[:1]) if k in places), None)
        if item["type"] == "extra_forbidden":
            yield f"unknown key {dotted}{suggest(keys[-1], known_keys(schema, keys[:-1]))}"
        elif item["type"] == "missing":
            yield f"key {dotted} is missing"
        elif item["type"] == "value_error":
            named = place or dotted
            yield f"{named + ': ' if named else ''}{item['ctx']['error']}"
        else:
            words, known = wanted(schema, keys)
            said = f"wants {words}" if words else item["msg"][0].lower() + item["msg"][1:]
            near = suggest(str(item["input"]), known)
            named = place or f"{_field(schema, keys)} = {item['input']!r}"
            yield f"{named}: {said}{near}"


def _field(schema: type[BaseModel], keys: list[str]) -> str:
    """Return the dotted key of a field, without pydantic's names of the types it may have; a list's place stays."""
    path: list[str] = []
    for key in keys:
        if not key.isdecimal() and key not in known_keys(schema, path):
            break
        path.append(key)
    return ".".join(path)


def known_keys(schema: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Return the keys that `schema` knows below a dotted path."""
    here: type[BaseModel] = schema
    for key in path:
        field = here.model_fields.get(key)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        here = inner
    return list(here.model_fields)


def flatten(values: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value over all nested fields, in the schema's order."""
    flat: dict[str, Any] = {}
    for key in type(values).model_fields:
        value = getattr(values, key)
        if isinstance(value, BaseModel):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe(schema: type[BaseModel], dotted: str) -> str:
    """Return the description of a dotted key, or an empty string."""
    *path, last = dotted.split(".")
    here: type[BaseModel] = schema
    for key in path:
        inner = here.model_fields[key].annotation
        assert isinstance(inner, type)
        assert issubclass(inner, BaseModel)
        here = inner
    return here.model_fields[last].description or ""
