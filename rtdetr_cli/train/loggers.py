"""TensorBoard, Weights & Biases and MLflow, fed by the loop's reports; `metrics.csv` is always written besides.

None may hurt a run. Packages are looked for before it starts; nothing needs a network; a logger that fails later is
left out with a warning, and the run goes on.

A resumed run makes some steps again. What has been logged is written down in `events/logged.json` each time it has
been handed on, and is not logged twice: the run goes on in the same TensorBoard folder, W&B run and MLflow run.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rtdetr_cli.errors import EnvironmentProblem
from rtdetr_cli.train.events import CheckpointSaved, EpochDone, StepDone, TrainingEvent

FOLDER = "events"
LOGGED = "logged.json"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
FLUSH_SECONDS = 2.0
PROJECT = "rtdetr"


class Sink(Protocol):
    """Where points go."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Take values at a step; they may be kept until `flush`."""

    def flush(self) -> None:
        """Hand on everything taken so far."""

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        """Take the metrics of the best epoch and the images of the run, and close."""


def require_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        EnvironmentProblem: it names all of them, and how to install them.
    """
    missing = [name for name in names if not _installed(name)]
    if missing:
        verb = "needs a package that is" if len(missing) == 1 else "need packages that are"
        raise EnvironmentProblem(
            f"--log {','.join(missing)} {verb} not installed: {', '.join(PACKAGES[n] for n in missing)}",
            hint=f'pip install "rtdetr-cli[{",".join(missing)}]"',
            code="package-missing",
        )


def _installed(name: str) -> bool:
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        return False
    # A folder called wandb, which wandb leaves behind where it ran, looks like a package without a file.
    return found is not None and found.origin is not None


class Loggers:
    """All loggers of a run.

    Args:
        names: of `PACKAGES`.
        folder: of the run.
        settings: shown beside the curves: plain values by dotted name.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, settings: Mapping[str, Any]) -> None:
        self._state = folder / FOLDER / LOGGED
        self._sinks: dict[str, Sink] = {}
        self._flushed = time.monotonic()
        self.notices: list[str] = []
        if not names:
            return
        self._state.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._state.read_text(encoding="utf-8")) if self._state.is_file() else {}
        self._ids: dict[str, str] = dict(known.get("ids", {}))
        # Steps and epochs that every logger has been given, both counted from 0.
        self._step, self._epoch = int(known.get("step", 0)), int(known.get("epoch", 0))
        self._next_step, self._next_epoch = self._step, self._epoch
        for name in names:
            self._sinks[name] = self._open(name, folder, settings)
        self._write_state()

    def _open(self, name: str, folder: Path, settings: Mapping[str, Any]) -> Sink:
        if name == "tensorboard":
            return TensorBoard(folder, settings, first_step=self._step)
        if name == "wandb":
            wandb = WeightsAndBiases(folder, settings, identity=self._ids.get(name))
            self._ids[name] = wandb.identity
            if wandb.notice:
                self.notices.append(wandb.notice)
            return wandb
        mlflow = MLflow(folder, settings, identity=self._ids.get(name))
        self._ids[name] = mlflow.identity
        self.notices.append(f"mlflow writes to {mlflow.where}")
        return mlflow

    def write(self, report: TrainingEvent) -> None:
        """Log a report; what went wrong is in `notices`."""
        if not self._sinks:
            return
        if isinstance(report, StepDone) and report.step >= self._next_step:
            self._add(_step_values(report), report.step)
            self._next_step = report.step + 1
        elif isinstance(report, EpochDone) and report.epoch >= self._next_epoch:
            # On the axis of steps, at the last one of the epoch.
            self._add(_epoch_values(report), max(0, report.step - 1))
            self._next_epoch = report.epoch + 1
        due = time.monotonic() - self._flushed > FLUSH_SECONDS
        if due or isinstance(report, (EpochDone, CheckpointSaved)):
            self._flush()

    def finish(self, metrics: Mapping[str, float | None], images: Sequence[Path] = ()) -> None:
        """Close all, with the metrics of the best epoch and the images of the run."""
        if not self._sinks:
            return
        self._flush()
        known = {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}
        there = [p for p in images if p.is_file()]
        self._each(lambda sink: sink.finish(known, there))
        self._sinks = {}

    def _add(self, values: Mapping[str, float], step: int) -> None:
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self._each(lambda sink: sink.add(finite, step))

    def _flush(self) -> None:
        self._each(lambda sink: sink.flush())
        self._step, self._epoch = self._next_step, self._next_epoch
        self._flushed = time.monotonic()
        self._write_state()

    def _each(self, what: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                what(sink)
            except Exception as error:  # foreign code and, behind it, a network: no reason to lose a run
                del self._sinks[name]
                self.notices.append(f"logging to {name} has stopped, the run goes on: {error}")

    def _write_state(self) -> None:
        partial = self._state.with_suffix(".partial")
        try:
            partial.write_text(
                json.dumps({"ids": self._ids, "step": self._step, "epoch": self._epoch}), encoding="utf-8"
            )
            os.replace(partial, self._state)
        except OSError as error:
            self.notices.append(f"{self._state} cannot be written, a resumed run may log steps twice: {error}")


def _step_values(report: StepDone) -> dict[str, float]:
    values = {
        "train/loss": report.loss,
        "train/lr": report.lr,
        "train/gradient_norm": report.gradient_norm,
        "speed/step_seconds": report.seconds,
        "speed/waited_seconds": report.loader_seconds,
        "speed/memory_gb": report.memory_bytes / 1e9,
    }
    last_layer = ("loss_vfl", "loss_bbox", "loss_giou")
    return values | {f"train/{name}": report.terms[name] for name in last_layer if name in report.terms}


def _epoch_values(report: EpochDone) -> dict[str, float]:
    values = {"epoch/number": report.epoch + 1.0, "epoch/loss": report.loss, "epoch/seconds": report.seconds}
    measured = {f"val/{name}": float(v) for name, v in (report.metrics or {}).items() if v is not None}
    return values | {f"epoch/{name}": value for name, value in report.terms.items()} | measured


# ---- the three --------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in the run's own folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Whatever a killed process wrote after its last flush is taken back, and comes again.
        purge = first_step or None
        self._writer: Any = SummaryWriter(str(folder / FOLDER), purge_step=purge)
        if not first_step:
            rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
            self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", 0)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See `Sink`."""
        self._writer.flush()

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        """See `Sink`."""
        import numpy as np
        from PIL import Image

        for path in images:
            with Image.open(path) as image:
                shown = image.convert("RGB")
                shown.thumbnail((1200, 1200))  # it is stored as PNG
                self._writer.add_image(path.stem, np.asarray(shown), 0, dataformats="HWC")
        for name, value in metrics.items():
            self._writer.add_scalar(f"best/{name}", value, 0)
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; without a key it is kept offline in the run's folder, to be sent with `wandb sync`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, identity: str | None) -> None:
        import wandb

        self._wandb = wandb
        self.notice = ""
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        arguments: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": folder.name,
            "id": identity or secrets.token_hex(4),
            "dir": str(place),
            "config": dict(settings),
            "resume": "allow",
        }
        # Its console capture would tear the progress bar.
        quiet = {"console": "off", "silent": True, "init_timeout": 30}
        try:
            self._run = wandb.init(mode=mode, settings=wandb.Settings(**quiet), **arguments)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            mode = "offline"
            self.notice = f"wandb cannot be reached ({error}): "
            self._run = wandb.init(mode=mode, settings=wandb.Settings(**quiet), **arguments)
        self.identity = str(self._run.id)
        if mode == "offline" and identity is None:
            self.notice += f"wandb keeps this run offline: wandb sync {place / 'wandb'}/offline-run-* sends it"

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """See `Sink`; wandb's own process does it at once."""

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        """See `Sink`."""
        for name, value in metrics.items():
            self._run.summary[f"best/{name}"] = value
        if images:
            self._run.log({f"plots/{path.stem}": self._wandb.Image(str(path)) for path in images})
        self._run.finish()


