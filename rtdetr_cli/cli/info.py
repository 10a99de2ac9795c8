"""`rtdetr info`: describe any model file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag
from rtdetr_cli.cli.select import CHECKPOINT_SUFFIX, model_file, parse_size, resolve_model
from rtdetr_cli.text import abbreviate
from rtdetr_cli.weights.header import Dedupe


def info(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="Model file or run folder (default: the newest run).", show_default=False
        ),
    ] = None,
    imgsz: Annotated[
        str | None, typer.Option(help="Input size of the GFLOPs: 640, or height first 480x640 (default: the model's).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Describe a model file: maker, variant, classes, sizes, cost, thresholds, metrics, tensors and graph."""
    from rtdetr_cli.infer.inspect import inspect_model

    size = parse_size(imgsz) if imgsz else None
    if model is None:
        path = resolve_model(None)
    else:
        path = model if model.suffix.lower() == CHECKPOINT_SUFFIX and model.is_file() else model_file(model)
    description = (_checkpoint(path) if path.suffix.lower() == CHECKPOINT_SUFFIX else None) or inspect_model(path, size)
    if as_json:
        terminal.emit_json({"model": description})
    else:
        terminal.table(("property", "value"), _rows(description), title=str(path))


def _checkpoint(path: Path) -> dict[str, Any] | None:
    """Describe a run's `last.ckpt`; return None for a published file with that suffix."""
    from rtdetr_cli.train.checkpoint import MAGIC, read_checkpoint

    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return None
    state = read_checkpoint(path)
    arrays, place = list(_arrays(state)), state.get("place")
    return {
        "path": str(path),
        "format": "training checkpoint",
        "bytes": path.stat().st_size,
        "note": f"for resuming only: rtdetr train --resume {path.parent}; predict with best.safetensors instead",
        "place": {str(k): v for k, v in place.items() if isinstance(v, int | float | str)}
        if isinstance(place, dict)
        else {},
        "tensors": len(arrays),
        "tensor_bytes": sum(int(array.nbytes) for array in arrays),
        "parts": sorted(str(key) for key in state),
        "header": None,
    }


def _arrays(value: object) -> Iterator[Any]:
    if hasattr(value, "nbytes") and hasattr(value, "dtype"):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _arrays(item)


