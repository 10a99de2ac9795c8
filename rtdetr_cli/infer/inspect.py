"""What is inside a model file, read without running it, and without the runtime where the format allows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rtdetr_cli.errors import ModelError
from rtdetr_cli.infer.backend import check_model_path
from rtdetr_cli.infer.graph import FINISHED, IMAGES, RAW, first_line
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

_TYPE_NAMES = {
    "f64": "float64",
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "fp16": "float16",
    "float": "float32",
    "i64": "int64",
    "i32": "int32",
    "u8": "uint8",
}


def inspect_model(path: Path) -> dict[str, Any]:
    """Describe any model file but a training checkpoint.

    Returns:
        Plain values: always `path`, `format`, `bytes`; `header` (all of it) where the file carries one of ours, else
        None; and by format `parameters`, `tensors`, `types`, `inputs`, `outputs`, `opset`, `operators`, `layout`...

    Raises:
        ModelError: missing, truncated or foreign.
        EnvironmentProblem: a package that reads the format is missing.
    """
    check_model_path(path)
    suffix = path.suffix.lower()
    reader = {".safetensors": _safetensors, ".onnx": _onnx, ".xml": _openvino, ".engine": _engine, ".plan": _engine}
    found = reader.get(suffix, _published)(path)
    size = path.stat().st_size
    if suffix == ".xml" and path.with_suffix(".bin").is_file():
        size += path.with_suffix(".bin").stat().st_size
    header = found.pop("header", None)
    facts = {key: value for key, value in found.items() if key != "format"}
    described = asdict(header) if isinstance(header, ModelHeader) else None
    return {"path": str(path), "format": found["format"], "bytes": size, **facts, "header": described}


def _safetensors(path: Path) -> dict[str, Any]:
    from rtdetr_cli.weights.header import read_layout

    layout = read_layout(path)
    text = layout.metadata.get(METADATA_KEY)
    shapes = [(name, str(entry["dtype"]), entry["shape"]) for name, entry in layout.tensors.items()]
    return {
        "format": "rtdetr-cli model" if text else "safetensors without a header of ours",
        **_tensors((_is_buffer(name), dtype, shape) for name, dtype, shape in shapes),
        "header": ModelHeader.from_json(text, source=str(path)) if text else None,
    }


def _published(path: Path) -> dict[str, Any]:
    from rtdetr_cli.weights.load import load_model
    from rtdetr_cli.weights.published import read_published

    file = read_published(path)
    shapes = ((_is_buffer(n), str(t.dtype).removeprefix("torch."), t.shape) for n, t in file.state.items())
    found = {"format": "published checkpoint", "layout": file.layout, **_tensors(shapes)}
    found["tensors"] = file.tensors_total
    if file.spec is None:
        return found
    _, header = load_model(path)
    return {**found, "header": header}


def _onnx(path: Path) -> dict[str, Any]:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it holds no graph")
    except Exception as error:  # protobuf's exceptions differ from version to version
        raise ModelError(
            f"{path} is no ONNX model or is cut off: {first_line(error)}",
            hint="export it again",
            code="model-unreadable",
        ) from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    operators: Counter[str] = Counter()
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        for node in graph.node:
            operators[node.op_type] += 1
            pending.extend(a.g for a in node.attribute if a.HasField("g"))
    opsets = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    own = {initializer.name for initializer in model.graph.initializer}
    text = metadata.get(METADATA_KEY)
    inputs = [_onnx_port(v) for v in model.graph.input if v.name not in own]
    outputs = [_onnx_port(v) for v in model.graph.output]
    kinds = onnx.TensorProto.DataType
    return {
        "format": _graph_format("ONNX", text, inputs, outputs),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": opsets[0] if opsets else None,
        "inputs": inputs,
        "outputs": outputs,
        **_tensors((False, kinds.Name(t.data_type), t.dims) for t in model.graph.initializer),
        "operators": dict(operators.most_common()),
        "header": ModelHeader.from_json(text, source=str(path)) if text else None,
    }


def _onnx_port(value: Any) -> dict[str, Any]:
    import onnx

    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in kind.shape.dim]
    return {"name": value.name, "type": _type_name(onnx.TensorProto.DataType.Name(kind.elem_type)), "shape": shape}


def _openvino(path: Path) -> dict[str, Any]:
    from defusedxml import ElementTree
    from defusedxml.common import DefusedXmlException

    try:
        net = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, DefusedXmlException) as error:
        raise ModelError(
            f"{path} is no OpenVINO model or is cut off: {error}", hint="export it again", code="model-unreadable"
        ) from error
    if net is None or net.tag != "net":
        raise ModelError(f"{path} is an XML file, but not of an OpenVINO model", code="model-foreign")
    layers = net.findall("layers/layer")
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    operators: Counter[str] = Counter()
    parameters = 0
    types: Counter[str] = Counter()
    sources = {edge.get("to-layer"): (edge.get("from-layer"), edge.get("from-port")) for edge in net.iter("edge")}
    by_id = {layer.get("id"): layer for layer in layers}
    for layer in layers:
        kind, data = layer.get("type", "?"), layer.find("data")
        operators[kind] += 1
        if kind == "Parameter" and data is not None:
            shape = [int(n) if n.strip().isdigit() else "?" for n in data.get("shape", "").split(",")]
            inputs.append(
                {"name": layer.get("name"), "type": _type_name(data.get("element_type", "?")), "shape": shape}
            )
        elif kind == "Const" and data is not None:
            parameters += math.prod(int(n) for n in data.get("shape", "").split(",") if n.strip().isdigit())
            types[_type_name(data.get("element_type", "?"))] += 1
        elif kind == "Result":
            origin, port_id = sources.get(layer.get("id"), (None, None))
            port = next((p for p in by_id[origin].iter("port") if p.get("id") == port_id), None) if origin else None
            texts = [] if port is None else [d.text or "" for d in port.iter("dim")]
            dims = [int(text) if text.isdigit() else "?" for text in texts]
            name = (port.get("names") if port is not None else None) or layer.get("name") or ""
            kind = port.get("precision", "?") if port is not None else "?"
            outputs.append({"name": name.split(",")[0], "type": _type_name(kind), "shape": dims})
    entry = net.find(f"rt_info/{METADATA_KEY}")
    text = entry.get("value") if entry is not None else None
    return {
        "format": _graph_format("OpenVINO", text, inputs, outputs),
        "weights": path.with_suffix(".bin").name if path.with_suffix(".bin").is_file() else "missing",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": parameters,
        "types": dict(types.most_common()),
        "operators": dict(operators.most_common()),
        "header": ModelHeader.from_json(text, source=str(path)) if text else None,
    }


def _engine(path: Path) -> dict[str, Any]:
    from rtdetr_cli.infer.tensorrt_backend import header_path, read_engine_header

    header = read_engine_header(path)
    return {
        "format": "TensorRT engine",
        "note": "runs only on the kind of GPU and the TensorRT version that built it",
        "header_file": header_path(path).name if header is not None else "missing",
        "header": header,
    }


def _graph_format(what: str, header: str | None, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> str:
    names = {port["name"] for port in outputs}
    keeps = IMAGES in {port["name"] for port in inputs} and (set(FINISHED) <= names or set(RAW) <= names)
    if header:
        return f"{what} graph by rtdetr-cli"
    return f"{what} graph, foreign, " + ("of the published contract" if keeps else "not of the published contract")


def _tensors(tensors: Iterable[tuple[bool, str, Iterable[int]]]) -> dict[str, Any]:
    """Count (is a buffer, type, shape): parameters without buffers, and tensors by type."""
    types: Counter[str] = Counter()
    parameters = total = 0
    for buffer, dtype, shape in tensors:
        total += 1
        types[_type_name(dtype)] += 1
        parameters += 0 if buffer else math.prod(shape)
    return {"parameters": parameters, "tensors": total, "types": dict(types.most_common())}


def _type_name(spelled: str) -> str:
    """Return a format's own name of a type as numpy spells it."""
    return _TYPE_NAMES.get(spelled.lower(), spelled.lower())


def _is_buffer(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in ("running_mean", "running_var", "num_batches_tracked", "num_points_scale", "anchors", "valid_mask")


__all__ = ["inspect_model"]
