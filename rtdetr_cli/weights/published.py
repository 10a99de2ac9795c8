"""Model files in and out: ours, and every layout of the published RT-DETRv2 and RT-DETR checkpoints.

A published file names neither its architecture nor its classes; both are read off the shapes of its tensors. Pickles
are only ever opened with `weights_only`, which builds tensors and plain containers and runs nothing.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.model.attention import Rounding, Sampling
from rtdetr_cli.model.backbone import BLOCKS
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.version import __version__
from rtdetr_cli.weights.class_names import published_classes
from rtdetr_cli.weights.files import (
    identity_of,
    read_header,
    read_layout,
    rewrite_header,
    tensors_identity,
)
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader

__all__ = [
    "PublishedFile",
    "load_model",
    "load_strictly",
    "read_header",
    "read_published",
    "read_tensors",
    "rewrite_header",
    "save_model",
    "tensors_identity",
]

_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PICKLE_HINT = "only files of tensors are opened; ask its author for a safetensors file or a plain state dict"
_KINDS_HINT = (
    "what loads: our .safetensors, and published RT-DETRv2 or RT-DETR .pth files (`ema.module`, `model`, or bare)"
)


# ---------------------------------------------------------------- our own file


def save_model(path: Path, state_dict: Mapping[str, Tensor], header: ModelHeader) -> ModelHeader:
    """Write a model file: aside, flushed, renamed.

    Args:
        path: ends in `.safetensors`.
        state_dict: of `RTDETR`, any device.
        header: what the file says about itself; `identity` and `version` are filled in here.

    Returns:
        The header as written.

    Raises:
        RtdetrError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    header = replace(header, identity=_identity(tensors), version=__version__)
    with atomic_write(path) as aside:
        try:
            save_file(tensors, aside, metadata={METADATA_KEY: header.to_json()})
        except SafetensorError as error:
            # The system's own error, such as a full disk, is in its text only.
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
    return header


def _identity(tensors: Mapping[str, Tensor]) -> str:
    """Return what `files.tensors_identity` returns for a file of these CPU tensors."""

    def data(tensor: Tensor) -> Iterator[bytes]:
        yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return identity_of((n, _TYPES[t.dtype], tuple(t.shape), data(t)) for n, t in sorted(tensors.items()))


# ---------------------------------------------------------------- any model file


def load_model(
    path: Path, *, sampling: str | None = None, layers: int | None = None, queries: int | None = None
) -> tuple[RTDETR, ModelHeader]:
    """Load a detector, in eval mode, on the CPU.

    Args:
        path: our `.safetensors`, or a published checkpoint of RT-DETRv2 or RT-DETR v1.
        sampling: `bilinear` or `discrete`; None takes what the file says, or bilinear where it cannot say.
        layers: decoder layers used at inference; None takes the file's.
        queries: object queries used at inference; None takes the file's.

    Returns:
        The model, and its header with the inference settings in force. For a published file `header.extra` has
        `layout`, `source` (file name), `tensors_loaded` and `tensors_total`.

    Raises:
        ModelError: missing, truncated, foreign, unsafe, of an architecture that is not ours, or damaged.
        UsageError: `layers` or `queries` that the model does not have.
    """
    path = Path(path)
    if sampling not in (None, "bilinear", "discrete"):
        raise UsageError(f"sampling {sampling!r} is neither bilinear nor discrete")
    if is_ours(path):
        model, header = _load_ours(path, sampling)
    else:
        model, header = _load_published(path, sampling)
    model.set_inference(layers=layers, queries=queries)
    method, rounding = model.sampling
    header = replace(header, layers=model.layers, queries=model.queries, sampling=method, rounding=rounding)
    return model.eval(), header


def is_ours(path: Path) -> bool:
    """Tell a safetensors file from a torch checkpoint, by what is in it and not by its name.

    A safetensors file begins with the length of its header in eight bytes, whose first may be any: one in 32 files
    looks like a pickle there. The header's brace comes right after.

    Raises:
        ModelError: there is no such file.
    """
    start = _first_bytes(path)
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith((b"PK\x03\x04", b"\x80")))


