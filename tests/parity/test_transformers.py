"""Compare with an independent implementation, RT-DETRv2 of the transformers library, with random weights."""

from __future__ import annotations

import pytest
import torch

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train.losses import compute_losses
from rtdetr_cli.weights.names import from_transformers

transformers = pytest.importorskip("transformers")

CLASSES = 5
SPEC = ModelSpec(
    depth=18, width=16, hidden_dim=64, encoder_ffn=96, expansion=0.5, heads=4, decoder_dim=32, decoder_ffn=48,
    decoder_layers=3, eval_layers=3, num_points=(4, 4, 4), queries=30, denoising=0,
)  # fmt: skip


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
    wanted = ours.state_dict()
    state = from_transformers(theirs.state_dict(), wanted)
    unused = "decoder.denoising_class_embed.weight"  # transformers has none without denoising
    ours.load_state_dict({unused: wanted[unused], **state})
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
