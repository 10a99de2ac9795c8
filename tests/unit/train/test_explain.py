"""The plan in words: a reason for every value, and warnings of what is likely to go wrong."""

from __future__ import annotations

from typing import Any

import pytest

from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.train.explain import (
    Choice,
    crowding_warnings,
    explain_plan,
    explain_rare_classes,
    plan_line,
    plan_warnings,
)
from rtdetr_cli.train.plan import make_plan

IMAGES = 160


def explain(*sets: str, steps: int = 100, **flags: Any) -> dict[str, Choice]:
    """Explain the plan of a run with 10 steps per epoch."""
    config = resolve_run({"preset": "r18", "epochs": steps // 10, "effective_batch": 16, **flags}, sets=sets)
    choices = explain_plan(config, make_plan(config, images=IMAGES), images=IMAGES)
    return {choice.name: choice for choice in choices}


@pytest.mark.parametrize(
    ("flags", "sets", "images", "text"),
    [
        ({"preset": "tiny", "epochs": 2}, [], 50, "8 steps: too few to learn much from random weights (use about 250"),
        ({"preset": "r18", "epochs": 10}, ["schedule=official"], 500, "never passes 16%"),
        ({"preset": "r18", "effective_batch": 8}, ["schedule=official"], 90_000, "effective batch of 16, not 8"),
        ({"preset": "r18", "effective_batch": 64, "epochs": 500}, [], 10, "is larger than the 10 images"),
    ],
)
def test_warnings(flags: dict[str, Any], sets: list[str], images: int, text: str) -> None:
    config = resolve_run(flags, sets=sets)
    warnings = plan_warnings(config, make_plan(config, images=images), images=images)
    assert any(text in warning for warning in warnings), warnings


def test_a_long_run_has_no_warnings() -> None:
    config = resolve_run({"preset": "r18", "epochs": 2000})
    assert not plan_warnings(config, make_plan(config, images=IMAGES), images=IMAGES)


@pytest.mark.parametrize("sets", [[], ["schedule=official"]])
@pytest.mark.parametrize("preset", ["r18", "r50", "tiny"])
def test_every_value_has_a_reason(preset: str, sets: list[str]) -> None:
    choices = explain(*sets, preset=preset)
    assert {"input size", "frozen", "effective batch", "epochs", "steps", "lr", "warmup", "decay", "EMA"} <= set(
        choices
    )
    assert {"augmentation", "multi-scale"} <= set(choices)
    assert all(choice.value and choice.reason for choice in choices.values())


@pytest.mark.parametrize(
    ("flags", "sets", "reason"),
    [
        ({}, [], "preset"),
        ({"lr": 3e-4}, [], "--lr"),
        ({}, ["lr=3e-4"], "--set"),
        ({"effective_batch": 8}, [], "preset; the same for effective batches below 16"),
        ({"effective_batch": 32}, [], "preset 0.0001 x 1.41, the square root of 32/16"),
        ({"effective_batch": 256}, [], "preset 0.0001 x 2, the maximum"),
        ({}, ["schedule=official"], "published"),
        ({"weights": "none"}, [], "Muon"),
        ({"weights": "none", "effective_batch": 32}, [], "Muon 0.001 x 1.41, the square root of 32/16"),
    ],
)
def test_the_reason_for_the_learning_rate(flags: dict[str, Any], sets: list[str], reason: str) -> None:
    assert explain(*sets, **flags)["lr"].reason == reason


@pytest.mark.parametrize(
    ("flags", "value", "reason"),
    [
        ({}, "light", "500 steps or fewer: too short to gain from strong crops"),
        ({"steps": 510}, "recipe", "published; used in runs of more than 500 steps"),
        ({"overfit": 4}, "none", "--overfit"),
        ({"overfit": 4, "aug": "recipe"}, "recipe", "--aug"),
        (
            {"overfit": 4, "aug": "auto"},
            "light",
            "500 steps or fewer: too short to gain from strong crops",
        ),
    ],
)
def test_the_reason_for_the_augmentation(flags: dict[str, Any], value: str, reason: str) -> None:
    choices = explain(**flags)
    assert (choices["augmentation"].value, choices["augmentation"].reason) == (value, reason)
    assert ("strong augmentation" in choices) == (value not in ("none", "light"))


def test_a_run_of_one_epoch() -> None:
    assert "strong augmentation" not in explain(steps=10, aug="light")
    config = resolve_run({"preset": "tiny", "epochs": 1, "effective_batch": 16})
    one_step = explain_plan(config, make_plan(config, images=10), images=10)
    assert [choice.reason for choice in one_step if choice.name == "decay"] == ["the run is too short"]
    choices = explain(steps=10, aug="recipe")
    assert choices["strong augmentation"].value == "until epoch 1"
    assert choices["strong augmentation"].reason == "a run this short keeps it for at least half of the epochs"
    assert choices["EMA"].reason.startswith("averages about the last 1 step (the minimum)")


@pytest.mark.parametrize(
    ("flags", "value", "reason"),
    [
        ({"preset": "r50", "weights": "coco"}, "stem, norms of the backbone", "preset r50"),
        ({"preset": "r50", "weights": "none"}, "nothing", "random weights"),
        (
            {"preset": "r50", "weights": "coco", "freeze": "encoder"},
            "backbone and encoder, norms of the backbone",
            "--freeze",
        ),
        ({"preset": "r18", "weights": "coco", "freeze": "none"}, "nothing", "--freeze"),
    ],
)
def test_what_is_frozen(flags: dict[str, Any], value: str, reason: str) -> None:
    frozen = explain(**flags)["frozen"]
    assert (frozen.value, frozen.reason) == (value, reason)


def test_the_cache_and_its_budget() -> None:
    assert "cache" not in explain()
    assert explain(cache="ram")["cache"].value == "ram, half of the free space"
    assert explain("cache_gb=2.5", cache="disk")["cache"].value == "disk, 2.5 GB"


def test_the_plan_on_one_line() -> None:
    plan = make_plan(resolve_run({"preset": "r18", "epochs": 60}), images=IMAGES)
    expected = "plan  60 epochs x 10 steps, effective batch 16 (4 x 4), lr 0.0001, warmup 30 steps, recipe augmentation"
    assert plan_line(plan, 4) == expected
    assert "effective batch 16 (2 x 4 x 2)" in plan_line(plan, 4, processes=2)


@pytest.mark.parametrize(
    ("boxes", "value", "least"),
    [
        ({"car": 900, "bus": 800, "tram": 60, "bike": 1000}, "tram (60 boxes)", 85),
        ({"dent": 9, "scratch": 1, "rust": 12}, "scratch (1 box), dent (9 boxes)", 10),
    ],
)
def test_rare_classes_are_named_in_the_plan(boxes: dict[str, int], value: str, least: int) -> None:
    (choice,) = explain_rare_classes(boxes)
    assert choice.value == value
    assert choice.reason.startswith(f"fewer than {least} boxes: not drawn more often")


@pytest.mark.parametrize("boxes", [{}, {"car": 10}, {"car": 100, "bus": 10}])
def test_without_rare_classes_the_plan_says_nothing(boxes: dict[str, int]) -> None:
    assert explain_rare_classes(boxes) == ()


@pytest.mark.parametrize(
    ("boxes", "queries", "remedy"),
    [
        (101, 100, "(use --set model.queries=150)"),
        (412, 100, "(use --set model.queries=300 and cut the images into tiles)"),
        (412, 300, "at most 300 objects (cut the images into tiles)"),
    ],
)
def test_more_boxes_than_queries(boxes: int, queries: int, remedy: str) -> None:
    (warning,) = crowding_warnings(boxes, queries)
    assert warning.startswith(f"an image has {boxes} boxes")
    assert warning.endswith(remedy)
    assert crowding_warnings(queries, queries) == ()
