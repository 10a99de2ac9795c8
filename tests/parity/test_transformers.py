"""Compare with an independent implementation, RT-DETRv2 of the transformers library, with random weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train.losses import compute_losses

transformers = pytest.importorskip("transformers")

CLASSES = 5
SPEC = ModelSpec(
    depth=18, width=16, hidden_dim=64, encoder_ffn=96, expansion=0.5, heads=4, decoder_dim=32, decoder_ffn=48,
    decoder_layers=3, eval_layers=3, num_points=(4, 4, 4), queries=30, denoising=0,
)  # fmt: skip

# From a name in transformers (left) to ours (right), applied in order.
NAMES = [
    (r"^model\.backbone\.model\.embedder\.embedder\.(\d)\.", lambda m: f"backbone.conv1.conv1_{int(m[1]) + 1}."),
    (r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d)\.", r"backbone.res_layers.\1.blocks.\2."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.layer\.(\d)\.", lambda m: f".branch2{'abc'[int(m[1])]}."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d)\.0\.", r"\1.input_proj.\2.conv."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d)\.1\.", r"\1.input_proj.\2.norm."),
    (r"^model\.encoder\.aifi\.", "encoder.encoder."),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^(encoder\..*)self_attn_layer_norm", r"\1norm1"),
    (r"^(encoder\..*)final_layer_norm", r"\1norm2"),
    (r"^(decoder\..*)self_attn_layer_norm", r"\1norm1"),
    (r"encoder_attn_layer_norm", "norm2"),
    (r"^(decoder\..*)final_layer_norm", r"\1norm3"),
    (r"encoder_attn\.n_points_scale", "cross_attn.num_points_scale"),
    (r"encoder_attn\.", "cross_attn."),
    (r"mlp\.fc(\d)\.", r"linear\1."),
    (r"self_attn\.o_proj", "self_attn.out_proj"),
    (r"^model\.decoder\.class_embed\.", "decoder.dec_score_head."),
    (r"^model\.decoder\.bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^model\.decoder\.", "decoder."),
    (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^model\.(enc_|denoising)", r"decoder.\1"),
    (r"^model\.encoder\.", "encoder."),
]


def carried(theirs: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors, and concatenate the three projections of each self-attention."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in theirs.items():
        if name.startswith(("class_embed", "bbox_embed")):
            continue  # duplicates of other tensors
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if found := re.fullmatch(r"(.*self_attn\.)([qkv])_proj\.(weight|bias)", name):
            parts.setdefault(f"{found[1]}in_proj_{found[3]}", {})[found[2]] = tensor
        else:
            state[name] = tensor
    state |= {name: torch.cat([p["q"], p["k"], p["v"]]) for name, p in parts.items()}
    unused = "decoder.denoising_class_embed.weight"  # transformers has none without denoising
    state[unused] = wanted[unused]
    assert state.keys() == wanted.keys()
    return state


def pair(method: str = "default") -> tuple[torch.nn.Module, RTDETR]:
    """Return their model and ours with the same random weights, in float64."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrV2Config(
        backbone_config=backbone, encoder_in_channels=[32, 64, 128], encoder_hidden_dim=64, encoder_ffn_dim=96,
        encoder_attention_heads=4, hidden_expansion=0.5, d_model=32, decoder_in_channels=[64, 64, 64],
        decoder_ffn_dim=48, decoder_attention_heads=4, decoder_layers=3, num_queries=30, num_labels=CLASSES,
        num_denoising=0, freeze_backbone_batch_norms=False, decoder_method=method,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.RTDetrV2ForObjectDetection(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and "n_points_scale" not in name:
                spread = 1.0 if "sampling_offsets.bias" in name else 0.5 / max(1, tensor[0].numel()) ** 0.5
                centre = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
                tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    ours = build_detector(SPEC, num_classes=CLASSES, sampling="discrete" if method == "discrete" else "bilinear")
    ours.load_state_dict(carried(theirs.state_dict(), ours.state_dict()))
    return theirs.double(), ours.double()


@pytest.mark.parametrize(
    ("height", "width", "method"),
    [(96, 96, "default"), (96, 160, "default"), (160, 64, "default"), (96, 96, "discrete")],
)
def test_forward(height: int, width: int, method: str) -> None:
    theirs, ours = pair(method)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=images)
        got = ours.eval()(images).main
    # transformers computes the float32 position table in another order.
    assert torch.allclose(got.logits, expected.logits, rtol=0, atol=1e-5)
    assert torch.allclose(got.boxes_cxcywh, expected.pred_boxes, rtol=0, atol=1e-5)


def test_losses() -> None:
    theirs, ours = pair()
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    boxes = [
        torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.25, 0.15]], dtype=torch.float64),
        torch.tensor([[0.5, 0.5, 0.6, 0.4]], dtype=torch.float64),
    ]
    labels = [torch.tensor([1, 3]), torch.tensor([4])]
    targets = [{"class_labels": one, "boxes": box} for one, box in zip(labels, boxes, strict=True)]
    expected = theirs.train()(pixel_values=images, labels=targets)
    terms = compute_losses(ours.train()(images), boxes, labels, num_boxes=3.0)
    # transformers counts the encoder's output as one more auxiliary layer, as v1 did.
    renamed = {name.replace("_enc_0", "_aux_2"): value.item() for name, value in terms.items()}
    assert renamed.keys() == expected.loss_dict.keys()
    for name, value in expected.loss_dict.items():
        assert renamed[name] == pytest.approx(value.item(), rel=1e-5), name
    torch.stack(list(terms.values())).sum().backward()
    expected.loss.backward()
    # Only of the last layer: transformers does not pass the gradient of a box to the layer before it.
    gradient = {n: p.grad for n, p in ours.named_parameters()}
    last = theirs.model.decoder.layers[2]
    for name, parameter in [
        ("decoder.decoder.layers.2.linear1.weight", last.mlp.fc1.weight),
        ("decoder.decoder.layers.2.cross_attn.sampling_offsets.weight", last.encoder_attn.sampling_offsets.weight),
        ("decoder.dec_bbox_head.2.layers.0.weight", theirs.model.decoder.bbox_embed[2].layers[0].weight),
        ("decoder.enc_bbox_head.layers.0.weight", theirs.model.enc_bbox_head.layers[0].weight),
    ]:
        assert gradient[name].norm().item() == pytest.approx(parameter.grad.norm().item(), rel=1e-4), name
