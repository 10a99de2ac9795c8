"""What a setting takes, in words: from the type and bounds that the schema gives it."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def wanted(schema: type[BaseModel], keys: Iterable[str]) -> tuple[str, list[str]]:
    """Say what a key takes: `auto or a whole number from 1`.

    Args:
        schema: that the first of `keys` belongs to.
        keys: the way to one field; what follows it is not looked at.

    Returns:
        The words, empty where the type is none that can be said; and the words that may be written, if any.
    """
    field: FieldInfo | None = None
    here: Any = schema
    for key in keys:
        if not (isinstance(here, type) and issubclass(here, BaseModel)) or key not in here.model_fields:
            break
        field = here.model_fields[key]
        here = field.annotation
    if field is None:
        return "", []
    words = list(_words(field.annotation))
    numbers = list(_numbers(field.annotation, field.metadata))
    parts = [*words, *numbers]
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
        inner, *metadata = get_args(annotation)
        yield from _numbers(inner, [b for m in metadata for b in (m.metadata if isinstance(m, FieldInfo) else [m])])
    elif origin in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _numbers(inner, bounds)
    elif origin is tuple:
        inner, *more = get_args(annotation)
        for said in _numbers(inner, bounds):
            yield f"a list, each {said}" if more == [...] else f"{len(more) + 1} numbers, each {said}"
    elif annotation in (int, float):
        yield ("a whole number" if annotation is int else "a number") + _bounds(annotation, bounds)
    elif annotation is str:
        yield "text"


def _bounds(kind: type, bounds: Iterable[Any]) -> str:
    low = high = ""
    for bound in bounds:
        if (least := getattr(bound, "ge", None)) is not None:
            low = f"from {least}"
        elif (above := getattr(bound, "gt", None)) is not None:
            low = f"from {above + 1}" if kind is int else f"above {above}"
        elif (most := getattr(bound, "le", None)) is not None:
            high = f"to {most}" if low.startswith("from") else f"up to {most}"
        elif (below := getattr(bound, "lt", None)) is not None:
            high = f"below {below}"
    join = " " if high.startswith("to") else " and "
    said = join.join(part for part in (low, high) if part)
    return f" {said}" if said else ""