def _load_ours(path: Path, sampling: str | None) -> tuple[RTDETR, ModelHeader]:
    header = read_header(path)
    state = _read_safetensors(path)
    if header.identity and _identity(state) != header.identity:
        raise ModelError(
            f"{path} is damaged: its tensors are not those that its header was written for",
            hint="copy it again from where it was made",
            code="model-damaged",
        )
    try:
        spec = ModelSpec(**header.architecture)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} has an architecture that cannot be read: {error}", code="model-header") from error
    method: Any = sampling or header.sampling
    rounding: Any = header.rounding
    model = _build(spec, len(header.names), method, rounding)
    load_strictly(model, state, source=str(path))
    model.set_inference(layers=header.layers or None, queries=header.queries or None)
    return model, header


def _load_published(path: Path, sampling: str | None) -> tuple[RTDETR, ModelHeader]:
    file = read_published(path)
    if file.spec is None:
        raise ModelError(
            f"{path} is a backbone's weights and not a detector's",
            hint=f"start a training from it: rtdetr train --weights {path}",
            code="model-backbone",
        )
    method: Sampling = "discrete" if sampling == "discrete" else "bilinear"
    model = _build(file.spec, file.num_classes, method, "published")
    load_strictly(model, file.state, source=str(path))
    size = _keep_anchors(model, file)
    names, category_ids = published_classes(file.num_classes)
    header = ModelHeader(
        names=names,
        category_ids=category_ids,
        imgsz=size,
        architecture=file.spec.model_dump(mode="json"),
        sampling=method,
        layers=file.spec.eval_layers,
        queries=file.spec.queries,
        identity=_identity(file.state),
        extra={
            "layout": file.layout,
            "source": path.name,
            "tensors_loaded": file.tensors_total,
            "tensors_total": file.tensors_total,
        },
    )
    return model, header


def _build(spec: ModelSpec, num_classes: int, sampling: Sampling, rounding: Rounding) -> RTDETR:
    """Build a model whose values are all about to be replaced: nothing is drawn, so no generator moves."""
    with torch.device("meta"):
        model = build_detector(spec, num_classes=num_classes, sampling=sampling, rounding=rounding)
    return model.to_empty(device="cpu")


