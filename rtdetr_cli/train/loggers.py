"""TensorBoard, Weights & Biases and MLflow, fed by the training loop's events; `metrics.csv` is written in any case.

None of them may end a run: a missing package is refused before it starts, a logger that fails later is dropped with
a warning. `events/logged.json` records what every logger has received, so that a resumed run, which trains some steps
again, logs nothing twice and continues in the same TensorBoard folder, W&B run and MLflow run.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from rtdetr_cli import documents as doc
from rtdetr_cli.errors import EnvironmentProblem, RtdetrError
from rtdetr_cli.files import write_text
from rtdetr_cli.runs import EVENTS, PLOTS
from rtdetr_cli.train.events import SAMPLE_LOSSES, CheckpointSaved, EpochDone, StepDone, TrainingEvent

LOGGED = "logged.json"
_COUNT = doc.integer(0, 1 << 50)
_LOGGED: dict[str, doc.Reader[Any]] = {"ids": doc.table(doc.text), "step": _COUNT, "epoch": _COUNT}
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
FLUSH_SECONDS = 2.0
PROJECT = "rtdetr"
LAST_LAYER_LOSSES = ("loss_vfl", "loss_bbox", "loss_giou")


def require_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        EnvironmentProblem: it names all of them, and how to install them.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise EnvironmentProblem(
            f"--log {','.join(missing)} needs a package that is not installed: "
            + ", ".join(PACKAGES[name] for name in missing),
            hint=f'pip install "rtdetr-cli[{",".join(missing)}]"',
            code="package-missing",
        )


def _is_installed(name: str) -> bool:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    # The folder `wandb`, which wandb leaves in the working folder, looks like a package without a file.
    return spec is not None and spec.origin is not None


class Loggers:
    """All loggers of a run.

    Args:
        names: keys of `PACKAGES`.
        folder: of the run.
        settings: of the run, as plain values by dotted name.
    """

    def __init__(self, names: Sequence[str], folder: Path, *, settings: Mapping[str, Any]) -> None:
        self._state = folder / EVENTS / LOGGED
        self._loggers: dict[str, _Logger] = {}
        self._flushed = time.monotonic()
        self.notices: list[str] = []
        if not names:
            return
        self._state.parent.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # a new run, or a damaged file: everything is logged again
            state = doc.read_fields(doc.parse_json(doc.read_bounded(self._state)), _LOGGED)
        self._ids: dict[str, str] = state.get("ids", {})
        # Number of steps and epochs that every logger has received.
        self._steps, self._epochs = state.get("step", 0), state.get("epoch", 0)
        for name in names:
            if name == "tensorboard":
                self._loggers[name] = _TensorBoard(folder, settings, first_step=self._steps)
                continue
            logger = (_WeightsAndBiases if name == "wandb" else _MLflow)(folder, settings, self._ids.get(name))
            self._loggers[name], self._ids[name] = logger, logger.identity
            self.notices += [logger.notice] if logger.notice else []
        self._write_state()

    def write(self, event: TrainingEvent) -> None:
        """Log an event; problems are added to `notices`."""
        if not self._loggers:
            return
        if isinstance(event, StepDone) and event.step >= self._steps:
            values = {
                "train/loss": event.loss,
                "train/lr": event.lr,
                "train/gradient_norm": event.gradient_norm,
                "speed/step_seconds": event.seconds,
                "speed/waited_seconds": event.loader_seconds,
                "speed/memory_gb": event.memory_bytes / 1e9,
            }
            values |= {f"train/{name}": event.terms[name] for name in LAST_LAYER_LOSSES if name in event.terms}
            self._add(values, event.step)
            self._steps = event.step + 1
        elif isinstance(event, EpochDone) and event.epoch >= self._epochs:
            values = {"epoch/number": event.epoch + 1.0, "epoch/loss": event.loss, "epoch/seconds": event.seconds}
            values |= {f"epoch/{name}": value for name, value in event.terms.items()}
            known = {name: v for name, v in (event.metrics or {}).items() if v is not None}
            values |= {f"{'sample' if name in SAMPLE_LOSSES else 'val'}/{name}": v for name, v in known.items()}
            self._add(values, max(0, event.step - 1))  # on the axis of steps, at the last one of the epoch
            self._epochs = event.epoch + 1
        due = time.monotonic() - self._flushed > FLUSH_SECONDS
        if due or isinstance(event, (EpochDone, CheckpointSaved)):
            self.flush()

    def flush(self) -> None:
        """Have every logger send or write what it has, and record that."""
        self._for_each(lambda logger: logger.flush())
        self._flushed = time.monotonic()
        self._write_state()

    def finish(self, metrics: Mapping[str, float | None], images: Sequence[Path] = ()) -> None:
        """Close all loggers, with the metrics of the best epoch and the images of the run."""
        if not self._loggers:
            return
        self.flush()
        known = {k: float(v) for k, v in metrics.items() if v is not None and math.isfinite(v)}
        existing = [path for path in images if path.is_file()]
        self._for_each(lambda logger: logger.finish(known, existing))
        self._loggers = {}

    def _add(self, values: Mapping[str, float], step: int) -> None:
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self._for_each(lambda logger: logger.add(finite, step))

    def _for_each(self, work: Callable[[_Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                work(logger)
            except Exception as error:  # foreign code, often with a network behind it
                del self._loggers[name]
                self.notices.append(f"logging to {name} has stopped, training continues: {error}")

    def _write_state(self) -> None:
        state = {"ids": self._ids, "step": self._steps, "epoch": self._epochs}
        try:
            write_text(self._state, json.dumps(state))
        except RtdetrError as error:
            self.notices.append(f"{error}; a resumed run may log some steps twice")


# ---- the loggers ------------------------------------------------------------------------------------------------


class _TensorBoard:
    """Event files in the run's own folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process wrote after its last flush is purged, and logged again.
        self._writer: Any = SummaryWriter(str(folder / EVENTS), purge_step=first_step or None)
        self.flush = self._writer.flush
        if not first_step:
            rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
            self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", 0)

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for path in images:
            with Image.open(path) as image:
                thumbnail = image.convert("RGB")
                thumbnail.thumbnail((1200, 1200))  # stored as PNG
                self._writer.add_image(path.stem, np.asarray(thumbnail), 0, dataformats="HWC")
        self.add({f"best/{name}": value for name, value in metrics.items()}, 0)
        self._writer.close()