def _has_wandb_key() -> bool:
    """Tell whether wandb has been told who the user is, without asking it: it would ask the user."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(host and netrc.netrc().authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


class MLflow:
    """An MLflow run: on the server of MLFLOW_TRACKING_URI, else in files beside the runs."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, identity: str | None) -> None:
        self.where = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self.where:
            runs = folder.absolute().parent
            if all(find_spec(name) for name in ("sqlalchemy", "alembic")):
                self.where = f"sqlite:///{runs / 'mlflow.db'}"
            else:
                # The slim package has files only, and wants to be told that this is meant.
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
                self.where = (runs / "mlruns").as_uri()
        # Its own patience with a server that does not answer is ten minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._waiting: list[Any] = []
        try:
            self._client = MlflowClient(tracking_uri=self.where)
            if identity is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
                experiment = self._client.get_experiment_by_name(name)
                number = experiment.experiment_id if experiment else self._client.create_experiment(name)
                run = self._client.create_run(number, run_name=folder.name)
                identity = str(run.info.run_id)
                parameters = [Param(key, str(value)[:500]) for key, value in settings.items()]
                for start in range(0, len(parameters), 100):  # the most that one call takes
                    self._client.log_batch(identity, params=parameters[start : start + 100])
            else:
                self._client.set_terminated(identity, status="RUNNING")
        except (MlflowException, OSError) as error:
            raise EnvironmentProblem(
                f"mlflow at {self.where} does not answer: {str(error).splitlines()[0][:200]}",
                hint="unset MLFLOW_TRACKING_URI writes to files beside the runs",
                code="mlflow",
            ) from error
        self.identity = identity

    def add(self, values: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, value, now, step) for name, value in values.items()]

    def flush(self) -> None:
        """See `Sink`."""
        for start in range(0, len(self._waiting), 1000):  # the most that one call takes
            self._client.log_batch(self.identity, metrics=self._waiting[start : start + 1000])
        self._waiting = []

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        """See `Sink`."""
        self.add({f"best/{name}": value for name, value in metrics.items()}, 0)
        self.flush()
        for path in images:
            self._client.log_artifact(self.identity, str(path), "plots")
        self._client.set_terminated(self.identity)
