"""Read the checkpoints that others publish: RT-DETRv2 and RT-DETR v1 of the official code, of DEIM and of transformers.

An official file names neither its architecture nor its classes, so both are derived from the shapes of its tensors; a
folder of transformers has both in its `config.json`. Pickles are only opened with `weights_only`, which creates
tensors and plain containers and runs no code.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rtdetr_cli.config.image_size import STRIDE
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError
from rtdetr_cli.weights.architecture import derive_spec, point_scales
from rtdetr_cli.weights.header import PICKLE_STARTS, ModelHeader, first_bytes, is_safetensors
from rtdetr_cli.weights.identity import check_tensors
from rtdetr_cli.weights.names import from_official
from rtdetr_cli.weights.transformers_files import read_transformers

Maker = Literal["official", "DEIM", "transformers"]

LOADABLE_HINT = (
    "rtdetr loads its own .safetensors, .pth files of RT-DETRv2 or RT-DETR (with `ema.module`, `model`, or a bare "
    "state dict), and folders of transformers with config.json and model.safetensors"
)
_PICKLE_HINT = "only tensors are loaded; ask the author for a safetensors file or a plain state dict"
_DOWNLOAD_HINT = "copy or download it again"
_FOREIGN_BACKBONES = {"backbone.base_layer": "DLA", "backbone.model.": "RegNet"}
_BACKBONE_MARKS = {"conv1.conv1_1.conv.weight": "ResNet-vd", "stem.stem1.conv.weight": "HGNetv2"}


class PublishedAnchors(NamedTuple):
    """The anchors of a checkpoint, and the side in pixels of the square input that they were made for."""

    side: int
    logits: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PublishedFile:
    """A published checkpoint, its tensors under our names."""

    state: dict[str, Tensor]  # a detector's without the anchors; or a backbone's without the prefix `backbone.`
    spec: ModelSpec | None  # None for a backbone
    num_classes: int  # 0 for a backbone
    layout: str  # such as `RT-DETRv2, ema.module`
    tensors_total: int  # in the file
    anchors: PublishedAnchors | None = None  # None where the file has none, or none of a square input
    maker: Maker = "official"
    is_v1: bool = False  # the names are those of RT-DETR v1; the network is the same
    header: ModelHeader | None = None  # what a folder of transformers says about the model


def read_published(path: Path) -> PublishedFile:
    """Open a checkpoint safely and derive its architecture: a `.pth`, or a safetensors file that is not ours.

    Raises:
        ModelError: the file is missing, truncated, unsafe, or not an RT-DETR.
    """
    if is_safetensors(path):
        state, location = load_tensors(path, hint=_DOWNLOAD_HINT), "safetensors"
    else:
        state, location = _find_state_dict(_unpickle(path), path)
    check_tensors(state, source=str(path))
    total = len(state)
    if any(n.startswith(("model.backbone.", "model.encoder.")) for n in state):
        state, spec, header, is_v1 = read_transformers(path, state)
        layout = f"{_version(is_v1)} of transformers"
        return PublishedFile(state, spec, len(header.names), layout, total, None, "transformers", is_v1, header)
    if all(n.startswith("module.") for n in state):  # saved from within a data-parallel wrapper
        state = {n.removeprefix("module."): t for n, t in state.items()}
    state, is_v1 = from_official(state)
    for mark, kind in _BACKBONE_MARKS.items():
        if mark in state and not any(n.startswith("decoder.") for n in state):
            return PublishedFile(state, None, 0, f"{kind} backbone, {location}", total)
    _check_is_rtdetr(state, path)
    try:
        anchors = _square_anchors(state.pop("decoder.anchors", None), state.pop("decoder.valid_mask", None))
        spec = derive_spec(state)
        num_classes = state["decoder.enc_score_head.weight"].shape[0]
        if num_classes == 0:
            raise ValueError("it has no classes")
    except (LookupError, ValueError, ArithmeticError, TypeError) as error:
        raise ModelError(
            f"{path} looks like an RT-DETR, but its architecture cannot be derived from its tensors ({error})",
            hint=LOADABLE_HINT,
            code="model-foreign",
        ) from error
    state = {**point_scales(spec), **state}
    if spec.freeze_norm:
        state = {
            n: t for n, t in state.items() if not (n.startswith("backbone.") and n.endswith("num_batches_tracked"))
        }
    maker: Maker = "DEIM" if spec.decoder == "deim" else "official"
    layout = f"{_version(is_v1)}{' of DEIM' if maker == 'DEIM' else ''}, {location}"
    return PublishedFile(state, spec, num_classes, layout, total, anchors, maker, is_v1)


def _version(is_v1: bool) -> str:
    return "RT-DETR v1" if is_v1 else "RT-DETRv2"


def load_tensors(path: Path, *, hint: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises ModelError, with the hint, where it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=hint, code="model-damaged") from error


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
                hint="rtdetr presets lists the models that it supports",
                code="model-backbone",
            )


def _unpickle(path: Path) -> Any:
    """Open a torch file as data only."""
    start = first_bytes(path)
    if not start:
        raise ModelError(f"{path} is empty", hint=_DOWNLOAD_HINT, code="model-truncated")
    if not start.startswith(PICKLE_STARTS):
        kind = "a web page, not a model file" if start.lstrip()[:1] == b"<" else "not a model file"
        raise ModelError(f"{path} is {kind}", hint=LOADABLE_HINT, code="model-foreign")
    try:
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:  # torch stores; a small compressed file could fill the memory
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage types
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle provokes
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
    is_state = isinstance(state, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items())
    if not is_state or not state:
        raise ModelError(f"{path} contains no state dict", hint=LOADABLE_HINT, code="model-foreign")
    return dict(state), location


def _square_anchors(logits: Tensor | None, valid: Tensor | None) -> PublishedAnchors | None:
    """Return anchors of a square input, whose side follows from their number; None for any others."""
    if logits is None or valid is None:
        return None
    cells = math.isqrt(logits.shape[1] // 21)  # a cell of the coarsest map has 1 + 4 + 16 tokens
    if cells == 0 or logits.shape != (1, 21 * cells**2, 4) or valid.shape[:2] != logits.shape[:2]:
        return None
    return PublishedAnchors(STRIDE * cells, logits, valid)
