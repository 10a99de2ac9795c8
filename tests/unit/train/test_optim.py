"""Parameter groups, the optimizer step, the moving average, norm statistics."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from rtdetr_cli.config.presets import load_preset
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.train.muon import is_hidden_matrix, orthogonalize
from rtdetr_cli.train.optim import FusedOptimizer, MovingAverage, NormStatistics, parameter_groups

# The official lists: regular expressions over names with the (rate, decay) they give; all others have lr and decay.
PUBLISHED: dict[str, list[tuple[str, str, bool]]] = {
    "r18": [(r"^(?=.*(?:norm|bn)).*$", "lr", False)],
    "r34": [
        (r"^(?=.*backbone)(?!.*norm|bn).*$", "backbone", True),
        (r"^(?=.*backbone)(?=.*norm|bn).*$", "backbone", False),
        (r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn|bias)).*$", "lr", False),
    ],
    "r50m": [
        (r"^(?=.*backbone)(?!.*norm).*$", "backbone", True),
        (r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$", "lr", False),
    ],
    "r101": [
        (r"^(?=.*backbone)(?!.*norm|bn).*$", "backbone", True),
        (r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$", "lr", False),
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_groups_equal_the_official_ones(name: str) -> None:
    preset = load_preset(name)
    optim = preset.optim
    with torch.device("meta"):
        model = build_detector(preset.model, num_classes=80)
    groups = parameter_groups(model, optim, lr=optim.lr, lr_backbone=optim.lr_backbone)
    ours = {n: (g["lr"], g["weight_decay"]) for g in groups for n in g["names"]}
    expected = {}
    for parameter, value in model.named_parameters():
        if not value.requires_grad:
            continue
        rule = next(((r, d) for pattern, r, d in PUBLISHED[name] if re.findall(pattern, parameter)), ("lr", True))
        rate = optim.lr_backbone if rule[0] == "backbone" else optim.lr
        expected[parameter] = (rate, optim.weight_decay if rule[1] else 0.0)
    assert ours == expected


def test_frozen_parameters_are_left_out() -> None:
    preset = load_preset("tiny")
    model = build_detector(preset.model, num_classes=3)
    model.backbone.requires_grad_(False)
    groups = parameter_groups(model, preset.optim, lr=1e-3, lr_backbone=1e-4)
    assert not any(n.startswith("backbone") for g in groups for n in g["names"])
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


def test_muon_moves_the_matrices_of_hidden_layers_only() -> None:
    preset = load_preset("tiny")
    model = build_detector(preset.model, num_classes=80)
    groups = parameter_groups(model, preset.optim, lr=1e-3, lr_backbone=1e-3, muon=True)
    matrices = {name for g in groups if g["muon"] for name in g["names"]}
    assert {
        "backbone.conv1.conv1_1.conv.weight",  # first convolution
        "decoder.denoising_class_embed.weight",
        "decoder.enc_score_head.weight",
        "decoder.dec_score_head.2.weight",
        "decoder.dec_bbox_head.2.layers.2.weight",
        "decoder.query_pos_head.layers.0.weight",  # from four numbers
    }.isdisjoint(matrices)
    assert {
        "backbone.res_layers.3.blocks.0.branch2b.conv.weight",
        "encoder.encoder.0.layers.0.self_attn.in_proj_weight",
        "decoder.decoder.layers.2.cross_attn.sampling_offsets.weight",
        "decoder.dec_bbox_head.2.layers.1.weight",
    } <= matrices
    assert sum(model.get_parameter(name).numel() for name in matrices) > 0.95 * sum(
        p.numel() for p in model.parameters()
    )


def test_muon_leaves_depthwise_convolutions_to_adamw() -> None:
    assert not is_hidden_matrix("conv.weight", nn.Conv2d(64, 64, 5, groups=64).weight)
    assert is_hidden_matrix("conv.weight", nn.Conv2d(64, 64, 5).weight)


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_matrices_keep_their_directions(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """All singular values become about 1, and the singular vectors stay."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices, dtype=dtype)
    u, before, vt = torch.linalg.svd(matrices, full_matrices=False)
    clear = before > 0.05 * before.max()
    values = torch.linalg.svdvals(found)
    assert found.dtype == torch.float32
    assert values.max() < 1.25
    along = torch.diagonal(u.mT @ found @ vt.mT, dim1=-2, dim2=-1)
    assert along[clear].min() > 0.6


