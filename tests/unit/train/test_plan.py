"""The plan of a run: a function of its length, or exactly the published values."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.train.plan import Plan, make_plan

LENGTHS = [200, 2_000, 200_000]


def plan_of(steps: int, **flags: Any) -> Plan:
    """Plan a run of so many steps: 10 an epoch."""
    config = resolve_run({"preset": "r18", "epochs": steps // 10, "effective_batch": 16, **flags})
    return make_plan(config, images=160)


def mean_age(plan: Plan) -> float:
    """Return the mean age, in steps, of what the moving average holds at the end."""
    age = 0.0
    for update in range(1, plan.total_steps + 1):
        age = (1 - plan.ema_weight(update)) * (age + 1)
    return age


@pytest.mark.parametrize("steps", LENGTHS)
def test_the_mean_age_of_the_moving_average_is_a_share_of_the_run(steps: int) -> None:
    plan = plan_of(steps)
    share = resolve_run({}).settings.ema_age
    assert mean_age(plan) == pytest.approx(share * steps, rel=0.02)


@pytest.mark.parametrize("steps", LENGTHS)
def test_while_it_grows_the_mean_age_is_a_share_of_the_steps_so_far(steps: int) -> None:
    plan = plan_of(steps)
    ramp = resolve_run({}).settings.ema_ramp
    until = int(plan.ema_age / ramp) // 2
    age = 0.0
    for update in range(1, until + 1):
        age = (1 - plan.ema_weight(update)) * (age + 1)
        assert age == pytest.approx(ramp * update, rel=0.01)


@pytest.mark.parametrize("steps", LENGTHS)
def test_the_moving_average_forgets_the_initial_weights(steps: int) -> None:
    """A run of 200 steps must not end with an average that still contains its random start."""
    plan = plan_of(steps)
    left = math.prod(1 - plan.ema_weight(u) for u in range(1, plan.total_steps + 1))
    assert left < 1e-3


@pytest.mark.parametrize("steps", LENGTHS)
def test_the_learning_rate_warms_up_stays_flat_and_decays(steps: int) -> None:
    plan = plan_of(steps)
    rates = [plan.rate(s) for s in range(0, steps, max(1, steps // 2000))]
    top = rates.index(1.0)
    assert plan.warmup_steps == min(2000, round(resolve_run({}).settings.warmup * steps))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert plan.rate(0) == pytest.approx(1 / plan.warmup_steps)
    assert plan.rate(steps - 1) == pytest.approx(plan.final_rate)
    assert all(0 < r <= 1 for r in rates)


def test_the_schedule_has_the_same_shape_at_any_length() -> None:
    """At the same share of its steps, a long run has the rate of a short one, except for the limit on warmup."""
    short, long = plan_of(2_000), plan_of(20_000)
    for share in (0.02, 0.3, 0.6, 0.8, 1.0):
        assert short.rate(round(2_000 * share) - 1) == pytest.approx(long.rate(round(20_000 * share) - 1), abs=2e-3)
    assert short.strong_until / short.epochs == long.strong_until / long.epochs


@pytest.mark.parametrize(
    ("batch", "factor"), [(16, 1.0), (8, 1.0), (1, 1.0), (32, math.sqrt(2)), (64, 2.0), (256, 2.0)]
)
def test_the_rate_rises_with_the_root_of_the_batch_up_to_a_factor_of_two(batch: int, factor: float) -> None:
    plan = plan_of(2_000, effective_batch=batch)
    assert plan.lr == pytest.approx(1e-4 * factor)


def test_a_given_rate_is_not_scaled() -> None:
    plan = make_plan(resolve_run({"preset": "r34", "lr": 3e-4, "effective_batch": 64}), images=500)
    assert plan.lr == 3e-4
    assert plan.lr_backbone == pytest.approx(1.5e-4), "the preset's share of lr"
    plan = make_plan(resolve_run({"preset": "r34", "lr": 3e-4, "lr_backbone": 1e-6}), images=500)
    assert plan.lr_backbone == 1e-6


@pytest.mark.parametrize(
    ("flags", "sets", "rates"),
    [
        ({}, [], (1e-3, 1e-3)),
        ({"lr": 3e-4}, [], (3e-4, 3e-4)),
        ({"lr_backbone": 3e-4}, [], (1e-3, 3e-4)),
        ({"effective_batch": 64}, [], (2e-3, 2e-3)),
        ({}, ["optim.lr=2e-4"], (2e-4, 5e-5)),
        ({}, ["optimizer=adamw"], (1e-4, 5e-5)),
        ({}, ["schedule=official"], (1e-4, 5e-5)),
        ({}, ["schedule=official", "optimizer=muon"], (1e-4, 5e-5)),
        ({"weights": "imagenet"}, ["optimizer=muon"], (1e-4, 5e-5)),
    ],
)
def test_muon_has_a_rate_of_its_own_from_random_weights(
    flags: dict[str, Any], sets: list[str], rates: tuple[float, float]
) -> None:
    plan = make_plan(resolve_run({"preset": "r34", "weights": "none", **flags}, sets=sets), images=500)
    assert (plan.lr, plan.lr_backbone) == pytest.approx(rates)


@pytest.mark.parametrize("name", preset_names())
def test_the_official_schedule_is_the_published_one(name: str) -> None:
    preset = load_preset(name)
    plan = make_plan(resolve_run({"preset": name}, sets=["schedule=official"]), images=118_287)
    assert plan.epochs == preset.official.epochs
    assert (plan.lr, plan.lr_backbone) == (preset.optim.lr, preset.optim.lr_backbone)
    assert plan.strong_until == preset.official.strong_augmentation_until
    assert plan.multi_scale_until == preset.official.multi_scale_until
    for step in (0, 999, 1999, 2000, plan.total_steps - 1):
        assert plan.rate(step) == min(1.0, (step + 1) / 2000)
    for update in (1, 100, 2000, 10_000):
        assert 1 - plan.ema_weight(update) == pytest.approx(0.9999 * (1 - math.exp(-update / 2000)), abs=1e-12)


def test_the_published_moving_average_can_be_shortened() -> None:
    sets = ["schedule=official", "official.ema_decay=0.99", "official.ema_warmup=100"]
    plan = make_plan(resolve_run({"preset": "r18"}, sets=sets), images=100)
    for update in (1, 100, 1000):
        assert 1 - plan.ema_weight(update) == pytest.approx(0.99 * (1 - math.exp(-update / 100)), abs=1e-12)


@pytest.mark.parametrize("preset", ["r18", "r101", "tiny"])
def test_short_runs_use_light_augmentation(preset: str) -> None:
    assert plan_of(200, preset=preset).augmentation == plan_of(500, preset=preset).augmentation == "light"
    assert plan_of(510, preset=preset).augmentation == plan_of(200_000, preset=preset).augmentation == "recipe"


def test_a_chosen_augmentation_is_used_at_any_length() -> None:
    assert plan_of(200, aug="recipe").augmentation == "recipe"
    assert plan_of(200_000, aug="none").augmentation == "none"
    official = resolve_run({"preset": "r18", "epochs": 2}, sets=["schedule=official"])
    assert make_plan(official, images=100).augmentation == "recipe"


def test_overfitting_uses_no_augmentation() -> None:
    plan = plan_of(200, overfit=4)
    assert (plan.augmentation, plan.strong_until, plan.multi_scale_until) == ("none", 0, 0)
    assert plan_of(200, overfit=4, aug="recipe").augmentation == "recipe"


def test_published_scales() -> None:
    plan = make_plan(resolve_run({"preset": "r50"}, sets=["schedule=official"]), images=1000)
    published = (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)
    assert plan.scales == tuple((s, s) for s in published)
    assert not make_plan(resolve_run({"preset": "r18"}, sets=["schedule=official"]), images=1000).multi_scale_until


def test_scales_keep_the_sides_in_proportion() -> None:
    plan = make_plan(resolve_run({"preset": "r50", "imgsz": (320, 640)}), images=1000)
    assert all(h % 32 == 0 and w % 32 == 0 for h, w in plan.scales)
    assert all(abs(w / h - 2) < 0.2 for h, w in plan.scales)


def test_other_epochs_keep_the_published_number_of_calm_epochs() -> None:
    plan = make_plan(resolve_run({"preset": "r18", "epochs": 20}, sets=["schedule=official"]), images=1000)
    assert plan.strong_until == 17


@pytest.mark.parametrize(
    ("epochs", "calm", "until"), [(20, None, 12), (12, None, 6), (200, None, 180), (20, 0.1, 18), (20, 0.25, 15)]
)
def test_a_short_run_gets_enough_steps_on_plain_images(epochs: int, calm: float | None, until: int) -> None:
    """At least 200 steps, at most half of the run; a given share is kept."""
    sets = ["aug=recipe", *([f"calm={calm}"] if calm else [])]
    plan = make_plan(resolve_run({"preset": "r18", "epochs": epochs, "effective_batch": 8}, sets=sets), images=205)
    assert plan.strong_until == until


@pytest.mark.parametrize(("key", "value"), [("warmup", 0.05), ("ema_age", 0.02), ("calm", 0.3), ("final_rate", 0.5)])
def test_one_setting_can_be_changed_in_the_official_schedule(key: str, value: float) -> None:
    """The rest stays as published, so that settings can be compared one by one."""
    official = make_plan(resolve_run({"preset": "r18", "epochs": 20}, sets=["schedule=official"]), images=1000)
    one = make_plan(
        resolve_run({"preset": "r18", "epochs": 20}, sets=["schedule=official", f"{key}={value}"]), images=1000
    )
    differing = {f for f in ("warmup_steps", "flat_steps", "final_rate", "ema_age", "ema_ramp", "strong_until")
                 if getattr(one, f) != getattr(official, f)}  # fmt: skip
    expected = {
        "warmup": {"warmup_steps"},
        "ema_age": {"ema_age", "ema_ramp"},
        "calm": {"strong_until"},
        "final_rate": {"flat_steps", "final_rate"},
    }
    assert differing == expected[key]


def test_a_resumed_official_run_has_the_same_plan(tmp_path: Path) -> None:
    config = resolve_run({"preset": "r18"}, sets=["schedule=official"])
    (tmp_path / "config.toml").write_text(config.to_toml())
    again = resolve_run({}, config_file=tmp_path / "config.toml")
    assert make_plan(again, images=1000) == make_plan(config, images=1000)


def test_evaluation_runs_at_the_interval_and_after_the_last_epoch() -> None:
    plan = make_plan(resolve_run({"epochs": 8}, sets=["eval_every=3"]), images=100)
    assert [e for e in range(8) if plan.evaluates(e)] == [2, 5, 7]


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from rtdetr_cli.config.run import resolve_run; from rtdetr_cli.train.plan import make_plan;"
        "make_plan(resolve_run({}), images=9); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
