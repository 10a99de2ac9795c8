"""Validate plain values and say what is wrong with them: every problem at once, with the values that are allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rtdetr_cli.documents import shown
from rtdetr_cli.errors import UsageError
from rtdetr_cli.text import suggest

Model = TypeVar("Model", bound=BaseModel)


def validate(
    schema: type[Model], values: dict[str, Any], *, source: str, written: Mapping[str, str] | None = None
) -> Model:
    """Build `schema` from plain values.

    `source` says where they come from, `written` how the user wrote each dotted key, such as `--batch foo`.

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
    document = schema.model_json_schema()
    for item in error.errors():
        keys = [str(key) for key in item["loc"]]
        name, node = _find_field(document, keys)
        where = written.get(name, "")
        if item["type"] == "extra_forbidden":
            yield f"unknown key {'.'.join(keys)}{suggest(keys[-1], node['properties'])}"
        elif item["type"] == "missing":
            yield f"key {name} is missing"
        elif item["type"] == "value_error":
            where = where or name
            yield f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
        else:
            words, numbers = _allowed_values(node, item["input"])
            *first, last = [*words, *numbers] or [item["msg"]]
            expected = f"{', '.join(first)} or {last}" if first else last
            where = where or f"{name} = {shown(item['input'])}"
            yield f"{where}: expected {expected}{suggest(shown(item['input']), words)}"


def _find_field(document: Mapping[str, Any], keys: list[str]) -> tuple[str, Mapping[str, Any]]:
    """Return the dotted name of the field at pydantic's location, and its JSON schema.

    What follows the field in a location is the item of a list, or the type of a union that was tried.
    """
    node, path = document, []
    for key in keys:
        if key not in node.get("properties", ()):
            break
        path.append(key)
        node = node["properties"][key]
        if "$ref" in node:
            node = document["$defs"][node["$ref"].rpartition("/")[2]]
    return ".".join(path), node


def _allowed_values(node: Mapping[str, Any], value: Any) -> tuple[list[str], list[str]]:
    """Return the words that a field allows, and its kinds of numbers and text, such as `an integer >= 1`.

    The largest integer is named only if `value` is larger, since few people care.
    """
    words: list[str] = []
    kinds: list[str] = []
    for part in node.get("anyOf", [node]):
        kind = part.get("type")
        if kind == "array":
            item_words, item_kinds = _allowed_values(part.get("items") or part["prefixItems"][0], value)
            words += item_words
            length = f"{part['maxItems']} numbers" if "maxItems" in part else "a list"
            kinds += [f"{length}, each {item}" for item in item_kinds]
        elif "enum" in part or "const" in part:
            words += map(str, part.get("enum") or [part["const"]])
        elif kind == "boolean":
            words += ["true", "false"]
        elif kind in ("integer", "number"):
            kinds.append(_number(part, value))
        elif kind == "string":
            kinds.append("text")
    return words, kinds


def _number(part: Mapping[str, Any], value: Any) -> str:
    """Return a kind of number: `an integer >= 1`, `a number > 0 and < 1`."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = {sign: part[name] for name, sign in signs.items() if name in part}
    name = "a number"
    if part["type"] == "integer":
        name = "an integer"
        if ">" in bounds:
            bounds = {">=": bounds.pop(">") + 1, **bounds}
        largest = bounds.get("<=", bounds.get("<"))
        if largest is not None and not _exceeds(value, largest):
            bounds = {sign: bound for sign, bound in bounds.items() if sign not in ("<=", "<")}
    return f"{name} {' and '.join(f'{sign} {_bound(bound)}' for sign, bound in bounds.items())}".rstrip()


def _exceeds(value: Any, largest: float) -> bool:
    try:
        return float(value) >= largest
    except (TypeError, ValueError, OverflowError):
        return type(value) is int


def _bound(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e16 else f"{value:g}"
