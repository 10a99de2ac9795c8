"""The second stage: its plan, its recommendation, and (slow) a complete stage."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.config.presets import load_preset, preset_folder
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.evaluate.bootstrap import Interval
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.compare import Limits, Part
from rtdetr_cli.export.verify import Verdict
from rtdetr_cli.train.events import EpochDone
from rtdetr_cli.train.stop import Interrupted, StopFlag
from rtdetr_cli.weights.header import ModelHeader, read_header
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.finetune_discrete import (
    Exported,
    FinetuneDiscrete,
    Outcome,
    Row,
    epochs_of,
    model_sets,
    open_stage,
    plan_discrete,
    preset_for,
    recommend,
)


@pytest.fixture
def header(shapes_model: Path) -> ModelHeader:
    return read_header(shapes_model)


@pytest.mark.parametrize(
    ("preset", "first", "expected"),
    [
        ("r18", 120, 36),  # published
        ("r34", 120, 12),
        ("r50m", 84, 36),
        ("r50", 72, 12),
        ("r101", 72, 12),  # nothing was published: the usual share
        ("r18", 50, 15),
        ("tiny", 3, 2),  # never fewer than two
    ],
)
def test_epochs_are_the_published_share(preset: str, first: int, expected: int) -> None:
    assert epochs_of(first, load_preset(preset).official) == expected


def test_plan_of_a_model_alone(shapes_model: Path, header: ModelHeader, shapes_data: Path) -> None:
    """A model that is no preset's, outside of any run: its own sizes, and only the sampling is another."""
    config = plan_discrete(shapes_model, header, {"data": str(shapes_data)})
    assert config.settings.sampling == "discrete"
    assert config.settings.rounding == "published"
    assert config.settings.weights == str(shapes_model)
    assert config.settings.epochs == 15  # of the default's 50
    assert config.settings.calm == pytest.approx(3 / 36)
    assert config.imgsz == header.imgsz
    assert config.preset.model.model_dump(mode="json").items() >= header.architecture.items()
    assert config.settings.freeze == "preset"
    assert config.settings.name == "tiny-shapes-discrete-01"


def test_plan_of_a_run(shapes_model: Path, header: ModelHeader, shapes_data: Path, tmp_path: Path) -> None:
    """The run's settings, where the command line says nothing else; flags over `--set` over the run."""
    run = tmp_path / "runs/tiny-shapes-01"
    run.mkdir(parents=True)
    model = run / "best.safetensors"
    model.write_bytes(shapes_model.read_bytes())
    first = resolve_run(
        {"data": str(shapes_data), "preset": "tiny", "epochs": 40, "lr": 3e-4, "effective_batch": 4, "seed": 9},
        sets=model_sets(header),
    )
    (run / "config.toml").write_text(first.to_toml())
    config = plan_discrete(model, header, {"seed": 1}, sets=["rounding=nearest", "calm=0.2"])
    settings = config.settings
    assert (settings.epochs, settings.lr, settings.effective_batch) == (12, 3e-4, 4)
    assert (settings.seed, settings.rounding, settings.calm) == (1, "nearest", 0.2)
    assert settings.data == str(shapes_data)
    assert config.preset.optim == first.preset.optim
    assert config.preset.model == first.preset.model
    assert plan_discrete(model, header, {"epochs": 3}).settings.epochs == 3
    assert plan_discrete(model, header, {}, sets=["epochs=5"]).settings.epochs == 5


def test_plan_of_a_run_whose_preset_file_is_gone(
    shapes_model: Path, header: ModelHeader, shapes_data: Path, tmp_path: Path
) -> None:
    run, mine = tmp_path / "runs/mine-shapes-01", tmp_path / "mine.toml"
    run.mkdir(parents=True)
    model = run / "best.safetensors"
    model.write_bytes(shapes_model.read_bytes())
    text = (preset_folder() / "r18.toml").read_text()
    mine.write_text(text.replace('name = "r18"', 'name = "mine"').replace("discrete_epochs", "discrete_epochs = 60 #"))
    first = resolve_run({"data": str(shapes_data), "preset": str(mine), "epochs": 60}, sets=model_sets(header))
    (run / "config.toml").write_text(first.to_toml())
    mine.unlink()
    config = plan_discrete(model, header, {})
    assert config.preset.official == first.preset.official
    assert config.settings.epochs == epochs_of(60, first.preset.official)
    assert config.settings.name.startswith("mine-")