def _rows(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table, the most interesting first, without empty ones."""
    from rtdetr_cli.evaluate.coco import METRICS

    header = description.get("header") or {}
    extra = header.get("extra", {})
    source = extra.get("source_identity")
    size, parameters, tensors = description["bytes"], description.get("parameters"), description.get("tensors")
    types = ", ".join(f"{number} {name}" for name, number in description.get("types", {}).items())
    operators = description.get("operators") or {}
    kinds = abbreviate([f"{number} {name}" for name, number in operators.items()])
    sorted_metrics = sorted(header.get("metrics", {}).items(), key=lambda item: (*METRICS, item[0]).index(item[0]))
    rows: list[tuple[str, object]] = [
        ("format", description["format"]),
        ("layout", description.get("layout")),
        *_family_rows(description.get("family") or {}),
        ("size", f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size:,} bytes"),
        ("note", description.get("note")),
        *(_header_rows(header) if header else [("header", "none: no class names, sizes or thresholds")]),
        ("parameters", f"{parameters / 1e6:.1f} M" if parameters else None),
        ("tensors", f"{tensors} ({types})" if tensors and types else tensors or types),
        ("metrics", ", ".join(f"{k} {v:.3f}" for k, v in sorted_metrics if v is not None)),
        ("trained on", header.get("dataset", {}).get("name")),
        ("precision", extra.get("precision")),
        ("export check", _verification(extra.get("gate"), description.get("verification") or {})),
        ("inputs", _ports(description.get("inputs"))),
        ("outputs", _ports(description.get("outputs"))),
        ("opset", description.get("opset")),
        ("producer", description.get("producer")),
        ("operators", f"{sum(operators.values())}: {kinds}" if operators else None),
        ("weights file", description.get("weights")),
        ("header file", description.get("header_file")),
        ("progress", ", ".join(f"{k} {v}" for k, v in description.get("place", {}).items())),
        ("identity", header.get("identity")),
        ("exported from", source if source != header.get("identity") else None),
        ("written by", f"rtdetr-cli {header['version']}" if header.get("version") else None),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _family_rows(family: dict[str, Any]) -> list[tuple[str, object]]:
    if not family:
        return []
    published = family["published"]
    gflops, (height, width) = family["gflops"]["value"], family["gflops"]["imgsz"]
    return [
        ("maker", family["maker"]),
        ("version", family["version"]),
        ("variant", family["variant"] or "sizes of no preset"),
        ("published AP", f"{published['ap']:.3f} ({published['name']})" if published and published["ap"] else None),
        ("GFLOPs", f"{gflops:.1f} at {height}x{width}"),
    ]


def _header_rows(header: dict[str, Any]) -> list[tuple[str, object]]:
    from rtdetr_cli.infer.duplicates import describe_dedupe

    names, ids = header["names"], header["category_ids"]
    sampling = header["sampling"]
    if sampling == "discrete":
        sampling = f"discrete ({header['rounding']} rounding)"
    return [
        ("preset", header["preset"]),
        ("architecture", _architecture(header["architecture"])),
        ("input", "x".join(map(str, header["imgsz"])) + " (height x width)"),
        ("classes", f"{len(names)}: {_shorten(names)}"),
        ("category ids", _shorten(ids) if tuple(ids) != tuple(range(len(ids))) else None),
        ("decoder layers", header["layers"]),
        ("queries", header["queries"]),
        ("sampling", sampling),
        ("duplicates", describe_dedupe(Dedupe(**header["dedupe"]) if header.get("dedupe") else None)),
        ("thresholds", _thresholds(header["thresholds"], names)),
    ]


def _shorten(values: Any, most: int = 12) -> str:
    return abbreviate([str(v) for v in values], most)


def _architecture(spec: dict[str, Any]) -> str:
    if not spec:
        return ""
    points = ",".join(str(n) for n in spec.get("num_points", ()))
    backbone = spec.get("backbone", "resnet")
    backbone = f"ResNet-vd {spec.get('depth')}" if backbone == "resnet" else backbone.replace("hgnet", "HGNet")
    form = " of DEIM" if spec.get("decoder") == "deim" else ""
    return (
        f"{backbone}, width {spec.get('width')}; encoder {spec.get('hidden_dim')}; "
        f"decoder{form} {spec.get('decoder_dim')}, {spec.get('decoder_layers')} layers, points {points}"
    )


def _thresholds(stored: dict[str, Any] | None, names: Any) -> str:
    if not stored:
        return "none stored: predict uses 0.5 (rtdetr eval --calibrate f1)"
    if set(stored["per_class"]) == {stored["overall"]}:
        return f"{stored['target']}: {stored['overall']:.3f} for every class"
    per_class = [f"{name} {value:.3f}" for name, value in zip(names, stored["per_class"], strict=False)]
    return f"{stored['target']}: overall {stored['overall']:.3f}; {_shorten(per_class)}"


def _verification(gate: dict[str, Any] | None, binding: dict[str, Any]) -> str:
    """Return the result of the export check that a header records, and whether it is about this file."""
    if not gate:
        return ""
    if gate.get("passed") is None:
        return "not verified"
    matched = gate.get("matched")
    share = f", {matched:.1%} of detections matched" if isinstance(matched, float) else ""
    notes = {"unchanged": "unchanged since", "unbound": "not bound to a verification"}
    note = notes.get(binding.get("status", ""))
    if binding.get("status") == "modified":
        return f"modified after verification ({', '.join(binding['modified'])}), which had passed{share}"
    return ("passed" if gate["passed"] else "FAILED") + share + (f"; {note}" if note else "")


def _ports(ports: list[dict[str, Any]] | None) -> str:
    return "; ".join(f"{p['name']} {p['type']} ({', '.join(map(str, p['shape']))})" for p in ports or ())
