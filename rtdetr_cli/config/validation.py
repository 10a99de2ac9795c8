"""Validate plain values and say what is wrong with them: every problem at once, with the values that are allowed."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rtdetr_cli.errors import UsageError
from rtdetr_cli.text import suggest

Model = TypeVar("Model", bound=BaseModel)


def validate(
    schema: type[Model], values: dict[str, Any], *, source: str, written: Mapping[str, str] | None = None
) -> Model:
    """Build `schema` from plain values.

    Args:
        schema: the model to build.
        values: of its fields.
        source: where the values come from, for messages about keys that `written` does not have.
        written: dotted key -> the value as the user wrote it, such as `--batch foo`.

    Raises:
        UsageError: every problem at once; an unknown key comes with a suggestion.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        written = written or {}
        problems = list(dict.fromkeys(_problems(schema, error, written)))
        with_source = [p for p in problems if p.startswith(tuple(written.values()))]
        others = [p for p in problems if p not in with_source]
        parts = with_source + ([f"{source}: " + "; ".join(others)] if others else [])
        raise UsageError("; ".join(parts), code="config-invalid") from error


def _problems(schema: type[BaseModel], error: ValidationError, written: Mapping[str, str]) -> Iterator[str]:
    for item in error.errors():
        keys = [str(k) for k in item["loc"]]
        dotted = ".".join(keys)
        # pydantic's location also names the item of a list, or the type of a union that was tried.
        text = next((written[k] for k in (dotted, ".".join(keys[:2]), *keys[:1]) if k in written), "")
        if item["type"] == "extra_forbidden":
            yield f"unknown key {dotted}{suggest(keys[-1], known_keys(schema, keys[:-1]))}"
        elif item["type"] == "missing":
            yield f"key {dotted} is missing"
        elif item["type"] == "value_error":
            where = text or dotted
            yield f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
        else:
            allowed, words = allowed_values(schema, keys)
            expected = f"expected {allowed}" if allowed else item["msg"][0].lower() + item["msg"][1:]
            where = text or f"{_field_name(schema, keys)} = {item['input']!r}"
            yield f"{where}: {expected}{suggest(str(item['input']), words)}"


def _field_name(schema: type[BaseModel], keys: list[str]) -> str:
    """Return the dotted key of a location, without the names of the types that pydantic tried."""
    path: list[str] = []
    for key in keys:
        if not key.isdecimal() and key not in known_keys(schema, path):
            break
        path.append(key)
    return ".".join(path)


def known_keys(schema: type[BaseModel], path: Iterable[str]) -> list[str]:
    """Return the keys of `schema` below a dotted path."""
    for key in path:
        field = schema.model_fields.get(key)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        schema = inner
    return list(schema.model_fields)


def allowed_values(schema: type[BaseModel], keys: Iterable[str]) -> tuple[str, list[str]]:
    """Return the values that a key allows, such as `auto or an integer >= 1`, and the words among them.

    The text is empty for a type that has no short description.
    """
    annotation: Any = schema
    bounds: Iterable[Any] = ()
    for key in keys:
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        field = annotation.model_fields.get(key)
        if field is None:
            break
        annotation, bounds = field.annotation, field.metadata
    words = list(_words(annotation))
    parts = [*words, *_numbers(annotation, bounds)]
    return (", ".join(parts[:-1]) + f" or {parts[-1]}" if len(parts) > 1 else "".join(parts)), words


def _words(annotation: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Literal:
        yield from (str(word) for word in get_args(annotation))
    elif annotation is bool:
        yield from ("true", "false")
    elif origin in (Union, types.UnionType, tuple):
        for inner in get_args(annotation):
            yield from _words(inner)


def _numbers(annotation: Any, bounds: Iterable[Any]) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *bounds = get_args(annotation)
        yield from _numbers(inner, bounds)
    elif origin in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _numbers(inner, bounds)
    elif origin is tuple:
        inner, *more = get_args(annotation)
        for text in _numbers(inner, bounds):
            yield f"a list, each {text}" if more == [...] else f"{len(more) + 1} numbers, each {text}"
    elif annotation in (int, float):
        yield " and ".join(_bounds(annotation, bounds))
    elif annotation is str:
        yield "text"


def _bounds(kind: type, bounds: Iterable[Any]) -> Iterator[str]:
    """Return `an integer >= 1`, or the parts of `a number > 0 and < 1`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [
        (sign, limit) for b in bounds for name, sign in signs.items() if (limit := getattr(b, name, None)) is not None
    ]
    if kind is int:
        limits = [(">=", limit + 1) if sign == ">" else (sign, limit) for sign, limit in limits]
    name = "an integer" if kind is int else "a number"
    first, *others = [f"{sign} {limit}" for sign, limit in limits] or [""]
    yield f"{name} {first}".rstrip()
    yield from others