def test_run_names_are_never_reused(shapes_model: Path, header: ModelHeader, shapes_data: Path, tmp_path: Path) -> None:
    flags = {"data": str(shapes_data), "out": str(tmp_path)}
    (tmp_path / "tiny-shapes-discrete-01").mkdir()
    assert plan_discrete(shapes_model, header, flags).settings.name == "tiny-shapes-discrete-02"
    assert plan_discrete(shapes_model, header, {**flags, "name": "mine"}).settings.name == "mine"


@pytest.mark.parametrize(
    ("change", "flags", "sets", "text"),
    [
        ({"sampling": "discrete"}, {"data": "x"}, [], "uses discrete sampling already"),
        ({}, {}, [], "no dataset given"),
        ({}, {"data": "x"}, ["sampling=bilinear"], "sampling cannot change"),
        ({"architecture": {"depth": 152}}, {"data": "x"}, [], "no preset has the backbone"),
    ],
)
def test_refusals(
    shapes_model: Path,
    header: ModelHeader,
    change: dict[str, Any],
    flags: dict[str, Any],
    sets: list[str],
    text: str,
) -> None:
    with pytest.raises(UsageError, match=text):
        plan_discrete(shapes_model, replace(header, **change), flags, sets=sets)


@pytest.mark.parametrize("name", ["tiny", "r18", "r34", "r50m", "r50", "r101"])
def test_preset_of_a_foreign_file(header: ModelHeader, name: str) -> None:
    """A published file names no preset: the one with the most similar sizes is taken, r50m and r50 apart."""
    spec = load_preset(name).model.model_dump(mode="json")
    assert preset_for(replace(header, preset="", architecture=spec)) == name


# ------------------------------------------------------------------------------------------------ recommendation


def outcome(
    *, before: float = 0.5, after: float, spread: float = 0.01, times: tuple[float, float], passed: bool = True
) -> tuple[tuple[Row, Row, Row], list[Exported]]:
    def interval(value: float) -> Interval:
        return Interval(value, value - spread, value + spread, 100)

    part = Part(passed)
    verdict = Verdict("fp32", Limits(1, 1, 0, 0, 0), 1, part, Part(True), Part(None))
    artefact = Artefact(Path("x.onnx"), "onnx", "fp32", verdict)
    rows = (
        Row("before", interval(before), before),
        Row("untrained", interval(0.1), 0.1, interval(0.1 - before)),
        Row("after", interval(after), after, interval(after - before)),
    )
    return rows, [Exported("original", artefact, times[0]), Exported("discrete", artefact, times[1])]


@pytest.mark.parametrize(
    ("facts", "begins"),
    [
        ({"after": 0.48, "times": (10.0, 5.0)}, "keep the original: discrete sampling costs more than 0.01 AP"),
        ({"after": 0.55, "times": (10.0, 10.0)}, "deploy the discrete model: its AP is higher"),
        ({"after": 0.498, "times": (10.0, 8.0)}, "deploy the discrete model where speed matters"),
        ({"after": 0.495, "spread": 0.001, "times": (10.0, 8.0)}, "deploy the discrete model where speed matters"),
        ({"after": 0.502, "times": (10.0, 9.8)}, "keep the original: the discrete model changes AP by +0.002"),
        ({"after": 0.502, "times": (10.0, 10.6)}, "keep the original: the discrete model changes AP by +0.002"),
        ({"after": 0.55, "times": (10.0, 5.0), "passed": False}, "deploy neither model yet"),
        ({"before": 0.04, "after": 0.045, "times": (10.0, 5.0)}, "deploy neither model: both have hardly learned"),
    ],
)
def test_recommendation(facts: dict[str, Any], begins: str) -> None:
    text = recommend(*outcome(**facts), max_drop=0.01)
    assert text.startswith(begins)
    assert ("a real loss" in text) == (facts["after"] == 0.495)  # the interval excludes zero


