"""Read the published checkpoints of RT-DETRv2 and RT-DETR v1.

A published file names neither its architecture nor its classes, so both are derived from the shapes of its tensors.
Pickles are only opened with `weights_only`, which creates tensors and plain containers and runs no code.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rtdetr_cli.config.image_size import STRIDE
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.backbone import BLOCKS

LOADABLE_HINT = (
    "rtdetr loads its own .safetensors, and published RT-DETRv2 or RT-DETR .pth files "
    "(with `ema.module`, `model`, or a bare state dict)"
)
_PICKLE_HINT = "only tensors are loaded; ask the author for a safetensors file or a plain state dict"
_DOWNLOAD_HINT = "copy or download it again"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")
_FOREIGN_BACKBONES = {"backbone.stem.": "HGNetv2", "backbone.base_layer": "DLA", "backbone.model.": "RegNet"}


# Patterns over the names of RT-DETR v1, and the names of RT-DETRv2.
_V2_NAMES = {
    r"^(encoder\.input_proj\.\d+)\.0\.": r"\1.conv.",
    r"^(encoder\.input_proj\.\d+)\.1\.": r"\1.norm.",
    r"^decoder\.enc_output\.0\.": "decoder.enc_output.proj.",
    r"^decoder\.enc_output\.1\.": "decoder.enc_output.norm.",
}


class PublishedAnchors(NamedTuple):
    """The anchors of a checkpoint, and the side in pixels of the square input that they were made for."""

    side: int
    logits: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PublishedFile:
    """A published checkpoint, its tensors under the names of RT-DETRv2."""

    state: dict[str, Tensor]  # a detector's without the anchors; or a backbone's without the prefix `backbone.`
    spec: ModelSpec | None  # None for a backbone
    num_classes: int  # 0 for a backbone
    layout: str  # such as `RT-DETRv2, ema.module`
    tensors_total: int  # in the file
    anchors: PublishedAnchors | None = None  # None where the file has none, or none of a square input


def is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors rather than a torch checkpoint, by its content.

    A safetensors file begins with eight bytes of length, whose first byte can equal that of a pickle (in one file of
    32); the opening brace of its JSON follows.

    Raises:
        ModelError: the file does not exist or cannot be read.
    """
    start = _first_bytes(path)
    return start[8:9] == b"{" or (path.suffix == ".safetensors" and not start.startswith(_PICKLE_STARTS))


def read_published(path: Path) -> PublishedFile:
    """Open a published `.pth` safely and derive its architecture.

    Raises:
        ModelError: the file is missing, truncated, unsafe, or not an RT-DETR.
    """
    state, location = _find_state_dict(_unpickle(path), path)
    total = len(state)
    if all(n.startswith("module.") for n in state):  # saved from within a data-parallel wrapper
        state = {n.removeprefix("module."): t for n, t in state.items()}
    if "conv1.conv1_1.conv.weight" in state and not any(n.startswith("decoder.") for n in state):
        return PublishedFile(state, None, 0, f"ResNet-vd backbone, {location}", total)
    _check_is_rtdetr(state, path)
    version = "RT-DETRv2" if "decoder.enc_output.proj.weight" in state else "RT-DETR v1"
    if "decoder.query_pos_head.layers.2.weight" in state:
        version = "RT-DETRv2 of DEIM"
    if version == "RT-DETR v1":
        for pattern, name in _V2_NAMES.items():
            state = {re.sub(pattern, name, n): t for n, t in state.items()}
    anchors = _square_anchors(state.pop("decoder.anchors", None), state.pop("decoder.valid_mask", None))
    try:
        spec = _derive_spec(state)
        num_classes = state["decoder.enc_score_head.weight"].shape[0]
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path} looks like an RT-DETR, but its architecture cannot be derived from its tensors ({error})",
            hint=LOADABLE_HINT,
            code="model-foreign",
        ) from error
    for i in range(spec.decoder_layers):  # constants that v1 files lack
        scale = torch.tensor([1 / n for n in spec.num_points for _ in range(n)])
        state.setdefault(f"decoder.decoder.layers.{i}.cross_attn.num_points_scale", scale)
    if spec.freeze_norm:
        state = {
            n: t for n, t in state.items() if not (n.startswith("backbone.") and n.endswith("num_batches_tracked"))
        }
    return PublishedFile(state, spec, num_classes, f"{version}, {location}", total, anchors)


