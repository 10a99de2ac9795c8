from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rtdetr_cli.model.decoder import anchor_table
from rtdetr_cli.model.detector import RTDETR


@pytest.mark.parametrize(("side", "invalid"), [(320, 0), (480, 236), (640, 316), (800, 592)])
def test_published_number_of_invalid_anchors(side: int, invalid: int) -> None:
    anchors = anchor_table([(side // s, side // s) for s in (8, 16, 32)])
    assert int((~anchors.valid).sum()) == invalid
    assert anchors.logits.isfinite().all()
    beyond = anchors.logits.expand(-1, -1, 4)[~anchors.valid.expand(-1, -1, 4)]
    assert (torch.sigmoid(beyond) == 1).all()


def test_anchors_of_rectangles_are_centred_in_their_cells() -> None:
    anchors = anchor_table([(2, 4)])
    boxes = torch.sigmoid(anchors.logits[0]).reshape(2, 4, 4)
    assert boxes[0, :, 0].tolist() == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=1e-6)
    assert boxes[:, 0, 1].tolist() == pytest.approx([0.25, 0.75], abs=1e-6)
    assert boxes[..., 2:].flatten().tolist() == pytest.approx([0.05] * 16, abs=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_output_after_a_layer_equals_its_output_in_training(make_small: Callable[..., RTDETR], layers: int) -> None:
    model = make_small().double()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    model.set_inference(layers=layers)
    with torch.no_grad():
        left = model(images).main
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        outputs = model(images)
    full = [*outputs.aux, outputs.main][layers - 1]
    assert torch.allclose(left.logits, full.logits, atol=1e-12)
    assert torch.allclose(left.boxes_cxcywh, full.boxes_cxcywh, atol=1e-12)


def test_fewer_queries_are_the_best_tokens(make_small: Callable[..., RTDETR]) -> None:
    model = make_small()
    model.set_inference(queries=7)
    assert model(torch.rand(1, 3, 64, 64)).main.logits.shape == (1, 7, 5)
    content = []
    model.decoder.decoder.layers[0].register_forward_pre_hook(lambda _, args: content.append(args[0]))
    images = torch.rand(1, 3, 64, 64)
    model(images)
    model.set_inference(queries=20)
    model(images)
    assert torch.equal(content[0], content[1][:, :7])


def test_look_forward_twice_reaches_one_layer_back_only(make_small: Callable[..., RTDETR]) -> None:
    model = make_small().train()
    outputs = model(torch.rand(1, 3, 64, 64))
    outputs.main.boxes_cxcywh.sum().backward()
    heads = model.decoder.dec_bbox_head
    reached = [float(h.layers[2].bias.grad.abs().sum()) if h.layers[2].bias.grad is not None else 0.0 for h in heads]
    assert reached[0] == 0
    assert reached[1] > 0
    assert reached[2] > 0


def test_published_anchors_are_used_at_their_size_and_in_eval_only(make_small: Callable[..., RTDETR]) -> None:
    model = make_small()
    images = torch.rand(1, 3, 64, 64)
    before = model(images).main
    shapes = [(8, 8), (4, 4), (2, 2)]
    own = anchor_table(shapes)
    drifted = torch.where(own.valid, own.logits + 0.05, torch.inf)
    model.decoder.use_published_anchors(shapes, drifted, own.valid)
    after = model(images).main
    assert not torch.allclose(before.boxes_cxcywh, after.boxes_cxcywh)
    assert after.boxes_cxcywh.isfinite().all()
    assert not any("anchors" in name for name in model.state_dict())
