"""Start a model from other weights: transfer what fits, class by class, and keep the initial values elsewhere.

Only the score heads and the embedding of denoising labels depend on the classes. A class takes its row in them from
the source's class of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.architecture import has_backbone
from rtdetr_cli.weights.load import check_fit
from rtdetr_cli.weights.published import read_published

_BATCH_COUNTER = "num_batches_tracked"
_PER_POINT = ("cross_attn.sampling_offsets.", "cross_attn.attention_weights.", "cross_attn.num_points_scale")
_PER_CLASS = ("decoder.enc_score_head.", "decoder.dec_score_head.", "decoder.denoising_class_embed.")
_MISFIT_HINT = "train without --preset and --set model.*, so that rtdetr takes the architecture from the weights"


@dataclass(frozen=True, slots=True)
class ClassRow:
    """The source of one class: its name and label there, or None when the class was reinitialized."""

    name: str
    source_name: str | None
    source_label: int | None


@dataclass(frozen=True, slots=True)
class TransferTable:
    """The result of a transfer: the source of each class, numbers of tensors, and names of special ones."""

    classes: tuple[ClassRow, ...]
    tensors_loaded: int  # as they are
    tensors_total: int  # of the model
    by_class: tuple[str, ...]  # transferred class by class
    reinitialized: tuple[str, ...] = ()  # kept their initial values


def transfer_weights(
    model: RTDETR,
    state: Mapping[str, Tensor],
    *,
    source_names: Sequence[str],
    target_names: Sequence[str],
    source: str = "the weights",
) -> TransferTable:
    """Fill an initialized model from the tensors of another, under the names of RT-DETRv2; names are in label order.

    All tensors that do not depend on the classes must fit, except those of another number of sampling points, which
    keep their initial values. Class names are compared without case, spaces, `-` and `_`; of equal names in the
    source, the first counts.

    Raises:
        ModelError: the source has another architecture.
    """
    initial = model.state_dict()
    labels = {_normalized(name): label for label, name in reversed(list(enumerate(source_names)))}
    rows = []
    for name in target_names:
        label = labels.get(_normalized(name))
        rows.append(ClassRow(name, None if label is None else source_names[label], label))
    pairs = {i: row.source_label for i, row in enumerate(rows) if row.source_label is not None}
    target_labels, source_labels = list(pairs), list(pairs.values())
    same_classes = [_normalized(n) for n in source_names] == [_normalized(n) for n in target_names]
    by_class = () if same_classes else tuple(n for n in initial if n.startswith(_PER_CLASS))

    # What is missing or misshapen here is reported by check_fit, all of it at once.
    merged = {n: t for n, t in state.items() if n in initial or not n.endswith(_BATCH_COUNTER)}
    reinitialized = []
    for name, tensor in initial.items():
        if name not in state:
            if name.endswith(_BATCH_COUNTER):  # a frozen norm counts no batches
                merged[name] = tensor
        elif any(part in name for part in _PER_POINT) and _other_points(name, state, initial):
            merged[name] = tensor
            reinitialized.append(name)
        elif name in by_class and state[name].shape[1:] == tensor.shape[1:]:
            filled = tensor.detach().cpu().clone()
            filled[target_labels] = state[name].to(filled.dtype)[source_labels]
            merged[name] = filled
    check_fit(model, merged, source=source, hint=_MISFIT_HINT)
    model.load_state_dict(merged)
    return TransferTable(
        classes=tuple(rows),
        tensors_loaded=len(initial) - len(reinitialized) - len(by_class),
        tensors_total=len(initial),
        by_class=by_class,
        reinitialized=tuple(reinitialized),
    )


def _other_points(name: str, state: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> bool:
    """Return whether the points per level differ: 2, 4, 6 and 4, 4, 4 give tensors of the same shape."""
    scale = name.partition("cross_attn.")[0] + "cross_attn.num_points_scale"
    if state[name].shape != initial[name].shape:
        return True
    return scale in state and not torch.allclose(state[scale].float().cpu(), initial[scale].float().cpu(), atol=1e-3)


def _normalized(name: str) -> str:
    return "".join(c for c in name.casefold() if c not in " -_")


def load_backbone(model: RTDETR, path: Path) -> TransferTable:
    """Fill the backbone from a published ImageNet file, or from the backbone inside a detector's file.

    Raises:
        ModelError: the file holds neither, or a backbone of another architecture.
    """
    file = read_published(path)
    prefix = "" if file.spec is None else "backbone."
    source = {n.removeprefix(prefix): t for n, t in file.state.items() if n.startswith(prefix)}
    initial = model.backbone.state_dict()
    misfits = [
        name
        for name in {**initial, **source}
        if not name.endswith(_BATCH_COUNTER)
        and (name not in source or name not in initial or initial[name].shape != source[name].shape)
    ]
    if misfits:
        fitting = [f"--preset {n}" for n in preset_names() if has_backbone(load_preset(n).model, source)]
        raise ModelError(
            f"{path} has the backbone of another model: {len(misfits)} tensors do not fit, such as {misfits[0]}",
            hint=" or ".join(fitting) or "rtdetr weights list shows the backbone of each preset",
            code="model-misfit",
        )
    loaded = {n: source[n] for n in initial if n in source}
    model.backbone.load_state_dict({**initial, **loaded})
    names = list(model.state_dict())
    return TransferTable(
        classes=(),
        tensors_loaded=len(loaded),
        tensors_total=len(names),
        by_class=(),
        reinitialized=tuple(n for n in names if n.removeprefix("backbone.") not in initial),
    )
