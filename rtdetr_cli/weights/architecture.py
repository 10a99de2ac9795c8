"""Derive an architecture from the names and shapes of its tensors, which are all that a published file holds."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.config.validation import validate
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.model.backbone import resnet_depth
from rtdetr_cli.model.hgnet import SIZES
from rtdetr_cli.weights.header import ModelHeader

# Sizes that give no tensor its shape: training settings, and what `transfer_weights` reinitializes.
FREE_SIZES = frozenset({
    "freeze_at", "freeze_norm", "num_points", "eval_layers", "queries", "denoising", "label_noise", "box_noise",
})  # fmt: skip


def size_differences(one: ModelSpec, other: ModelSpec) -> dict[str, tuple[object, object]]:
    """Return the sizes in which two architectures differ, without those that weights need not share."""
    first, second = ({**spec.model_dump(), "depth_mult": round(3 * spec.depth_mult) / 3} for spec in (one, other))
    return {k: (first[k], second[k]) for k in first if k not in FREE_SIZES and first[k] != second[k]}


def matching_preset(spec: ModelSpec) -> str:
    """Return the name of the preset with exactly these sizes, or ""."""
    return next((name for name in preset_names() if not size_differences(load_preset(name).model, spec)), "")


def has_backbone(spec: ModelSpec, state: Mapping[str, Tensor]) -> bool:
    """Return whether tensors, named without the prefix `backbone.`, are those of the architecture's backbone."""
    try:
        found = derive_backbone(state)
    except (KeyError, ValueError, IndexError):
        return False
    return all(getattr(spec, name) == value for name, value in found.items() if name not in FREE_SIZES)


def derive_backbone(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the backbone's fields of `ModelSpec` from its tensors, named without the prefix `backbone.`.

    Raises:
        KeyError, ValueError: it is no backbone that this package has.
    """
    norm = "conv1.conv1_1.norm" if "conv1.conv1_1.conv.weight" in state else "stem.stem1.norm"
    frozen = f"{norm}.num_batches_tracked" not in state
    fields: dict[str, object] = {"freeze_at": 0 if frozen else -1, "freeze_norm": frozen}
    if norm.startswith("stem"):
        blocks = tuple(count_modules(state, rf"stages\.{i}\.blocks\.(\d+)\.") for i in range(4))
        names = [n for n, sizes in SIZES.items() if sizes.blocks == blocks]
        if not names:
            raise ValueError(f"no HGNetv2 has {blocks} blocks")
        outputs = state["stages.3.blocks.0.aggregation_excitation_conv.conv.weight"].shape[0]
        return fields | {"backbone": names[0], "width": 64 * outputs // SIZES[names[0]].out_channels[3]}
    blocks = tuple(count_modules(state, rf"res_layers\.{i}\.blocks\.(\d+)\.") for i in range(4))
    depth = resnet_depth(blocks, bottleneck=any(".branch2c." in n for n in state))
    return fields | {"backbone": "resnet", "depth": depth, "width": state["conv1.conv1_3.conv.weight"].shape[0]}


def derive_spec(state: Mapping[str, Tensor]) -> ModelSpec:
    """Return the architecture of a detector from its tensors, under our names.

    Raises:
        KeyError, IndexError, ValueError, ZeroDivisionError: it is no RT-DETR.
    """
    backbone = derive_backbone({n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")})
    hidden = state["encoder.input_proj.0.conv.weight"].shape[0]
    layer = "decoder.decoder.layers.0."
    layers = count_modules(state, r"decoder\.decoder\.layers\.(\d+)\.")
    weights = state[layer + "cross_attn.attention_weights.weight"]
    points = _points_per_level(state, weights.shape[0])
    expansion = state["encoder.fpn_blocks.0.conv1.conv.weight"].shape[0] / hidden
    # r50m trains six layers and uses three; only its narrow fusion blocks tell it from r50.
    is_r50m = backbone.get("depth") == 50 and layers == 6 and expansion == 0.5
    return ModelSpec(
        **backbone,
        hidden_dim=hidden,
        encoder_ffn=state["encoder.encoder.0.layers.0.linear1.weight"].shape[0],
        encoder_layers=count_modules(state, r"encoder\.encoder\.0\.layers\.(\d+)\."),
        expansion=expansion,
        depth_mult=count_modules(state, r"encoder\.fpn_blocks\.0\.bottlenecks\.(\d+)\.") / 3,
        heads=weights.shape[0] // sum(points),
        decoder_dim=weights.shape[1],
        decoder_ffn=state[layer + "linear1.weight"].shape[0],
        decoder="deim" if "decoder.query_pos_head.layers.2.weight" in state else "rtdetrv2",
        decoder_layers=layers,
        eval_layers=3 if is_r50m else layers,
        num_points=points,
    )


def point_scales(spec: ModelSpec) -> dict[str, Tensor]:
    """Return the constants of the sampling points, which files of v1 lack."""
    scale = torch.tensor([1 / n for n in spec.num_points for _ in range(n)])
    return {f"decoder.decoder.layers.{i}.cross_attn.num_points_scale": scale for i in range(spec.decoder_layers)}


def count_modules(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return the number of modules in a list, from the largest index that `pattern` captures in the names."""
    indices = [int(m[1]) for n in state if (m := re.match(pattern, n))]
    return max(indices, default=-1) + 1


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


def checked_spec(header: ModelHeader, source: str) -> ModelSpec:
    """Return the architecture that a header states, with the layers and queries that it has at least.

    Raises:
        ModelError: no such model exists.
    """
    try:
        spec = validate(ModelSpec, header.architecture, source="the architecture in the header")
    except UsageError as error:
        raise ModelError(f"{source} cannot be loaded: {error.message}", code="model-header") from error
    problems = {
        "it has no classes": not header.names,
        f"it uses {header.layers} decoder layers of {spec.decoder_layers}": header.layers > spec.decoder_layers,
        f"it uses {header.queries} queries of {spec.queries}": header.queries > spec.queries,
    }
    if wrong := [problem for problem, found in problems.items() if found]:
        raise ModelError(f"the header of {source} is wrong: {'; '.join(wrong)}", code="model-header")
    return spec
