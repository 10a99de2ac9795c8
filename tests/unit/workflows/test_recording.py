"""Plots, logged points and the report of a real run; none of them can end one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.runs import EVENTS, PLOTS, RunFolder
from rtdetr_cli.train import loggers, plots
from rtdetr_cli.train.events import EpochDone
from rtdetr_cli.train.plan import make_plan
from rtdetr_cli.workflows.events import Notice, RunFinished, RunStarted
from rtdetr_cli.workflows.finetune import finetune, resume
from rtdetr_cli.workflows.recording import Recorder


@pytest.fixture
def settings(small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    return lambda **flags: small_run("plots=true", **{"epochs": 1, "effective_batch": 4, "batch": 4, **flags})


def test_a_run_leaves_plots_points_and_a_report(settings: Callable[..., RunConfig]) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    config = settings(log=("tensorboard",), overfit=4, epochs=2)
    events = list(finetune(config))
    assert not [e for e in events if isinstance(e, Notice)]
    begun, end = events[0], events[-1]
    assert isinstance(begun, RunStarted)
    assert isinstance(end, RunFinished)
    drawn = end.folder / PLOTS
    assert sorted(p.name for p in drawn.iterdir()) == sorted(
        [plots.LABELS, plots.BATCH, plots.CURVES, plots.PREDICTIONS]
    )
    for path in drawn.iterdir():
        with Image.open(path) as image:
            image.load()
    assert end.page == end.folder / "report.html"
    page = end.page.read_text(encoding="utf-8")
    assert "too few to overfit" in end.explanation  # two epochs
    assert f"did not overfit the images: {end.explanation}" in page.replace("&#39;", "'")
    assert f"{begun.parameters:,}" in page
    assert list((end.folder / EVENTS).glob("events.out.tfevents.*"))


def test_a_plot_that_fails_is_a_notice(settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(plots, "labels_figure", fail)
    monkeypatch.setattr(plots, "batch_image", fail)
    config = settings()
    events = list(finetune(config))
    notices = [e.text for e in events if isinstance(e, Notice)]
    assert notices == [
        "could not draw labels.png: ValueError: no such font",
        "could not draw batch_00.jpg: ValueError: no such font",
        "could not draw the report: ValueError: no such font",
    ]
    assert isinstance(events[-1], RunFinished)
    assert events[-1].best.is_file()
    assert events[-1].page is None


def test_plots_can_be_switched_off(small_run: Callable[..., RunConfig]) -> None:
    end = list(finetune(small_run(epochs=1)))[-1]
    assert isinstance(end, RunFinished)
    assert end.page is None
    assert not (end.folder / PLOTS).exists()


def test_a_missing_logger_is_refused_before_the_run(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="--log wandb needs a package"):
        next(finetune(settings(log=("wandb",))))
    assert not (tmp_path / "runs").exists()


# ---- waiting for images ---------------------------------------------------------------------------------------


def epoch(number: int, share: float) -> EpochDone:
    return EpochDone(number, 9, 10, 1e-3, 1.0, {}, None, False, 0.1, 0, 10.0, share, 1)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "--cache ram or more --workers than 3"),
        ({"cache": "ram"}, "more --workers than 3 or --aug light"),
        ({"cache": "ram", "aug": "none"}, "more --workers than 3"),
    ],
)
def test_a_slow_loader_is_reported_once_with_a_remedy(settings: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    config = resolve_run({"data": "x", "preset": "tiny", **settings}, sets=["plots=false"])
    plan = make_plan(config, images=10_000)  # long enough for the recipe
    prepared: Any = SimpleNamespace(config=config, plan=plan, workers=3, warnings=[], train_set=None)
    recorder = Recorder(prepared, RunFolder(tmp_path))
    notices = [[n.text for n in recorder.record(epoch(n, share))] for n, share in enumerate((0.9, 0.1, 0.45, 0.6))]
    # The first epoch waits for the loader to start.
    assert notices == [[], [], [f"training waits for images 45% of the time; try {remedy}"], []]
    assert recorder.warnings == notices[2]


def test_the_report_is_complete_when_training_ended_before_an_interruption(settings: Callable[..., RunConfig]) -> None:
    """The best model is evaluated again from its file."""
    end = list(finetune(settings()))[-1]
    assert isinstance(end, RunFinished)
    folder = RunFolder(end.folder)
    folder.write_manifest({**folder.manifest(), "finished": None})
    folder.report.unlink()
    end = list(resume(end.folder))[-1]
    assert isinstance(end, RunFinished)
    assert "<h2>Classes</h2>" in end.page.read_text(encoding="utf-8")