@pytest.mark.parametrize(
    ("milliseconds", "word"), [(5.0, "faster"), (9.6, "as fast"), (10.5, "as fast"), (10.6, "slower")]
)
def test_the_speed_of_a_better_model(milliseconds: float, word: str) -> None:
    text = recommend(*outcome(after=0.55, times=(10.0, milliseconds)), max_drop=0.01)
    assert f"it is {word} ({milliseconds:.1f} ms, the original 10.0 ms" in text
    assert "trained for longer" in text, "the gain may come from that"


@pytest.mark.parametrize(("after", "max_drop", "passed"), [(0.48, 0.01, False), (0.48, 0.05, True), (0.6, 0.0, True)])
def test_passing(after: float, max_drop: float, passed: bool) -> None:
    rows, exports = outcome(after=after, times=(1.0, 1.0))
    made = Outcome(Path("r"), Path("b"), rows, tuple(exports), "", rows[0].ap.value - after, max_drop)
    assert made.passed is passed
    assert made.to_json()["passed"] is passed


# ------------------------------------------------------------------------------------------------- command line


def test_the_command_refuses_before_it_works(rtdetr: Callable[..., Any], shapes_model: Path, shapes_onnx: Path) -> None:
    for words, code in (
        ([shapes_model], 2),  # no dataset
        ([shapes_onnx], 2),
        ([shapes_model, "--max-drop", "5"], 2),
        ([shapes_model, "--data", "nowhere"], 3),
        ([shapes_model, "--imgsz", "100"], 2),
        (["--resume", "nowhere"], 2),
        (["--resume", "nowhere", "--epochs", 3], 2),
        ([shapes_model, "--resume", "nowhere"], 2),
    ):
        rtdetr("finetune-discrete", *words, code=code)


def test_paths_stay_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.finetune_discrete import show_outcome

    monkeypatch.setattr(terminal, "is_terminal", lambda stream=None: True)
    monkeypatch.setenv("COLUMNS", "50")
    rows, exports = outcome(after=0.5, times=(1.0, 1.0))
    folder = Path("runs/tiny-a-dataset-with-a-long-name-discrete-01")
    paths = [folder / "export-original" / "best.onnx", folder / "export" / "best.onnx"]
    exports = [replace(e, artefact=replace(e.artefact, path=p)) for e, p in zip(exports, paths, strict=True)]
    show_outcome(Outcome(folder, folder / "best.safetensors", rows, tuple(exports), "keep it", 0.0, 0.01))
    said = capsys.readouterr().out
    for path in (*paths, folder / "best.safetensors"):
        assert any(line.endswith(str(path)) for line in said.splitlines()), said


@pytest.mark.parametrize(("kinds", "end"), [(3, "Kind01 2, Kind00 1"), (60, " more")])
def test_operators_of_both_exports_are_listed(capsys: pytest.CaptureFixture[str], kinds: int, end: str) -> None:
    """Most frequent first; the whole list is in the document."""
    from rtdetr_cli.cli.finetune_discrete import show_outcome

    rows, exports = outcome(after=0.5, times=(1.0, 1.0))
    operators = {f"Kind{n:02d}": n + 1 for n in range(kinds)} | {"Conv": 500}
    exports = [replace(e, artefact=replace(e.artefact, operators=operators)) for e in exports]
    show_outcome(Outcome(Path("run"), Path("b"), rows, tuple(exports), "keep it", 0.0, 0.01))
    lines = capsys.readouterr().out.splitlines()
    for name in ("original", "discrete"):
        (line,) = [line for line in lines if line.startswith(f"operators of the {name} model")]
        assert line.startswith(f"operators of the {name} model  Conv 500, Kind{kinds - 1:02d} {kinds}, ")
        assert line.endswith(end)
    assert ("all operators  run/discrete.json" in lines) == (kinds == 60)