def test_a_step_of_muon_is_as_long_as_one_of_adam() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 64))
    groups = [
        {"params": [weight], "names": ["hidden.weight"], "lr": 1e-2, "weight_decay": 0.0, "muon": True},
        {"params": [nn.Parameter(torch.ones(1))], "names": ["bias"], "lr": 1e-2, "weight_decay": 0.0, "muon": False},
    ]
    optimizer = FusedOptimizer(groups, clip_norm=0.1)
    before = weight.detach().clone()
    for share in (1.0, 0.5):
        optimizer.set_rate(share)
        weight.grad = torch.randn(32, 64)
        optimizer.step(torch.zeros(()))
        length = (weight - before).square().mean().sqrt()
        assert 0.7 * share * 1e-2 < length < 1.2 * share * 1e-2
        before = weight.detach().clone()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    # No bias before the norm: its gradient is rounding only, which Adam turns into full steps.
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def groups_of(model: nn.Module, *, muon: bool = False) -> list[dict[str, object]]:
    """One group, or with `muon` one of matrices and one of the rest."""
    kinds = (False, True)
    parts = [[(n, p) for n, p in model.named_parameters() if (muon and p.ndim == 2) == kind] for kind in kinds]
    return [
        {
            "params": [p for _, p in part],
            "names": [n for n, _ in part],
            "lr": 1e-2,
            "weight_decay": 1e-2,
            "muon": matrix,
        }
        for matrix, part in zip(kinds, parts, strict=True)
        if part
    ]


def backward(model: nn.Module, factor: float = 1.0) -> torch.Tensor:
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    loss = model(x).square().sum() * factor
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_the_step_is_adamw_with_clipping_by_the_global_norm(factor: float) -> None:
    ours, reference = small_net(), small_net()
    optimizer = FusedOptimizer(groups_of(ours), clip_norm=0.1)
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=1e-2)
    for _ in range(4):
        loss = backward(ours, factor)
        found_inf, norm = optimizer.step(loss)
        optimizer.zero_grad()
        backward(reference, factor)
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        adamw.step()
        adamw.zero_grad()
        assert found_inf == 0
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-6)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("muon", [False, True])
def test_a_loss_scale_does_not_change_the_step(muon: bool) -> None:
    ours, reference = small_net(), small_net()
    scaled, plain = (
        FusedOptimizer(groups_of(ours, muon=muon), clip_norm=0.1, scaled=True),
        FusedOptimizer(groups_of(reference, muon=muon), clip_norm=0.1),
    )
    for _ in range(3):
        loss = backward(ours, float(scaled.scale)) / scaled.scale
        _, norm = scaled.step(loss)
        scaled.zero_grad()
        _, expected = plain.step(backward(reference))
        plain.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=1e-4, atol=1e-6)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("fault", ["gradient nan", "gradient inf", "loss"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_a_non_finite_step_changes_nothing(fault: str, scaled: bool, muon: bool) -> None:
    model = small_net()
    optimizer = FusedOptimizer(groups_of(model, muon=muon), clip_norm=0.1, scaled=scaled)
    optimizer.step(backward(model))
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    loss = backward(model)
    weight = next(model.parameters())
    if fault == "loss":
        loss = loss * float("nan")
    else:
        weight.grad[0, 0] = float(fault.split()[1])
    found_inf, _ = optimizer.step(loss)
    assert found_inf == 1
    for name, _parameter in model.named_parameters():
        assert torch.equal(model.state_dict()[name], before[name])
    for a, b in zip(optimizer.state_dict()["moments"], moments["moments"], strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(map(torch.equal, optimizer.state_dict()["momentum"], moments["momentum"]))
    assert len(moments["momentum"]) == (2 if muon else 0)
    assert float(optimizer.scale) == float(moments["scale"]) * (0.5 if scaled else 1)


def test_the_loss_scale_grows_after_many_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedOptimizer, "growth_interval", 3)
    model = small_net()
    optimizer = FusedOptimizer(groups_of(model), clip_norm=0.1, scaled=True)
    begun = float(optimizer.scale)
    for _ in range(3):
        optimizer.step(backward(model))
        optimizer.zero_grad()
    assert float(optimizer.scale) == 2 * begun


@pytest.mark.parametrize("muon", [False, True])
def test_a_loaded_optimizer_continues_exactly(muon: bool) -> None:
    ours, reference = small_net(), small_net()
    a, b = (FusedOptimizer(groups_of(model, muon=muon), clip_norm=0.1) for model in (ours, reference))
    for _ in range(2):
        b.step(backward(reference))
        b.zero_grad()
    ours.load_state_dict(reference.state_dict())
    a.load_state_dict(copy.deepcopy(b.state_dict()))
    for optimizer, model in ((a, ours), (b, reference)):
        optimizer.step(backward(model))
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), reference.parameters(), strict=True))


