"""Start a model from other weights: by class name where classes are shared, anew where they are not.

Only the tensors whose shape depends on the number of classes need care: the score heads of encoder and decoder, and
the embedding of denoising labels. A class keeps its row when the source knew it by the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.published import backbone_depth, load_strictly, read_published

_COUNTER = "num_batches_tracked"
_PER_POINT = ("cross_attn.sampling_offsets.", "cross_attn.attention_weights.", "cross_attn.num_points_scale")
_OTHER_HINT = "train without --preset and --set model.*: rtdetr takes the architecture from the weights"
_EMBEDDING = "decoder.denoising_class_embed.weight"


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Where one class's rows came from: the source's name and label, or None when they were made anew."""

    name: str
    source_name: str | None
    source_label: int | None


@dataclass(frozen=True, slots=True)
class TransferTable:
    """What came from where.

    Attributes:
        classes: one row for each class of the target.
        tensors_loaded: taken over whole.
        tensors_total: of the target.
        by_class: names of the tensors that were filled class by class.
        fresh: names of the tensors that were left as initialised.
    """

    classes: tuple[ClassRow, ...]
    tensors_loaded: int
    tensors_total: int
    by_class: tuple[str, ...]
    fresh: tuple[str, ...] = ()

    @property
    def matched(self) -> int:
        """Number of classes that the source knew."""
        return sum(row.source_label is not None for row in self.classes)


def transfer_weights(
    model: RTDETR,
    state: Mapping[str, Tensor],
    *,
    source_names: Sequence[str],
    target_names: Sequence[str],
    source: str = "the weights",
) -> TransferTable:
    """Fill a model from another's tensors.

    Tensors that do not depend on the classes must all fit, but for those of another number of sampling points, which
    stay as they are. Names are compared without regard to case, spaces, `-`
    and `_`; a name that comes twice in the source counts once, its first time.

    Args:
        model: the target, already initialised: what has no source stays as it is.
        state: the source's tensors under the published v2 names.
        source_names: its classes in label order.
        target_names: the model's classes in label order.
        source: what messages call it.

    Returns:
        Which class and which tensor came from where.

    Raises:
        ModelError: the two are different architectures.
    """
    own = model.state_dict()
    found: dict[str, int] = {}
    for label, name in enumerate(source_names):
        found.setdefault(_plain(name), label)
    rows = []
    for name in target_names:
        label_or_none = found.get(_plain(name))
        source_name = None if label_or_none is None else source_names[label_or_none]
        rows.append(ClassRow(name, source_name, label_or_none))
    pairs = [(i, row.source_label) for i, row in enumerate(rows) if row.source_label is not None]
    to = torch.tensor([i for i, _ in pairs], dtype=torch.int64)
    from_ = torch.tensor([j for _, j in pairs], dtype=torch.int64)

    merged: dict[str, Tensor] = {}
    by_class = [n for n in own if n.startswith(("decoder.enc_score_head.", "decoder.dec_score_head."))] + [_EMBEDDING]
    same_classes = [_plain(n) for n in source_names] == [_plain(n) for n in target_names]
    fresh = []
    for name, tensor in own.items():
        if name not in state:
            if name.endswith(_COUNTER):
                merged[name] = tensor  # a frozen norm counts no batches
            continue  # load_strictly names any other
        if any(part in name for part in _PER_POINT) and _other_points(name, state, own):
            merged[name] = tensor
            fresh.append(name)
            continue
        if name not in by_class or same_classes:
            merged[name] = state[name]
            continue
        if state[name].shape[1:] != tensor.shape[1:]:
            merged[name] = state[name]  # load_strictly refuses it along with all others
            continue
        filled = tensor.detach().cpu().clone()
        filled[to] = state[name].to(filled.dtype)[from_]
        merged[name] = filled
    merged.update({n: t for n, t in state.items() if n not in own and not n.endswith(_COUNTER)})
    load_strictly(model, merged, source=source, hint=_OTHER_HINT)
    return TransferTable(
        classes=tuple(rows),
        tensors_loaded=len(own) - len(fresh) - (0 if same_classes else len(by_class)),
        tensors_total=len(own),
        by_class=() if same_classes else tuple(by_class),
        fresh=tuple(fresh),
    )


def _other_points(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Tell whether a layer's points are others: 2, 4 and 6 make as many as 4, 4 and 4, but not the same."""
    scale = name.partition("cross_attn.")[0] + "cross_attn.num_points_scale"
    theirs, mine = state.get(scale), own[scale]
    if state[name].shape != own[name].shape:
        return True
    return theirs is not None and not torch.allclose(theirs.float().cpu(), mine.float().cpu(), atol=1e-3)


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c not in " -_")


def load_backbone(model: RTDETR, path: Path) -> TransferTable:
    """Fill the backbone from a published ImageNet file, or from the backbone inside a detector's file.

    Raises:
        ModelError: the file is no such thing, or of another depth.
    """
    file = read_published(path)
    prefix = "" if file.spec is None else "backbone."
    source = {n.removeprefix(prefix): t for n, t in file.state.items() if n.startswith(prefix)}
    backbone: ResNet = model.backbone
    own = backbone.state_dict()
    counters = {n for n in {*own, *source} if n.endswith(_COUNTER)}
    missing = [n for n in own if n not in source and n not in counters]
    left = [n for n in source if n not in own and n not in counters]
    other = [n for n in own if n in source and own[n].shape != source[n].shape]
    if missing or left or other:
        named = (missing + left + other)[0]
        raise ModelError(
            f"{path} is the backbone of another model: {len(missing) + len(left) + len(other)} tensors do not fit, "
            f"such as {named}",
            hint=_presets_with(source),
            code="model-misfit",
        )
    loaded = {n: source[n] for n in own if n in source}
    backbone.load_state_dict({**own, **loaded})
    whole = model.state_dict()
    names = {f"backbone.{n}" for n in own}
    return TransferTable(
        classes=(),
        tensors_loaded=len(loaded),
        tensors_total=len(whole),
        by_class=(),
        fresh=tuple(n for n in whole if n not in names),
    )


def _presets_with(backbone: Mapping[str, Tensor]) -> str:
    """Return the presets that have this backbone, as a hint."""
    try:
        depth, width = backbone_depth(backbone), len(backbone["conv1.conv1_3.conv.weight"])
    except (ValueError, KeyError):
        depth, width = 0, 0
    models = {name: load_preset(name).model for name in preset_names()}
    found = [f"--preset {name}" for name, model in models.items() if (model.depth, model.width) == (depth, width)]
    return " or ".join(found) or "rtdetr weights list names the backbone of each preset"