@pytest.mark.slow
@pytest.mark.parametrize(("max_drop", "code"), [(1.0, 0), (0.0, 6)])
def test_complete_stage(
    rtdetr: Callable[..., Any], shapes_model: Path, shapes_data: Path, tmp_path: Path, max_drop: float, code: int
) -> None:
    """Three rows with intervals, two exports without GridSample, a recommendation; files kept either way."""
    words = ["--data", shapes_data, "--epochs", 1, "--out", tmp_path, "--name", "d", "--workers", 0, "--aug", "none"]
    ran = rtdetr("finetune-discrete", shapes_model, *words, "--max-drop", max_drop, "--lr", "1e-9", "--json", code=code)
    document = ran.json
    assert [row["model"] for row in document["table"]] == [
        "bilinear, before",
        "discrete, not trained",
        "discrete, finetuned",
    ]
    before, untrained, after = (row["ap"]["value"] for row in document["table"])
    assert before > 0.8
    assert untrained < before  # half a pixel off, as published
    assert document["drop"] == pytest.approx(before - after)
    assert document["passed"] is (code == 0)
    assert [e["operators"].get("GridSample", 0) for e in document["exports"]] == [0, 0]
    assert all(e["gate"]["passed"] and e["milliseconds"] > 0 for e in document["exports"])
    header = read_header(tmp_path / "d/best.safetensors")
    assert (header.sampling, header.rounding) == ("discrete", "published")
    assert {"discrete.json", "best.safetensors", "export", "export-original"} <= {
        p.name for p in (tmp_path / "d").iterdir()
    }


def test_only_a_second_stage_is_opened_as_one(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"finished": null}')
    flags = {"data": str(shapes_data), "preset": "tiny"}
    (run / "config.toml").write_text(resolve_run(flags).to_toml())
    with pytest.raises(UsageError, match=r"is not a run of finetune-discrete"):
        open_stage(run)
    gone = {**flags, "weights": str(tmp_path / "gone.safetensors"), "sampling": "discrete"}
    (run / "config.toml").write_text(resolve_run(gone).to_toml())
    with pytest.raises(ModelError, match=r"gone\.safetensors, which .* is compared with, no longer exists"):
        open_stage(run)
    (run / "config.toml").write_text(resolve_run({**gone, "weights": str(shapes_model)}).to_toml())
    model, config = open_stage(run)
    assert model == shapes_model
    assert Path(config.settings.out) / config.settings.name == run


@pytest.mark.slow
def test_an_interrupted_stage_resumes_to_its_table(
    rtdetr: Callable[..., Any], shapes_model: Path, shapes_data: Path, tmp_path: Path
) -> None:
    """Interrupted during the training, and again during the comparison."""
    where = {"data": str(shapes_data), "out": str(tmp_path), "name": "d", "workers": 0, "aug": "none", "lr": 1e-9}
    config = plan_discrete(shapes_model, load_model(shapes_model)[1], {**where, "epochs": 2})
    stage, stop = FinetuneDiscrete(shapes_model, config), StopFlag()

    def until_the_first_epoch() -> None:
        for event in stage.train(stop=stop):
            if isinstance(event, EpochDone):
                stop.signal = signal.SIGTERM

    with pytest.raises(Interrupted):
        until_the_first_epoch()
    for _ in range(2):  # the second time only the comparison is left
        ran = rtdetr("finetune-discrete", "--resume", tmp_path / "d", "--max-drop", 1, "--json", code=0)
        assert len(ran.json["table"]) == 3
    assert "resumed at epoch 2" not in ran.err
    assert (tmp_path / "d/discrete.json").is_file()
