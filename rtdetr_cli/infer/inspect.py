"""Describe a model file without running it, and without the runtime where the format allows it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rtdetr_cli.documents import read_bounded
from rtdetr_cli.errors import ModelError
from rtdetr_cli.infer.backend import check_model_path
from rtdetr_cli.infer.graph import FINISHED, IMAGES, RAW, first_line
from rtdetr_cli.weights.binding import PARTS, header_path, read_export_header, status
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, METADATA_KEY, ModelHeader, read_layout

# Names of types in safetensors, ONNX and OpenVINO -> numpy's.
_TYPE_NAMES = {"float": "float32", "bf16": "bfloat16", "f64": "float64", "i64": "int64", "i32": "int32", "u8": "uint8"}
_TYPE_NAMES |= {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16", "i8": "int8"}
_MAX_TENSOR = 1 << 50
_MAX_XML_BYTES = 1 << 28
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "num_points_scale", "anchors", "valid_mask")


def inspect_model(path: Path, imgsz: tuple[int, int] | None = None) -> dict[str, Any]:
    """Describe any model file but a training checkpoint.

    Args:
        path: the file.
        imgsz: height and width that the GFLOPs of weights are counted at; the model's by default.

    Returns:
        Plain values: always `path`, `format`, `bytes`, `verification` and `header` (None without one); depending on the
        format also `parameters`, `tensors`, `types`, `inputs`, `outputs`, `opset`, `operators`, `layout`, `family`...

    Raises:
        ModelError: the file is missing, truncated or not a model.
        EnvironmentProblem: a package that reads the format is missing.
    """
    check_model_path(path)
    suffix = path.suffix.lower()
    readers = {".safetensors": _safetensors, ".onnx": _onnx, ".xml": _openvino, ".engine": _engine, ".plan": _engine}
    facts = readers.get(suffix, _published)(path)
    size = path.stat().st_size
    if suffix == ".xml" and path.with_suffix(".bin").is_file():
        size += path.with_suffix(".bin").stat().st_size
    header = facts.pop("header", None)
    document = {"path": str(path), "format": facts.pop("format"), "bytes": size, **facts}
    state, modified = status(path, header)
    document["verification"] = {"status": state, "modified": [PARTS[name] for name in modified]}
    document["header"] = None if header is None else asdict(header)
    if header is not None and header.architecture and suffix not in EXPORT_SUFFIXES:
        from rtdetr_cli.infer.family import family_facts

        document["family"] = family_facts(path, header, imgsz)
    return document


def graph_precision(facts: Mapping[str, Any]) -> str | None:
    """Return `fp32`, `fp16` or `int8`: what the facts of `inspect_model` show about a graph; None for an engine."""
    if any(re.fullmatch("QuantizeLinear|FakeQuantize|.*Integer", name) for name in facts.get("operators", {})):
        return "int8"
    types = facts.get("types", {})
    return ("fp16" if "float16" in types else "fp32") if types else None


def _safetensors(path: Path) -> dict[str, Any]:
    layout = read_layout(path)
    text = layout.metadata.get(METADATA_KEY)
    if text is None and {n.split(".", 1)[0] for n in layout.tensors} & {"model", "decoder", "conv1", "stem"}:
        return _published(path)
    return {
        "format": "rtdetr-cli model" if text else "safetensors without an rtdetr header",
        **_count_tensors(path, ((name, entry["dtype"], entry["shape"]) for name, entry in layout.tensors.items())),
        "header": ModelHeader.from_json(text, source=str(path)) if text else None,
    }


def _published(path: Path) -> dict[str, Any]:
    from rtdetr_cli.weights.load import load_published
    from rtdetr_cli.weights.published import read_published

    file = read_published(path)
    tensors = ((name, str(tensor.dtype).removeprefix("torch."), tensor.shape) for name, tensor in file.state.items())
    facts = {"format": "published checkpoint", "layout": file.layout, **_count_tensors(path, tensors)}
    facts["tensors"] = file.tensors_total
    if file.spec is not None:
        facts["header"] = load_published(path, file)[1]
    return facts


def _onnx(path: Path) -> dict[str, Any]:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        if not model.graph.node:
            raise ValueError("it has no graph")
    except Exception as error:  # protobuf's exceptions differ from version to version
        raise ModelError(
            f"{path} is not an ONNX model, or is truncated: {first_line(error)}",
            hint="export it again",
            code="model-unreadable",
        ) from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    opsets = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    initializers = {initializer.name for initializer in model.graph.initializer}
    text = metadata.get(METADATA_KEY)
    inputs = [_onnx_port(v) for v in model.graph.input if v.name not in initializers]
    outputs = [_onnx_port(v) for v in model.graph.output]
    return {
        "format": _graph_format("ONNX", text, inputs, outputs),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": opsets[0] if opsets else None,
        "weights_outside": any(t.data_location == t.EXTERNAL for t in model.graph.initializer),
        "inputs": inputs,
        "outputs": outputs,
        **_count_tensors(path, (("", _onnx_type(t.data_type), t.dims) for t in model.graph.initializer)),
        "operators": dict(count_operators(model).most_common()),
        "header": ModelHeader.from_json(text, source=str(path)) if text else None,
    }


def count_operators(model: Any) -> Counter[str]:
    """Count the operators of an ONNX model, including those in branches and functions."""
    counts: Counter[str] = Counter()
    blocks = [model.graph, *model.functions]
    while blocks:
        for node in blocks.pop().node:
            tanh = any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
            counts[f"{node.op_type}(tanh)" if tanh else node.op_type] += 1
            blocks.extend(a.g for a in node.attribute if a.HasField("g"))
    return counts


def _onnx_port(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in tensor.shape.dim]
    return _port(value.name, _onnx_type(tensor.elem_type), shape)


def _onnx_type(number: int) -> str:
    """Return the name of an ONNX type; `type 99` for one that this version does not know."""
    import onnx

    types = onnx.TensorProto.DataType
    return str(types.Name(number)) if number in types.values() else f"type {number}"


def _openvino(path: Path) -> dict[str, Any]:
    from defusedxml import ElementTree
    from defusedxml.common import DefusedXmlException

    try:
        net = ElementTree.fromstring(read_bounded(path, limit=_MAX_XML_BYTES))
    except (ElementTree.ParseError, DefusedXmlException, LookupError, ValueError, OSError) as error:
        raise ModelError(
            f"{path} is not an OpenVINO model, or is truncated: {error}",
            hint="export it again",
            code="model-unreadable",
        ) from error
    if net is None or net.tag != "net":
        raise ModelError(f"{path} is an XML file, but not an OpenVINO model", code="model-foreign")
    layers = {layer.get("id"): layer for layer in net.findall("layers/layer")}
    sources = {edge.get("to-layer"): (edge.get("from-layer"), edge.get("from-port")) for edge in net.iter("edge")}
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    constants: list[tuple[str, str, list[int]]] = []
    for layer in layers.values():
        kind, data = layer.get("type"), layer.find("data")
        if kind == "Result":
            outputs.append(_openvino_output(layer, layers, sources))
        elif kind in ("Parameter", "Const") and data is not None:
            element_type, shape = data.get("element_type", "?"), data.get("shape", "").split(",")
            if kind == "Parameter":
                inputs.append(_port(layer.get("name"), element_type, _dimensions(shape)))
            else:
                constants.append(("", element_type, [n for n in _dimensions(shape) if isinstance(n, int)]))
    entry = net.find(f"rt_info/{METADATA_KEY}")
    text = entry.get("value") if entry is not None else None
    counts = _count_tensors(path, constants)
    return {
        "format": _graph_format("OpenVINO", text, inputs, outputs),
        "weights": path.with_suffix(".bin").name if path.with_suffix(".bin").is_file() else "missing",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": counts["parameters"],
        "types": counts["types"],
        "operators": dict(Counter(map(_openvino_operator, layers.values())).most_common()),
        "header": ModelHeader.from_json(text, source=str(path)) if text else None,
    }


def _openvino_operator(layer: Any) -> str:
    data = layer.find("data")
    tanh = data is not None and data.get("approximation_mode", "").lower() == "tanh"
    return f"{layer.get('type', '?')}{'(tanh)' if tanh else ''}"


def _openvino_output(layer: Any, layers: dict[Any, Any], sources: dict[Any, tuple[Any, Any]]) -> dict[str, Any]:
    """Describe an output, whose type and shape are those of the port that it is connected to."""
    source, port_id = sources.get(layer.get("id"), (None, None))
    port = next((p for p in layers[source].iter("port") if p.get("id") == port_id), None) if source in layers else None
    if port is None:
        return _port(layer.get("name") or "", "?", [])
    name = port.get("names") or layer.get("name") or ""
    return _port(name.split(",")[0], port.get("precision", "?"), _dimensions(d.text or "" for d in port.iter("dim")))


def _dimensions(texts: Iterable[str]) -> list[int | str]:
    """Return dimensions as numbers, and `?` for those that are not numbers."""
    return [int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else "?" for text in texts]


def _engine(path: Path) -> dict[str, Any]:
    from rtdetr_cli.infer.tensorrt_backend import RTX_VERSION

    header = read_export_header(path)
    note = "runs only on the kind of GPU and the TensorRT version that built it"
    if header is not None and header.extra.get("targets"):
        version = header.extra["versions"][RTX_VERSION]
        note = f"runs on {', '.join(header.extra['targets'])}, with version {version} of TensorRT for RTX and no other"
    return {
        "format": "TensorRT engine",
        "note": note,
        "header_file": header_path(path).name if header is not None else "missing",
        "header": header,
    }


def _graph_format(runtime: str, header: str | None, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> str:
    if header:
        return f"{runtime} graph by rtdetr-cli"
    names = {port["name"] for port in outputs}
    follows = IMAGES in {port["name"] for port in inputs} and (set(FINISHED) <= names or set(RAW) <= names)
    return f"{runtime} graph, foreign, " + ("of the published contract" if follows else "not of the published contract")


def _count_tensors(path: Path, tensors: Iterable[tuple[str, str, Iterable[int]]]) -> dict[str, Any]:
    """Count tensors (name, type, shape) by type, and the parameters in them without buffers."""
    types: Counter[str] = Counter()
    parameters = 0
    for name, dtype, shape in tensors:
        types[_TYPE_NAMES.get(dtype.lower(), dtype.lower())] += 1
        size = math.prod(shape)
        if not 0 <= size < _MAX_TENSOR:
            raise ModelError(f"{path} has a tensor of an impossible shape", code="model-unreadable")
        parameters += 0 if name.rsplit(".", 1)[-1] in _BUFFERS else size
    return {"parameters": parameters, "tensors": types.total(), "types": dict(types.most_common())}


def _port(name: str | None, dtype: str, shape: list[Any]) -> dict[str, Any]:
    return {"name": name, "type": _TYPE_NAMES.get(dtype.lower(), dtype.lower()), "shape": shape}
