"""Every point arrives once and in order, even after a kill; a failing logger never ends a run."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.runs import EVENTS
from rtdetr_cli.train import loggers
from rtdetr_cli.train.events import CheckpointSaved, EpochDone, StepDone
from rtdetr_cli.train.loggers import Loggers, require_loggers

SETTINGS = {"preset": "tiny", "lr": 1e-4}
PER_EPOCH = 4


def step(number: int) -> StepDone:
    terms = {"loss_vfl": 1.0 / (number + 1), "loss_bbox_aux_0": 0.5}
    return StepDone(
        number // PER_EPOCH, number % PER_EPOCH, number, 9.0 - number, terms, 0.3, 1e-4, 0.2, 0.01, 2_000_000_000
    )


def epoch(number: int) -> EpochDone:
    metrics = {"AP": 0.1 * number, "AP50": None}
    return EpochDone(number, 3, (number + 1) * PER_EPOCH, 1e-4, 8.0, {}, metrics, True, 0.1, number, 1.0, 0.0, 1)


def saved(tmp_path: Path) -> CheckpointSaved:
    return CheckpointSaved(tmp_path / "last.ckpt", "epoch", 0, 0)


def log(to: Loggers, first: int, last: int) -> None:
    """Log the events of steps `first` to `last - 1`."""
    for number in range(first, last):
        to.write(step(number))
        if (number + 1) % PER_EPOCH == 0:
            to.write(epoch(number // PER_EPOCH))


def tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """Return the scalars and the names of the images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / EVENTS), size_guidance={"scalars": 0})
    read.Reload()
    tags = read.Tags()
    return {t: [(e.step, round(e.value, 5)) for e in read.Scalars(t)] for t in tags["scalars"]}, tags["images"]


def test_a_missing_package_is_an_error_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem) as caught:
        require_loggers(["wandb", "mlflow"])
    assert "wandb, mlflow-skinny" in caught.value.message
    assert caught.value.hint == 'pip install "rtdetr-cli[wandb,mlflow]"'


def test_the_folder_that_wandb_leaves_behind_is_not_a_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (found := find_spec("wandb")) is not None and found.origin is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentProblem):
        require_loggers(["wandb"])


def test_no_loggers_leave_no_trace(tmp_path: Path) -> None:
    none = Loggers((), tmp_path, settings=SETTINGS)
    log(none, 0, 5)
    none.finish({"AP": 0.5})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("killed_after", "flushed"), [(10, True), (10, False), (8, True), (6, False)])
def test_tensorboard_has_every_step_once_after_a_kill(tmp_path: Path, killed_after: int, flushed: bool) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    first = Loggers(("tensorboard",), tmp_path, settings=SETTINGS)
    log(first, 0, 5)
    first.write(saved(tmp_path))
    log(first, 5, killed_after)
    if flushed:
        first.flush()
    else:
        first._loggers["tensorboard"].flush()  # written but not recorded: a kill between the two leaves this

    second = Loggers(("tensorboard",), tmp_path, settings=SETTINGS)
    log(second, 5, 12)  # the checkpoint was made after step 4
    plot = tmp_path / "curves.png"
    Image.new("RGB", (8, 8)).save(plot)
    second.finish({"AP": 0.2, "AR1": None}, [plot, tmp_path / "missing.png"])

    found, images = tensorboard(tmp_path)
    assert images == ["curves"]
    assert found["train/loss"] == [(n, 9.0 - n) for n in range(12)]
    assert found["val/AP"] == [(3, 0.0), (7, 0.1), (11, 0.2)]
    assert found["train/loss_vfl"][1] == (1, 0.5)
    assert found["best/AP"] == [(0, 0.2)]
    assert "val/AP50" not in found


def test_mlflow_has_every_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the mlflow extra is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "runs" / "tiny-01"
    run.mkdir(parents=True)
    first = Loggers(("mlflow",), run, settings=SETTINGS)
    log(first, 0, 10)
    second = Loggers(("mlflow",), run, settings=SETTINGS)
    log(second, 5, 12)
    second.finish({"AP": 0.2})
    where = second.notices[0].removeprefix("mlflow writes to ")
    client = MlflowClient(tracking_uri=where)
    (experiment,) = [e for e in client.search_experiments() if e.name == loggers.PROJECT]
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(n, 9.0 - n) for n in range(12)]
    assert found.data.params["preset"] == "tiny"
    assert found.info.status == "FINISHED"


def test_an_unreachable_mlflow_server_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the mlflow extra is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(EnvironmentProblem, match=r"mlflow at http://127\.0\.0\.1:9 does not answer"):
        Loggers(("mlflow",), tmp_path, settings=SETTINGS)


def test_wandb_stays_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    first = Loggers(("wandb",), tmp_path, settings=SETTINGS)
    log(first, 0, 5)
    first.finish({"AP": 0.1})
    state = tmp_path / EVENTS / loggers.LOGGED
    ids = json.loads(state.read_text())["ids"]
    second = Loggers(("wandb",), tmp_path, settings=SETTINGS)
    second.finish({})
    assert "wandb sync" in first.notices[0]
    assert not second.notices
    assert json.loads(state.read_text())["ids"] == ids
    assert len(list((tmp_path / EVENTS / "wandb").glob("offline-run-*"))) >= 1


class Failing:
    """A logger whose server is gone."""

    def add(self, values: object, step: int) -> None:
        raise OSError("no route to host")

    def flush(self) -> None:
        pass

    def finish(self, metrics: object, images: object) -> None:
        pass


def test_a_failing_logger_is_dropped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    logged = Loggers(("tensorboard",), tmp_path, settings=SETTINGS)
    logged._loggers["wandb"] = Failing()
    log(logged, 0, 3)
    logged.finish({})
    assert logged.notices == ["logging to wandb has stopped, training continues: no route to host"]
    assert len(tensorboard(tmp_path)[0]["train/loss"]) == 3