def load_strictly(model: RTDETR, state: Mapping[str, Tensor], *, source: str, hint: str = _KINDS_HINT) -> int:
    """Load every tensor of `state`, and every tensor of the model from it.

    Args:
        model: what is filled.
        state: names and tensors.
        source: what messages call it.
        hint: what helps where the two differ.

    Returns:
        How many were loaded.

    Raises:
        ModelError: one is missing, left over, or of another shape; all are counted, the first few named.
    """
    own = model.state_dict()
    problems = [f"{n} is missing" for n in own if n not in state]
    problems += [f"{n} is not part of the model" for n in state if n not in own]
    problems += [
        f"{n} has shape {tuple(state[n].shape)} where the model has {tuple(own[n].shape)}"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    if problems:
        rest = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{source} does not fit the model: {', '.join(problems[:3])}{rest}", hint=hint, code="model-misfit"
        )
    model.load_state_dict(dict(state))
    return len(own)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of any model file, ours or published, under the published v2 names.

    Raises:
        ModelError: as `load_model`.
    """
    path = Path(path)
    return _read_safetensors(path) if is_ours(path) else read_published(path).state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_layout(path)  # says what is wrong in our words
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="copy it again", code="model-damaged") from error


# ---------------------------------------------------------------- published files


@dataclass(frozen=True, slots=True, eq=False)
class PublishedFile:
    """A published checkpoint, its names brought to those of RT-DETRv2.

    Attributes:
        state: a detector's tensors, without anchors; or a backbone's, without the `backbone.` in front.
        spec: the detector's sizes; None for a backbone's weights.
        num_classes: K; 0 for a backbone.
        layout: for people, such as `RT-DETRv2, ema.module`.
        tensors_total: that the file's state dict holds.
        anchors: the file's own, with the mask of valid ones, if it has them.
    """

    state: dict[str, Tensor]
    spec: ModelSpec | None
    num_classes: int
    layout: str
    tensors_total: int
    anchors: tuple[Tensor, Tensor] | None = None
    notes: tuple[str, ...] = field(default=())


def read_published(path: Path) -> PublishedFile:
    """Open a published `.pth` safely and say what it is.

    Raises:
        ModelError: missing, truncated, unsafe, or no RT-DETR.
    """
    path = Path(path)
    raw, where = _state_dict(_unpickle(path), path)
    total = len(raw)
    state = dict(raw)
    if state and all(n.startswith("module.") for n in state):  # saved from within a data-parallel wrapper
        state = {n.removeprefix("module."): t for n, t in state.items()}
    if "conv1.conv1_1.conv.weight" in state and not any(n.startswith("decoder.") for n in state):
        return PublishedFile(state, None, 0, f"ResNet-vd backbone, {where}", total)
    if not {"backbone", "encoder", "decoder"} <= {n.split(".", 1)[0] for n in state}:
        raise ModelError(
            f"{path} is a checkpoint of something else: it has no backbone, encoder and decoder",
            hint=_KINDS_HINT,
            code="model-foreign",
        )
    for part, name in (("backbone.stem.", "HGNetv2"), ("backbone.base_layer", "DLA"), ("backbone.model.", "RegNet")):
        if any(n.startswith(part) for n in state):
            raise ModelError(
                f"{path} is an RT-DETR with a {name} backbone, which rtdetr-cli does not have",
                hint="use one of the ResNet models: rtdetr presets",
                code="model-backbone",
            )
    version = "RT-DETRv2" if "decoder.enc_output.proj.weight" in state else "RT-DETR v1"
    if version == "RT-DETR v1":
        state = {_v2_name(n): t for n, t in state.items()}
    anchors, valid = state.pop("decoder.anchors", None), state.pop("decoder.valid_mask", None)
    try:
        spec = _spec_of(state)
        _fill_point_scales(state, spec)
        classes = state["decoder.enc_score_head.weight"].shape[0]
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path} looks like an RT-DETR, but its sizes cannot be read off its tensors ({error})",
            hint=_KINDS_HINT,
            code="model-foreign",
        ) from error
    if spec.freeze_norm:
        state = {
            n: t for n, t in state.items() if not (n.startswith("backbone.") and n.endswith("num_batches_tracked"))
        }
    both = None if anchors is None or valid is None else (anchors, valid)
    return PublishedFile(state, spec, classes, f"{version}, {where}", total, both)


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}", code="model-missing") from None
    except IsADirectoryError:
        raise ModelError(f"{path} is a folder, not a model file", code="model-missing") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", code="model-unreadable") from error


def _unpickle(path: Path) -> Any:
    """Open a torch file as data only."""
    start = _first_bytes(path)
    if not start:
        raise ModelError(f"{path} is empty", hint="copy or fetch it again", code="model-truncated")
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        what = "a web page, not a model file" if start.lstrip()[:1] == b"<" else "not a model file"
        raise ModelError(f"{path} is {what}", hint=_KINDS_HINT, code="model-foreign")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage types
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            named = f" ({wanted.group(1)})" if wanted else ""
            raise ModelError(
                f"{path} is a pickle that holds code or objects{named} and not only tensors; it was not run",
                hint=_PICKLE_HINT,
                code="model-unsafe",
            ) from None
        raise _cut_off(path) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        raise _cut_off(path) from error


def _cut_off(path: Path) -> ModelError:
    return ModelError(
        f"{path} ({path.stat().st_size} bytes) is cut off or damaged: torch cannot read it",
        hint="copy or fetch it again",
        code="model-truncated",
    )


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """Find the state dict in what a file holds, and name the place."""
    where = "bare"
    found = content
    if isinstance(content, Mapping):
        ema = content.get("ema")
        if isinstance(ema, Mapping) and isinstance(ema.get("module"), Mapping):
            found, where = ema["module"], "ema.module"
        elif isinstance(content.get("model"), Mapping):
            found, where = content["model"], "model"
    if (
        not isinstance(found, Mapping)
        or not found
        or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items())
    ):
        raise ModelError(f"{path} holds no state dict", hint=_KINDS_HINT, code="model-foreign")
    return dict(found), where


_V1_NAMES = (
    (re.compile(r"^(encoder\.input_proj\.\d+)\.0\."), r"\1.conv."),
    (re.compile(r"^(encoder\.input_proj\.\d+)\.1\."), r"\1.norm."),
    (re.compile(r"^decoder\.enc_output\.0\."), "decoder.enc_output.proj."),
    (re.compile(r"^decoder\.enc_output\.1\."), "decoder.enc_output.norm."),
)


def _v2_name(name: str) -> str:
    """Return the v2 name of a v1 tensor; a v2 name comes back as it is."""
    for pattern, replacement in _V1_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number that the group of `pattern` takes among the names."""
    numbers = [int(m.group(1)) for n in state if (m := re.match(pattern, n))]
    return max(numbers) + 1 if numbers else 0