def test_a_parameter_without_gradient_does_not_change() -> None:
    model = small_net()
    optimizer = FusedOptimizer(groups_of(model), clip_norm=0.1)
    loss = backward(model)
    last = list(model.parameters())[-1]
    before = last.detach().clone()
    last.grad = None
    optimizer.step(loss)
    assert torch.equal(last, before)


class TestMovingAverage:
    def test_constant_tensors_do_not_drift(self) -> None:
        """The official multiply and add drifts by 2e-4 in 50,000 updates of constant tensors."""
        model = small_net()
        average = MovingAverage(model)
        for update in range(2000):
            average.update(0.1 / (1 + update))
        for key, value in model.state_dict().items():
            assert torch.equal(average.module.state_dict()[key], value), key

    def test_weights_and_running_statistics_are_averaged(self) -> None:
        model = small_net()
        average = MovingAverage(model)
        old = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        model[1].running_mean += 2
        average.update(0.25)
        for key in ("0.weight", "3.bias"):
            torch.testing.assert_close(average.module.state_dict()[key], old[key] + 0.25)
        torch.testing.assert_close(average.module.state_dict()["1.running_mean"], old["1.running_mean"] + 0.5)

    def test_infinite_buffers_are_left_alone_and_the_average_is_never_trained(self) -> None:
        model = small_net()
        model.register_buffer("anchors", torch.tensor([1.0, float("inf")]))
        average = MovingAverage(model)
        average.update(0.5)
        assert torch.equal(average.module.state_dict()["anchors"], model.state_dict()["anchors"])
        assert not average.module.training
        assert not any(p.requires_grad for p in average.module.parameters())


class TestNormStatistics:
    def test_a_forward_pass_is_undone(self) -> None:
        model = small_net().train()
        norms = NormStatistics(model)
        model(torch.randn(5, 6))
        before = copy.deepcopy(model.state_dict())
        norms.save()
        model(torch.randn(5, 6))
        assert not torch.equal(model.state_dict()["1.running_mean"], before["1.running_mean"])
        norms.restore()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    @pytest.mark.parametrize("bad", [0.0, 1.0])
    def test_a_forward_pass_is_undone_only_if_the_step_was_skipped(self, bad: float) -> None:
        model = small_net().train()
        norms = NormStatistics(model)
        norms.save()
        before = model[1].running_mean.clone()
        model(torch.full((5, 6), float("nan") if bad else 1.0))
        now = model[1].running_mean.clone()
        norms.restore_where(torch.tensor(bad))
        torch.testing.assert_close(model[1].running_mean, before if bad else now)
        assert torch.isfinite(model[1].running_mean).all()
