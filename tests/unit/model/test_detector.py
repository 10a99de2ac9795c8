from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from rtdetr_cli.errors import UsageError
from rtdetr_cli.model.denoising import draw_denoising
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train.losses import compute_losses


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 96), (64, 64), (96, 224), (160, 32)])
def test_any_multiple_of_32_works_also_with_fewer_tokens_than_queries(
    make_small: Callable[..., RTDETR], height: int, width: int
) -> None:
    model = make_small(queries=60)
    tokens = sum((height // s) * (width // s) for s in (8, 16, 32))
    main = model(torch.rand(2, 3, height, width)).main
    assert main.logits.shape == (2, min(60, tokens), 5)
    assert main.boxes_cxcywh.shape == (2, min(60, tokens), 4)
    assert ((main.boxes_cxcywh >= 0) & (main.boxes_cxcywh <= 1)).all()
    boxes, labels = [torch.rand(3, 4) * 0.3 + 0.3] * 2, [torch.tensor([0, 1, 4])] * 2
    group = draw_denoising(boxes, labels, num_classes=5, queries=60, generator=torch.Generator().manual_seed(0))
    outputs = model.train()(torch.rand(2, 3, height, width), group)
    assert outputs.main.logits.shape[1] == min(60, tokens)
    assert all(o.logits.shape[1] == group.size for o in outputs.denoising)


def test_sides_must_be_multiples_of_32(make_small: Callable[..., RTDETR]) -> None:
    with pytest.raises(UsageError, match="64x100") as error:
        make_small()(torch.rand(1, 3, 64, 100))
    assert "64x96" in error.value.hint


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 25)])
@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_every_parameter_gets_a_gradient_whatever_is_in_the_images(
    make_small: Callable[..., RTDETR], counts: tuple[int, int], sampling: str
) -> None:
    model = make_small().train()
    model.set_sampling(sampling)
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.rand(n, 4, generator=generator) * 0.3 + 0.3 for n in counts]
    labels = [torch.randint(5, (n,), generator=generator) for n in counts]
    group = draw_denoising(boxes, labels, num_classes=5, queries=20, generator=generator)
    terms = compute_losses(model(torch.rand(2, 3, 64, 64), group), boxes, labels, num_boxes=sum(counts))
    torch.stack(list(terms.values())).sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_fused_copy_computes_the_same_and_cannot_be_trained(make_small: Callable[..., RTDETR], sampling: str) -> None:
    model = make_small().double()
    model.set_sampling(sampling)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    expected = model(images).main
    names = list(model.state_dict())
    deployed = model.fuse()
    got = deployed(images).main
    assert torch.allclose(got.logits, expected.logits, atol=1e-9)
    assert torch.allclose(got.boxes_cxcywh, expected.boxes_cxcywh, atol=1e-9)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for n, p in model.named_parameters() if sampling == "bilinear")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.modules())
    assert not any(p.requires_grad for p in deployed.parameters())
    deployed.set_inference(layers=1, queries=5)
    assert deployed(images).main.logits.shape == (2, 5, 5)
    with pytest.raises(RuntimeError, match="fused"):
        deployed.train()


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"layers": 4}, {"queries": 0}, {"queries": 21}])
def test_inference_settings_must_exist(make_small: Callable[..., RTDETR], wrong: dict[str, int]) -> None:
    model = make_small()
    with pytest.raises(UsageError) as caught:
        model.set_inference(**wrong)
    assert caught.value.hint in ("--layers 1 to 3", "--queries 1 to 20")
    assert (model.layers, model.queries) == (3, 20)


def test_training_after_inference_mode_and_after_a_copy(make_small: Callable[..., RTDETR]) -> None:
    model = make_small()
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        model(images)
    model.train()
    model(images).main.logits.sum().backward()
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(images).main.logits, model.eval()(images).main.logits)


def test_bfloat16_autocast_trains_and_boxes_stay_float32(make_small: Callable[..., RTDETR]) -> None:
    model = make_small().train()
    boxes, labels = [torch.rand(3, 4) * 0.3 + 0.3], [torch.tensor([0, 1, 4])]
    group = draw_denoising(boxes, labels, num_classes=5, queries=20, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.rand(1, 3, 64, 64), group)
        terms = compute_losses(outputs, boxes, labels, num_boxes=3)
    assert outputs.main.boxes_cxcywh.dtype == torch.float32
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())
    torch.stack(list(terms.values())).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_runs(make_small: Callable[..., RTDETR], dtype: torch.dtype) -> None:
    model = make_small().requires_grad_(False)
    images = torch.rand(1, 3, 64, 64)
    expected = model(images).main
    got = model.to(dtype)(images.to(dtype)).main
    assert got.boxes_cxcywh.dtype == torch.float32
    assert got.logits.float().amax().item() == pytest.approx(expected.logits.amax().item(), abs=0.5)


def test_exported_graph_contains_constants(make_small: Callable[..., RTDETR]) -> None:
    model = make_small().fuse()
    model.set_sampling("discrete")
    model.eval()(torch.zeros(1, 3, 64, 96))  # computes the constants of this size
    program = torch.export.export(Main(model), (torch.rand(1, 3, 64, 96),))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not operators & {"aten.nonzero.default", "aten.sin.default", "aten.grid_sampler_2d.default"}
    assert not any("isnan" in o or "isinf" in o for o in operators)
    assert sum(str(n.target) == "aten.index_select.default" for n in program.graph.nodes) == 3  # one per layer
    for constant in program.constants.values():
        if isinstance(constant, torch.Tensor) and constant.is_floating_point():
            assert constant.isfinite().all()


class Main(torch.nn.Module):
    """A model with tensors as outputs, for tracing."""

    def __init__(self, model: RTDETR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        main = self.model(images).main
        return main.logits, main.boxes_cxcywh
