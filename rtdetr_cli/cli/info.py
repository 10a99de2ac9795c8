"""`rtdetr info`: what is inside any model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]", help="Any model file or run folder. Default: the newest finished run's best."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on one line.")] = False,
) -> None:
    """Say what is inside any model file: classes, sizes, thresholds, metrics, origin, tensors, graph."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.select import CHECKPOINT_SUFFIX, model_file, resolve_model

    if model is None:
        path = resolve_model(None)
    else:
        path = model if model.suffix.lower() == CHECKPOINT_SUFFIX and model.is_file() else model_file(model)
    described = _checkpoint(path) if path.suffix.lower() == CHECKPOINT_SUFFIX else _described(path)
    if as_json:
        terminal.emit_json({"model": described})
        return
    terminal.table(("what", "value"), rows(described), title=str(path))


def _described(path: Path) -> dict[str, Any]:
    from rtdetr_cli.infer.inspect import inspect_model

    return inspect_model(path)


def _checkpoint(path: Path) -> dict[str, Any]:
    """Describe a run's `last.ckpt`; some tools give a published file that suffix."""
    from rtdetr_cli.train.checkpoint import MAGIC, read_checkpoint

    with path.open("rb") as file:
        ours = file.read(len(MAGIC)) == MAGIC
    if not ours:
        return _described(path)
    state = read_checkpoint(path)
    tensors, size = _count(state)
    return {
        "path": str(path),
        "format": "training checkpoint",
        "bytes": path.stat().st_size,
        "note": f"made to go on with: rtdetr train --resume {path.parent}; to predict, take best.safetensors",
        "place": {key: value for key, value in _plain(state.get("place")).items() if value is not None},
        "tensors": tensors,
        "tensor_bytes": size,
        "parts": sorted(str(key) for key in state),
        "header": None,
    }


def _plain(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, (int, float, str, bool, type(None)))}


def _count(value: object) -> tuple[int, int]:
    """Return the number and the bytes of the tensors in nested containers."""
    if hasattr(value, "nbytes") and hasattr(value, "dtype"):
        return 1, int(value.nbytes)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    counts = [_count(v) for v in inner]
    return sum(n for n, _ in counts), sum(b for _, b in counts)


def rows(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table for people: what is known, in the order of interest, nothing empty."""
    header = described.get("header") or {}
    extra = header.get("extra", {})
    thresholds = header.get("thresholds")
    names, ids = header.get("names", ()), header.get("category_ids", ())
    gate = extra.get("gate")
    told: list[tuple[str, object]] = [
        ("format", described["format"]),
        ("layout", described.get("layout")),
        ("size", _bytes(described["bytes"])),
        ("note", described.get("note")),
        ("header", None if header else "none: no class names, sizes or thresholds"),
        ("preset", header.get("preset")),
        ("architecture", _architecture(header.get("architecture", {}))),
        ("input", "x".join(map(str, header["imgsz"])) + " (height x width)" if header else None),
        ("classes", f"{len(names)}: {_listed(names)}" if header else None),
        ("category ids", _listed(ids) if header and tuple(ids) != tuple(range(len(ids))) else None),
        ("decoder layers", header.get("layers")),
        ("queries", header.get("queries")),
        ("sampling", _sampling(header)),
        ("parameters", f"{described['parameters'] / 1e6:.1f} M" if described.get("parameters") else None),
        ("tensors", _tensors(described)),
        ("thresholds", _thresholds(thresholds, names) if header else None),
        ("metrics", ", ".join(f"{k} {v:.3f}" for k, v in header.get("metrics", {}).items() if v is not None)),
        ("trained on", header.get("dataset", {}).get("name")),
        ("precision", extra.get("precision")),
        ("gate", None if not gate else _gate(gate)),
        ("inputs", _ports(described.get("inputs"))),
        ("outputs", _ports(described.get("outputs"))),
        ("opset", described.get("opset")),
        ("producer", described.get("producer")),
        ("operators", _operators(described.get("operators"))),
        ("weights file", described.get("weights")),
        ("header file", described.get("header_file")),
        ("place", ", ".join(f"{k} {v}" for k, v in described.get("place", {}).items())),
        ("identity", header.get("identity")),
        (
            "exported from",
            extra.get("source_identity") if extra.get("source_identity") != header.get("identity") else None,
        ),
        ("written by", f"rtdetr-cli {header['version']}" if header.get("version") else None),
    ]
    return [(what, str(value)) for what, value in told if value not in (None, "", (), [], {})]


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size:,} bytes"


def _listed(values: Any, most: int = 12) -> str:
    shown = ", ".join(str(v) for v in list(values)[:most])
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def _architecture(spec: dict[str, Any]) -> str:
    if not spec:
        return ""
    points = ",".join(str(n) for n in spec.get("num_points", ()))
    return (
        f"ResNet-vd {spec.get('depth')}, width {spec.get('width')}; encoder {spec.get('hidden_dim')}; "
        f"decoder {spec.get('decoder_dim')}, {spec.get('decoder_layers')} layers, points {points}"
    )


def _sampling(header: dict[str, Any]) -> str:
    method = header.get("sampling", "")
    return f"{method} ({header.get('rounding')} rounding)" if method == "discrete" else str(method)


def _tensors(described: dict[str, Any]) -> str:
    types = ", ".join(f"{number} {name}" for name, number in described.get("types", {}).items())
    total = described.get("tensors")
    if total is None:
        return types
    return f"{total}" + (f" ({types})" if types else "")


def _thresholds(found: dict[str, Any] | None, names: Any) -> str:
    if not found:
        return "none stored: predict takes 0.5 (rtdetr eval --calibrate f1)"
    each = [f"{name} {value:.3f}" for name, value in zip(names, found["per_class"], strict=False)]
    return f"{found['target']}: overall {found['overall']:.3f}; {_listed(each)}"


def _gate(gate: dict[str, Any]) -> str:
    passed = gate.get("passed")
    if passed is None:
        return "not judged"
    matched = gate.get("matched")
    figures = f", {matched:.1%} of detections matched" if isinstance(matched, float) else ""
    return ("passed" if passed else "FAILED") + figures


def _ports(ports: list[dict[str, Any]] | None) -> str:
    return "; ".join(f"{p['name']} {p['type']} ({', '.join(map(str, p['shape']))})" for p in ports or ())


def _operators(operators: dict[str, int] | None, most: int = 8) -> str:
    if not operators:
        return ""
    shown = ", ".join(f"{number} {name}" for name, number in list(operators.items())[:most])
    return f"{sum(operators.values())}: {shown}" + (", ..." if len(operators) > most else "")
