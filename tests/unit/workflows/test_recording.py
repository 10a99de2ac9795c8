"""What a run leaves for people, from a real run; and that none of it can end one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.train import loggers, plots
from rtdetr_cli.train.events import EpochDone
from rtdetr_cli.train.plan import make_plan
from rtdetr_cli.workflows import finetune as workflow
from rtdetr_cli.workflows.finetune import BeginReport, EndReport, finetune
from rtdetr_cli.workflows.recording import Notice, Recorder, loader_bound

SETS = [
    *("model.width=8", "model.hidden_dim=16", "model.encoder_ffn=16", "model.decoder_dim=16", "model.decoder_ffn=16"),
    *("model.queries=20", "model.heads=2"),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_dataset(tmp_path_factory.mktemp("shapes"), train=8, val=4, imgsz=64)


def flags(data: Path, out: Path, **more: Any) -> dict[str, Any]:
    common = {"preset": "tiny", "imgsz": (64, 64), "workers": 0, "effective_batch": 4, "device": "cpu", "epochs": 2}
    return {"data": str(data), "out": str(out), "precision": "fp32", **common, **more}


def test_a_run_leaves_images_points_and_a_page(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    config = resolve_run(flags(shapes, tmp_path / "runs", log=("tensorboard",), overfit=4), sets=SETS)
    events = list(finetune(config))
    assert not [e for e in events if isinstance(e, Notice)]
    begun, end = events[0], events[-1]
    assert isinstance(begun, BeginReport)
    assert isinstance(end, EndReport)
    drawn = end.folder / plots.FOLDER
    assert sorted(p.name for p in drawn.iterdir()) == sorted(
        [plots.LABELS, plots.BATCH, plots.CURVES, plots.PREDICTIONS]
    )
    for path in drawn.iterdir():
        with Image.open(path) as image:
            image.load()
    assert end.page == end.folder / "report.html"
    page = end.page.read_text(encoding="utf-8")
    # Two epochs do not teach four images by heart, and the run says why.
    assert "steps are few to learn by heart" in end.explanation
    assert f"not learned by heart: {end.explanation}" in page.replace("&#39;", "'")
    assert f"{begun.parameters:,}" in page
    assert list((end.folder / loggers.FOLDER).glob("events.out.tfevents.*"))


def test_a_image_that_fails_is_a_notice(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such font")

    monkeypatch.setattr(plots, "labels_figure", fail)
    monkeypatch.setattr(plots, "batch_image", fail)
    config = resolve_run(flags(shapes, tmp_path / "runs", epochs=1), sets=SETS)
    events = list(finetune(config))
    said = [e.text for e in events if isinstance(e, Notice)]
    assert said == [
        "labels.png could not be drawn: ValueError: no such font",
        "batch_00.jpg could not be drawn: ValueError: no such font",
        "the report could not be drawn: ValueError: no such font",
    ]
    assert isinstance(events[-1], EndReport)
    assert events[-1].best.is_file()
    assert events[-1].page is None


def test_plots_can_be_left_out(shapes: Path, tmp_path: Path) -> None:
    config = resolve_run(flags(shapes, tmp_path / "runs", epochs=1), sets=[*SETS, "plots=false"])
    end = list(finetune(config))[-1]
    assert isinstance(end, EndReport)
    assert end.page is None
    assert not (end.folder / plots.FOLDER).exists()


def test_a_missing_logger_is_refused_before_the_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="--log wandb needs a package"):
        next(finetune(resolve_run(flags(shapes, tmp_path / "runs", log=("wandb",)), sets=SETS)))
    assert not (tmp_path / "runs").exists()


# ---- waiting for images ---------------------------------------------------------------------------------------


def prepared(**settings: Any) -> Any:
    config = resolve_run({"data": "x", "preset": "tiny", **settings}, sets=["plots=false"])
    plan = make_plan(config, images=10_000)  # long enough for the recipe
    return SimpleNamespace(config=config, plan=plan, workers=3, warnings=[], train_set=None)


def epoch(number: int, share: float) -> EpochDone:
    return EpochDone(number, 9, 10, 1e-3, 1.0, {}, None, False, 0.1, 0, 10.0, share, 1)


def test_a_run_that_waits_for_images_is_told_once_with_the_remedy(tmp_path: Path) -> None:
    recorder = Recorder(prepared(), SimpleNamespace(path=tmp_path), SimpleNamespace(last=None))  # type: ignore[arg-type]
    said = [[n.text for n in recorder.take(epoch(n, share))] for n, share in enumerate((0.9, 0.1, 0.45, 0.6))]
    # The first epoch waits for the loader to start.
    assert said == [[], [], [loader_bound(prepared(), 0.45)], []]
    assert said[2] == ["45% of the time goes into waiting for images: --cache ram or more --workers than 3"]
    assert recorder.warnings == said[2]


def test_the_remedy_is_one_that_is_left() -> None:
    assert "--cache" not in loader_bound(prepared(cache="ram"), 0.5)
    assert "--aug light" in loader_bound(prepared(cache="ram"), 0.5)
    assert "--aug" not in loader_bound(prepared(cache="ram", aug="none"), 0.5)


def test_the_page_is_whole_when_the_best_epoch_was_before_an_interruption(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluation of the best epoch is made again from the file that was kept."""
    stop = workflow.StopFlag()
    begun: list[BeginReport] = []

    def interrupted() -> None:
        for event in finetune(resolve_run(flags(shapes, tmp_path / "runs"), sets=SETS), stop=stop):
            if isinstance(event, BeginReport):
                begun.append(event)
            if isinstance(event, EpochDone):
                stop.signal = 15

    with pytest.raises(workflow.Interrupted):
        interrupted()
    run = begun[0].folder
    assert run is not None
    monkeypatch.setattr(Recorder, "_epoch", lambda self, report: iter(()))  # no later epoch is better
    end = list(workflow.resume(run))[-1]
    assert isinstance(end, EndReport)
    assert end.page is not None
    assert "<h2>Classes</h2>" in end.page.read_text(encoding="utf-8")
