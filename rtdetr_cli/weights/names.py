"""Names of tensors in the files of each maker, and ours, which are those of the official RT-DETRv2.

The official code of RT-DETR v1 names a few layers by number; its HGNetv2 says `bn` for `norm`. In transformers the
network is arranged differently, and query, key and value of a self-attention are separate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]

# Where a name differs: a pattern of what precedes it, the official name, and ours.
_HGNET = (
    (r"(?:backbone\.)?(?:stem|stages)\..*", "bn", "norm"),
    (r"(?:backbone\.)?stem\.stem2[ab]", "conv.1", "conv"),
)
_V1 = (
    (r"encoder\.input_proj\.\d+", "0", "conv"),
    (r"encoder\.input_proj\.\d+", "1", "norm"),
    (r"decoder\.enc_output", "0", "proj"),
    (r"decoder\.enc_output", "1", "norm"),
)
_OURS_TO_TRANSFORMERS: Rules = (
    (r"^(backbone\..*)\.short\.conv\.(conv|norm)\.", r"\1.shortcut.1.\2."),
    (r"^(backbone\..*)\.short\.(conv|norm)\.", r"\1.shortcut.\2."),
    (r"\.branch2a\.", ".layer.0."),
    (r"\.branch2b\.", ".layer.1."),
    (r"\.branch2c\.", ".layer.2."),
    (r"\.aggregation_squeeze_conv\.", ".aggregation.0."),
    (r"\.aggregation_excitation_conv\.", ".aggregation.1."),
    (r"^(backbone\..*)\.conv\.(weight)$", r"\1.convolution.\2"),
    (r"^(backbone\..*)\.norm\.", r"\1.normalization."),
    (r"^backbone\.conv1\.conv1_1\.", "model.backbone.model.embedder.embedder.0."),
    (r"^backbone\.conv1\.conv1_2\.", "model.backbone.model.embedder.embedder.1."),
    (r"^backbone\.conv1\.conv1_3\.", "model.backbone.model.embedder.embedder.2."),
    (r"^backbone\.res_layers\.(\d+)\.blocks\.", r"model.backbone.model.encoder.stages.\1.layers."),
    (r"^backbone\.stem\.", "model.backbone.model.embedder."),
    (r"^backbone\.stages\.", "model.backbone.model.encoder.stages."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.conv\.", r"model.\1_input_proj.\2.0."),
    (r"^(encoder|decoder)\.input_proj\.(\d+)\.norm\.", r"model.\1_input_proj.\2.1."),
    (r"^(encoder\.encoder|decoder\.decoder)(.*)\.norm1\.", r"\1\2.self_attn_layer_norm."),
    (r"^encoder\.encoder(.*)\.norm2\.", r"encoder.encoder\1.final_layer_norm."),
    (r"^decoder\.decoder(.*)\.norm2\.", r"decoder.decoder\1.encoder_attn_layer_norm."),
    (r"^decoder\.decoder(.*)\.norm3\.", r"decoder.decoder\1.final_layer_norm."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.cross_attn\.num_points_scale$", ".encoder_attn.n_points_scale"),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"^encoder\.", "model.encoder."),
    (r"^decoder\.decoder\.", "model.decoder."),
    (r"^decoder\.dec_score_head\.", "model.decoder.class_embed."),
    (r"^decoder\.dec_bbox_head\.", "model.decoder.bbox_embed."),
    (r"^decoder\.query_pos_head\.", "model.decoder.query_pos_head."),
    (r"^decoder\.enc_output\.proj\.", "model.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "model.enc_output.1."),
    (r"^decoder\.", "model."),
)
# transformers 5 has other names in memory than in its files, and a file may have been written with either.
_TRANSFORMERS_IN_FILES: Rules = (
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.fc([12])\.", r".fc\1."),
    (r"^model\.encoder\.aifi\.", "model.encoder.encoder."),
)
_HEAD_COPIES = ("class_embed.", "bbox_embed.")  # of `model.decoder.class_embed`, where a file has both
_PROJECTION = re.compile(r"(.*self_attn\.)in_proj_(weight|bias)")


def from_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of an official file under our names, and whether it is one of RT-DETR v1."""
    is_v1 = "decoder.enc_output.0.weight" in state
    rules = tuple((rf"^({stem})\.{re.escape(theirs)}\.", rf"\1.{ours}.") for stem, theirs, ours in _differences(is_v1))
    return {_translate(n, rules): t for n, t in state.items()}, is_v1


def to_official(state: Mapping[str, Tensor], *, v1: bool) -> dict[str, Tensor]:
    """Return the tensors under the names of the official code; v1 has no constants of the sampling points."""
    rules = tuple((rf"^({stem})\.{ours}\.", rf"\1.{theirs}.") for stem, theirs, ours in _differences(v1))
    return {_translate(n, rules): t for n, t in state.items() if not (v1 and n.endswith(".num_points_scale"))}


def _differences(v1: bool) -> tuple[tuple[str, str, str], ...]:
    return _HGNET + (_V1 if v1 else ())


def from_transformers(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a transformers file under our names.

    Those are the ones of `names`, all tensors of the model, that the file has. Any that belong to no model of ours
    keep their names.
    """
    left = {_translate(n, _TRANSFORMERS_IN_FILES): t for n, t in state.items()}
    left = {n: t for n, t in left.items() if not n.startswith(_HEAD_COPIES)}
    found: dict[str, Tensor] = {}
    for name in names:
        theirs = transformers_names(name)
        if all(n in left for n in theirs):
            parts = [left.pop(n) for n in theirs]
            found[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return found | left


def to_transformers(state: Mapping[str, Tensor], *, v1: bool) -> dict[str, Tensor]:
    """Return the tensors under the names that transformers reads and writes."""
    written: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = transformers_names(name)
        if v1 and name.endswith(".num_points_scale"):
            continue
        written |= dict(zip(theirs, tensor.chunk(3) if len(theirs) == 3 else (tensor,), strict=True))
    return written


def transformers_names(name: str) -> tuple[str, ...]:
    """Return the name in transformers of one of our tensors; three for the input projection of a self-attention."""
    if projection := _PROJECTION.fullmatch(name):
        stem, kind = projection.groups()
        return tuple(_translate(f"{stem}{letter}_proj.{kind}", _OURS_TO_TRANSFORMERS) for letter in "qkv")
    return (_translate(name, _OURS_TO_TRANSFORMERS),)


def _translate(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