def _check_is_rtdetr(state: Mapping[str, Tensor], path: Path) -> None:
    if not {"backbone", "encoder", "decoder"} <= {n.split(".", 1)[0] for n in state}:
        raise ModelError(
            f"{path} is not an RT-DETR checkpoint: it has no backbone, encoder and decoder",
            hint=LOADABLE_HINT,
            code="model-foreign",
        )
    for prefix, backbone in _FOREIGN_BACKBONES.items():
        if any(n.startswith(prefix) for n in state):
            raise ModelError(
                f"{path} is an RT-DETR with a {backbone} backbone, which rtdetr-cli does not support",
                hint="use one of the ResNet models: rtdetr presets",
                code="model-backbone",
            )


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
        raise ModelError(f"{path} is empty", hint=_DOWNLOAD_HINT, code="model-truncated")
    if not start.startswith(_PICKLE_STARTS):
        kind = "a web page, not a model file" if start.lstrip()[:1] == b"<" else "not a model file"
        raise ModelError(f"{path} is {kind}", hint=LOADABLE_HINT, code="model-foreign")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage types
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
            OSError) as error:  # fmt: skip
        unsafe = "Unsupported global" in str(error) or "weights_only" in str(error).lower()
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            name = re.search(r"GLOBAL (\S+)", str(error))
            raise ModelError(
                f"{path} is a pickle with code or objects{f' ({name[1]})' if name else ''}, not only tensors; "
                "it was not run",
                hint=_PICKLE_HINT,
                code="model-unsafe",
            ) from None
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or damaged: torch cannot read it",
            hint=_DOWNLOAD_HINT,
            code="model-truncated",
        ) from error


def _find_state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the state dict in a checkpoint, and where it was: `ema.module`, `model` or `bare`."""
    state, location = content, "bare"
    match content:
        case {"ema": {"module": Mapping() as state}}:
            location = "ema.module"
        case {"model": Mapping() as state}:
            location = "model"
    is_state = isinstance(state, Mapping) and all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()
    )
    if not is_state or not state:
        raise ModelError(f"{path} contains no state dict", hint=LOADABLE_HINT, code="model-foreign")
    return dict(state), location


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return the number of modules in a list, from the largest index that `pattern` captures in the names."""
    indices = [int(m[1]) for n in state if (m := re.match(pattern, n))]
    return max(indices, default=-1) + 1


def backbone_depth(state: Mapping[str, Tensor]) -> int:
    """Return the depth of a ResNet from the names of its tensors.

    Raises:
        ValueError: no supported ResNet has these stages.
    """
    stages = tuple(_count(state, rf"res_layers\.{i}\.blocks\.(\d+)\.") for i in range(4))
    bottleneck = any(".branch2c." in n for n in state)
    depths = [d for d, blocks in BLOCKS.items() if blocks == stages and (d >= 50) == bottleneck]
    if not depths:
        raise ValueError(f"no ResNet has {stages} blocks")
    return depths[0]


def _derive_spec(state: Mapping[str, Tensor]) -> ModelSpec:
    """Derive the architecture from the names and shapes of a detector's tensors."""
    depth = backbone_depth({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")})
    freeze_norm = "backbone.conv1.conv1_1.norm.num_batches_tracked" not in state
    hidden = state["encoder.input_proj.0.conv.weight"].shape[0]
    layer = "decoder.decoder.layers.0."
    layers = _count(state, r"decoder\.decoder\.layers\.(\d+)\.")
    weights = state[layer + "cross_attn.attention_weights.weight"]
    points = _points_per_level(state, weights.shape[0])
    expansion = state["encoder.fpn_blocks.0.conv1.conv.weight"].shape[0] / hidden
    # r50m trains six layers and uses three; only its narrow fusion blocks tell it from r50.
    is_r50m = depth == 50 and layers == 6 and expansion == 0.5
    return ModelSpec(
        depth=depth,
        width=state["backbone.conv1.conv1_3.conv.weight"].shape[0],
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
        decoder="deim" if "decoder.query_pos_head.layers.2.weight" in state else "rtdetrv2",
        decoder_layers=layers,
        eval_layers=3 if is_r50m else layers,
        num_points=points,
    )


def _points_per_level(state: Mapping[str, Tensor], outputs: int) -> tuple[int, int, int]:
    """Return the number of sampling points at each level.

    v2 files store 1/n for each of a level's n points. v1 files store nothing; they have eight heads and the same
    number of points at every level.
    """
    scales = state.get("decoder.decoder.layers.0.cross_attn.num_points_scale")
    if scales is None:
        points = outputs // (8 * 3)
        return (points, points, points)
    values, levels = scales.tolist(), []
    while values:
        levels.append(max(1, round(1 / values[0])))
        values = values[levels[-1] :]
    if len(levels) != 3 or sum(levels) != len(scales):
        raise ValueError(f"sampling points {levels} do not make three levels of {len(scales)}")
    return (levels[0], levels[1], levels[2])


def _square_anchors(logits: Tensor | None, valid: Tensor | None) -> PublishedAnchors | None:
    """Return anchors of a square input, whose side follows from their number; None for any others."""
    if logits is None or valid is None:
        return None
    cells = math.isqrt(logits.shape[1] // 21)  # a cell of the coarsest map has 1 + 4 + 16 tokens
    if cells == 0 or logits.shape != (1, 21 * cells**2, 4) or valid.shape[:2] != logits.shape[:2]:
        return None
    return PublishedAnchors(STRIDE * cells, logits, valid)