def backbone_depth(state: Mapping[str, Tensor]) -> int:
    """Return the depth of a ResNet from the names of its tensors.

    Raises:
        ValueError: no ResNet of ours has such stages.
    """
    stages = tuple(_count(state, rf"res_layers\.{i}\.blocks\.(\d+)\.") for i in range(4))
    bottleneck = any(".branch2c." in n for n in state)
    depths = [d for d, blocks in BLOCKS.items() if blocks == stages and (d >= 50) == bottleneck]
    if not depths:
        raise ValueError(f"no ResNet has {stages} blocks")
    return depths[0]


def _spec_of(state: Mapping[str, Tensor]) -> ModelSpec:
    """Read the architecture off the names and shapes of a detector's tensors."""
    depth = backbone_depth({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")})
    width = state["backbone.conv1.conv1_3.conv.weight"].shape[0]
    freeze_norm = "backbone.conv1.conv1_1.norm.num_batches_tracked" not in state
    hidden = state["encoder.input_proj.0.conv.weight"].shape[0]
    layer = "decoder.decoder.layers.0."
    layers = _count(state, r"decoder\.decoder\.layers\.(\d+)\.")
    weights = state[layer + "cross_attn.attention_weights.weight"]
    points = _points_of(state, weights.shape[0])
    expansion = state["encoder.fpn_blocks.0.conv1.conv.weight"].shape[0] / hidden
    # r50m alone trains six layers to use three; nothing but its narrow fusion blocks tells it from r50.
    is_r50m = depth == 50 and layers == 6 and expansion == 0.5
    return ModelSpec(
        depth=depth,
        width=width,
        freeze_at=0 if freeze_norm else -1,
        freeze_norm=freeze_norm,
        hidden_dim=hidden,
        encoder_ffn=state["encoder.encoder.0.layers.0.linear1.weight"].shape[0],
        encoder_layers=_count(state, r"encoder\.encoder\.0\.layers\.(\d+)\."),
        expansion=expansion,
        depth_mult=_count(state, r"encoder\.fpn_blocks\.0\.bottlenecks\.(\d+)\.") / 3,
        heads=weights.shape[0] // sum(points),
        decoder_dim=weights.shape[1],
        decoder_ffn=state[layer + "linear1.weight"].shape[0],
        decoder_layers=layers,
        eval_layers=3 if is_r50m else layers,
        num_points=points,
    )


def _points_of(state: Mapping[str, Tensor], outputs: int) -> tuple[int, int, int]:
    """Return the sampling points of each level.

    v2 files hold 1/n for each of a level's n points. v1 files do not say: eight heads and equal points.
    """
    scales = state.get("decoder.decoder.layers.0.cross_attn.num_points_scale")
    if scales is None:
        each = outputs // (8 * 3)
        return (each, each, each)
    values, points = scales.tolist(), []
    while values:
        points.append(max(1, round(1 / values[0])))
        values = values[points[-1] :]
    if len(points) != 3 or sum(points) != len(scales):
        raise ValueError(f"sampling points {points} do not make three levels of {len(scales)}")
    return (points[0], points[1], points[2])


def _fill_point_scales(state: dict[str, Tensor], spec: ModelSpec) -> None:
    """Add the constants that v1 files lack."""
    for i in range(spec.decoder_layers):
        name = f"decoder.decoder.layers.{i}.cross_attn.num_points_scale"
        if name not in state:
            state[name] = torch.tensor([1 / n for n in spec.num_points for _ in range(n)])


def _keep_anchors(model: RTDETR, file: PublishedFile) -> tuple[int, int]:
    """Use a published file's anchors at the size that they were made for, and return that size.

    Published inputs are square, so the number of anchors tells the side; anything else is left to our own anchors.
    """
    default = (640, 640)
    if file.anchors is None:
        return default
    logits, valid = file.anchors
    side = 32 * math.isqrt(logits.shape[1] // 21)  # 1 + 4 + 16 tokens for each cell of the coarsest map
    if logits.shape != (1, 21 * (side // 32) ** 2, 4) or valid.shape[:2] != logits.shape[:2] or side == 0:
        return default
    model.decoder.keep_published_anchors([(side // s, side // s) for s in (8, 16, 32)], logits, valid)
    return side, side
