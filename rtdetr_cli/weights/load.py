"""Save model files, and load a detector from our own files and from published checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.model.build import build_shapes
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.version import __version__
from rtdetr_cli.weights.architecture import checked_spec
from rtdetr_cli.weights.catalogue import find_by_file
from rtdetr_cli.weights.class_names import published_classes
from rtdetr_cli.weights.header import METADATA_KEY, ModelHeader, own_header
from rtdetr_cli.weights.identity import check_tensors, tensors_identity
from rtdetr_cli.weights.published import LOADABLE_HINT, PublishedFile, load_tensors, read_published


def save_model(path: Path, state_dict: Mapping[str, Tensor], header: ModelHeader) -> ModelHeader:
    """Write a model file, and return its header with `identity` and `version` filled in.

    Raises:
        RtdetrError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    header = replace(header, identity=tensors_identity(tensors), version=__version__)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: header.to_json()})
        except SafetensorError as error:
            # safetensors gives an error of the operating system, such as a full disk, only as text.
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    return header


def load_model(
    path: Path, *, sampling: str | None = None, layers: int | None = None, queries: int | None = None
) -> tuple[RTDETR, ModelHeader]:
    """Load a detector, in eval mode, on the CPU.

    Args:
        path: our `.safetensors`, or any file that `read_published` reads.
        sampling: `bilinear` or `discrete`; None for the file's own, or for that of the published file of this name, or
            bilinear.
        layers: decoder layers used at inference; None for the file's own.
        queries: object queries used at inference; None for the file's own.

    Returns:
        The model, and its header with the inference settings in force. For a published file `header.extra` has
        `maker`, `layout`, `source` (file name), `tensors_loaded`, `tensors_total`, and `v1` for names of RT-DETR v1.

    Raises:
        ModelError: the file is missing, truncated, damaged, unsafe, or holds another architecture.
        UsageError: `layers` or `queries` that the model does not have.
    """
    path = Path(path)
    if sampling not in (None, "bilinear", "discrete"):
        raise UsageError(f"sampling {sampling!r} is neither bilinear nor discrete")
    own = own_header(path)
    if own is None:
        model, header = load_published(path, read_published(path), sampling)
    else:
        model, header = _load_own(path, own, sampling)
    model.set_inference(layers=layers, queries=queries)
    method, rounding = model.sampling
    header = replace(header, layers=model.layers, queries=model.queries, sampling=method, rounding=rounding)
    return model.eval(), header


def _load_own(path: Path, header: ModelHeader, sampling: str | None) -> tuple[RTDETR, ModelHeader]:
    state = load_tensors(path, hint="copy it again")
    check_tensors(state, source=str(path))
    if header.identity and tensors_identity(state) != header.identity:
        raise ModelError(
            f"{path} is damaged: checksum mismatch between its tensors and its header",
            hint="copy it again from where it was made",
            code="model-damaged",
        )
    spec = checked_spec(header, str(path))
    model = _load_into(spec, state, len(header.names), sampling or header.sampling, header.rounding, source=str(path))
    model.set_inference(layers=header.layers or None, queries=header.queries or None)
    return model, header


def load_published(path: Path, file: PublishedFile, sampling: str | None = None) -> tuple[RTDETR, ModelHeader]:
    """Load a detector from a published file that has been read; see `load_model`."""
    if file.spec is None:
        raise ModelError(
            f"{path} contains only the weights of a backbone, not of a detector",
            hint=f"start a training from it: rtdetr train --weights {path}",
            code="model-backbone",
        )
    method = sampling or published_sampling(path, file)
    model = _load_into(file.spec, file.state, file.num_classes, method, "published", source=str(path))
    side = 640
    if file.anchors is not None:
        side = file.anchors.side
        shapes = [(side // stride, side // stride) for stride in (8, 16, 32)]
        model.decoder.use_published_anchors(shapes, file.anchors.logits, file.anchors.valid)
    header = file.header
    if header is None:
        names, category_ids = published_classes(file.num_classes)
        header = ModelHeader(names=names, category_ids=category_ids, imgsz=(side, side), queries=file.spec.queries)
    header = replace(
        header,
        architecture=file.spec.model_dump(mode="json"),
        sampling=method,
        layers=file.spec.eval_layers,
        identity=tensors_identity(file.state),
        extra={
            **header.extra,
            "layout": file.layout,
            "source": path.name,
            "maker": file.maker,
            "tensors_loaded": file.tensors_total,
            "tensors_total": file.tensors_total,
            **({"v1": True} if file.is_v1 else {}),
        },
    )
    model.set_inference(queries=header.queries)
    return model, header


def published_sampling(path: Path, file: PublishedFile) -> str:
    """Return the sampling that a file was trained with: what it says, or what was published under its name."""
    if file.header is not None:
        return file.header.sampling
    entry = find_by_file(path.name)
    return entry.sampling if entry is not None else "bilinear"


def _load_into(
    spec: ModelSpec, state: Mapping[str, Tensor], num_classes: int, sampling: Any, rounding: Any, *, source: str
) -> RTDETR:
    """Build a model without initial values, and fill it.

    It takes memory only after the state dict was found to fit: what a header says costs nothing. torch's `to_empty`
    would do, but it imports symbolic shapes.
    """
    model = build_shapes(spec, num_classes=num_classes, sampling=sampling, rounding=rounding)
    check_fit(model, state, source=source)
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))  # type: ignore[no-untyped-call]
    model.load_state_dict(dict(state))
    return model


def check_fit(model: RTDETR, state: Mapping[str, Tensor], *, source: str, hint: str = LOADABLE_HINT) -> None:
    """Check that a state dict has exactly the model's names and shapes.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; the first three are named.
    """
    expected = model.state_dict()
    problems = [f"{n} is missing" for n in expected if n not in state]
    problems += [f"{n} is not part of the model" for n in state if n not in expected]
    problems += [
        f"{n} has shape {tuple(state[n].shape)} where the model has {tuple(expected[n].shape)}"
        for n in expected
        if n in state and expected[n].shape != state[n].shape
    ]
    problems += [
        f"{n} has the type {state[n].dtype} where the model has {expected[n].dtype}"
        for n in expected
        if n in state and expected[n].is_floating_point() != state[n].is_floating_point()
    ]
    if problems:
        rest = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{source} does not fit the model: {', '.join(problems[:3])}{rest}", hint=hint, code="model-misfit"
        )