class _WeightsAndBiases:
    """A W&B run; without an API key it stays offline in the run's folder, to be sent with `wandb sync`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], identity: str | None) -> None:
        import wandb

        events = folder / EVENTS
        start = partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=identity or secrets.token_hex(4),
            dir=str(events),
            config=dict(settings),
            resume="allow",
            # Capturing the console would garble the progress bar.
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        self.notice = ""
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        try:
            self._run = start(mode=mode)
        except wandb.errors.Error as error:
            if mode != "online":
                raise
            mode = "offline"
            self.notice = f"cannot reach wandb ({error}): "
            self._run = start(mode=mode)
        self.identity = str(self._run.id)
        if mode == "offline" and identity is None:
            self.notice += f"wandb keeps this run offline; send it with wandb sync {events / 'wandb'}/offline-run-*"

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Do nothing: wandb's own process sends points at once."""

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        import wandb

        self._run.summary.update({f"best/{name}": value for name, value in metrics.items()})
        if images:
            self._run.log({f"plots/{path.stem}": wandb.Image(str(path)) for path in images})
        self._run.finish()


def _has_wandb_key() -> bool:
    """Return whether wandb has an API key, without calling wandb, which would ask the user for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc
    from urllib.parse import urlparse

    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return bool(host and netrc.netrc().authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


class _MLflow:
    """An MLflow run, on the server of MLFLOW_TRACKING_URI or else in a file next to the run folders."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], identity: str | None) -> None:
        runs, uri = folder.absolute().parent, os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri and all(find_spec(name) for name in ("sqlalchemy", "alembic")):
            uri = f"sqlite:///{runs / 'mlflow.db'}"
        elif not uri:
            # The slim package can only write files, and refuses to without this.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (runs / "mlruns").as_uri()
        # By default it waits ten minutes for a server that does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._buffer: list[Any] = []
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if identity is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
                experiment = self._client.get_experiment_by_name(name)
                number = experiment.experiment_id if experiment else self._client.create_experiment(name)
                identity = str(self._client.create_run(number, run_name=folder.name).info.run_id)
                parameters = [Param(key, str(value)[:500]) for key, value in settings.items()]
                for start in range(0, len(parameters), 100):  # the most that one call takes
                    self._client.log_batch(identity, params=parameters[start : start + 100])
            else:
                self._client.set_terminated(identity, status="RUNNING")
        except (MlflowException, OSError) as error:
            raise EnvironmentProblem(
                f"mlflow at {uri} does not answer: {str(error).splitlines()[0][:200]}",
                hint="unset MLFLOW_TRACKING_URI to write to a file next to the runs",
                code="mlflow",
            ) from error
        self.identity, self.notice = identity, f"mlflow writes to {uri}"

    def add(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._buffer += [self._metric(name, value, now, step) for name, value in values.items()]

    def flush(self) -> None:
        for start in range(0, len(self._buffer), 1000):  # the most that one call takes
            self._client.log_batch(self.identity, metrics=self._buffer[start : start + 1000])
        self._buffer = []

    def finish(self, metrics: Mapping[str, float], images: Sequence[Path]) -> None:
        self.add({f"best/{name}": value for name, value in metrics.items()}, 0)
        self.flush()
        for path in images:
            self._client.log_artifact(self.identity, str(path), PLOTS)
        self._client.set_terminated(self.identity)


_Logger: TypeAlias = _TensorBoard | _WeightsAndBiases | _MLflow
"""`add` may buffer until `flush`; `finish` adds metrics and images of the run, and closes."""
