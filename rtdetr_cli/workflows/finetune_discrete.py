"""The second stage: finetune with discrete sampling, compare with the original, and recommend one of them.

Discrete sampling reads one pixel for each point, so that a runtime without GridSample can run the detector. Our
exports need no GridSample either way (they gather the four pixels themselves), so the discrete model is worthwhile
only if it is faster on the target, or if the target cannot run the gather either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.config.run import NAMED, RunConfig, resolve_run
from rtdetr_cli.config.schema import ModelSpec, OfficialSchedule
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.evaluate.bootstrap import Interval, compare, resample
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.evaluate.source import training_data
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.run import export_model
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.timing import images_to_time, latencies
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.runs import DISCRETE_RESULT, EXPORT, RunFolder, next_name, settings_file
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.events import Event, RunFinished
from rtdetr_cli.workflows.finetune import finetune, resume, run_config
from rtdetr_cli.workflows.prepare import load_data, training_sets
from rtdetr_cli.workflows.starting_weights import header_spec, nearest_preset, weights_file

EQUAL_SPEED = 0.05  # share of the original's latency within which the discrete export counts as equally fast
MIN_EPOCHS = 2
USELESS_AP = 0.05  # below this a model has hardly learned anything, and a comparison says nothing
DEFAULT_SHARE = 12 / 72  # of the first stage's epochs, for a preset without a published second stage


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table: its AP with an interval, and the difference from the original."""

    name: str
    ap: Interval
    ap50: float | None
    difference: Interval | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """The verified export of one model, and its latency in ONNX Runtime on this machine."""

    name: str
    artefact: Artefact
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the stage: the new run and its model, and how that compares with the original."""

    run: Path
    best: Path
    rows: tuple[Row, Row, Row]  # before, discrete without training, after
    exports: tuple[Exported, ...]  # of the original and of the discrete model
    recommendation: str
    drop: float  # AP that the discrete model lost; negative if it gained
    max_drop: float

    @property
    def passed(self) -> bool:
        """True if no more AP was lost than allowed and both exports passed verification."""
        return self.drop <= self.max_drop and all(e.artefact.passed for e in self.exports)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        table = [
            {
                "model": row.name,
                "ap": row.ap.to_json(),
                "ap50": row.ap50,
                "difference": row.difference.to_json() if row.difference else None,
            }
            for row in self.rows
        ]
        exports = [
            {
                "model": export.name,
                **export.artefact.to_json(),
                "milliseconds": export.milliseconds,
                "operators": export.artefact.operators,
            }
            for export in self.exports
        ]
        return {
            "run": str(self.run),
            "best": str(self.best),
            "table": table,
            "exports": exports,
            "recommendation": self.recommendation,
            "drop": self.drop,
            "max_drop": self.max_drop,
            "passed": self.passed,
        }


class FinetuneDiscrete:
    """One second stage. Call `before`, then `train` unless `trained`, then `after`.

    Args:
        model: the file that is finetuned.
        config: of the training, resolved by `plan_discrete`.
        max_drop: AP that may be lost, 0 to 1.
        resuming: the run exists and is to be resumed.
        notify: called with a line for each step of an export.
    """

    def __init__(
        self,
        model: Path,
        config: RunConfig,
        *,
        max_drop: float = 0.01,
        resuming: bool = False,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.config, self.max_drop, self.resuming, self.notify = model, config, max_drop, resuming, notify
        self.val = training_sets(load_data(config), config, [])[1]
        self.run = Path(config.settings.out) / config.settings.name
        self._device = config.settings.device.partition(",")[0]
        self._evaluations: list[Evaluation] = []

    @property
    def best(self) -> Path:
        """The best model of the training."""
        return RunFolder(self.run).best

    @property
    def trained(self) -> bool:
        """True if the training has finished: the stage was interrupted during the comparison."""
        return self.resuming and bool(RunFolder(self.run).finished)

    def before(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Evaluate the original, and the same weights with discrete sampling."""
        model, header = load_model(self.model)
        backend = TorchBackend(model.fuse(), header, device=self._device, imgsz=self.config.imgsz)
        self._evaluations.append(evaluate(backend, self.val, progress=progress))
        backend.model.set_sampling("discrete", self.config.settings.rounding)
        self._evaluations.append(evaluate(backend, self.val, progress=progress))

    def train(self, *, stop: StopFlag | None = None, argv: Sequence[str] = ()) -> Iterator[Event]:
        """Train with discrete sampling, from the beginning or from where it was interrupted."""
        events = resume(self.run, stop=stop) if self.resuming else finetune(self.config, stop=stop, argv=argv)
        for event in events:
            if isinstance(event, RunFinished):
                self.run = event.folder
            yield event

    def after(self, *, progress: Callable[[int], None] | None = None) -> Outcome:
        """Evaluate the trained model, export both, and compare them.

        Raises:
            RtdetrError: the training has written no model.
        """
        if not self.best.is_file():
            raise RtdetrError(f"the training has not written {self.best}", hint=f"rtdetr train --resume {self.run}")
        self._evaluations.append(evaluate(open_backend(self.best, device=self._device), self.val, progress=progress))
        rows = self._rows()
        exports = self._exports()
        outcome = Outcome(
            run=self.run,
            best=self.best,
            rows=rows,
            exports=exports,
            recommendation=recommend(rows, exports, max_drop=self.max_drop),
            drop=rows[0].ap.value - rows[2].ap.value,
            max_drop=self.max_drop,
        )
        text = json.dumps({"schema_version": 1, **outcome.to_json()}, indent=1, default=float)
        RunFolder(self.run).write(DISCRETE_RESULT, text + "\n")
        return outcome

    def _rows(self) -> tuple[Row, Row, Row]:
        original, untrained, after = self._evaluations
        ap = original.metrics["AP"] or 0.0

        def row(name: str, other: Evaluation) -> Row:
            tables, scores = (original.table, other.table), (ap, other.metrics["AP"] or 0.0)
            comparison, _ = compare(original.dataset, tables, scores)
            return Row(name, comparison.b, other.metrics["AP50"], comparison.difference)

        interval = resample(original.dataset, original.table).interval(ap)
        first = Row("bilinear, before", interval, original.metrics["AP50"])
        return first, row("discrete, not trained", untrained), row("discrete, finetuned", after)

    def _exports(self) -> tuple[Exported, ...]:
        artefacts: dict[str, Artefact] = {}
        for name, path, folder in (("original", self.model, f"{EXPORT}-original"), ("discrete", self.best, EXPORT)):
            model, header = load_model(path)
            header = replace(header, imgsz=self.config.imgsz)
            self.notify(f"export  {name}")
            (artefacts[name],) = export_model(
                model, header, self.run / folder, images=self.val, stem=self.best.stem, device="cpu", notify=self.notify
            )
        backends = [open_backend(artefact.path, device="cpu") for artefact in artefacts.values()]
        times = latencies(backends, images_to_time(self.val))
        return tuple(Exported(*pair, ms) for pair, ms in zip(artefacts.items(), times, strict=True))


def recommend(rows: tuple[Row, Row, Row], exports: Sequence[Exported], *, max_drop: float) -> str:
    """Return which of the two models to deploy, and why, as a sentence."""
    before, _, after = rows
    assert after.difference is not None
    difference = after.difference
    gap = f"{difference.value:+.3f} AP (95% interval {difference.lower:+.3f} to {difference.upper:+.3f})"
    failed = [e.name for e in exports if not e.artefact.passed]
    if failed:
        return f"deploy neither model yet: verification failed for the export of: {', '.join(failed)}"
    if max(before.ap.value, after.ap.value) < USELESS_AP:
        return (
            f"deploy neither model: both have hardly learned anything (AP {before.ap.value:.3f} and "
            f"{after.ap.value:.3f}); train the original for longer first"
        )
    if before.ap.value - after.ap.value > max_drop:
        return f"keep the original: discrete sampling costs more than {max_drop:g} AP: {gap}"
    if after.ap.value < USELESS_AP:
        return f"keep the original: the discrete model has hardly learned anything (AP {after.ap.value:.3f}): {gap}"
    original, discrete = exports[0].milliseconds, exports[1].milliseconds
    pace = "faster" if discrete < original else "slower"
    if abs(discrete - original) <= EQUAL_SPEED * original * (1 + 1e-9):  # the limit is inclusive
        pace = "as fast"
    speed = f"it is {pace} ({discrete:.1f} ms, the original {original:.1f} ms, in ONNX Runtime here)"
    if difference.lower > 0:
        return (
            f"deploy the discrete model: its AP is higher, {gap}; {speed}; it was also trained for longer, "
            "and the original might gain as much from the same training"
        )
    if pace == "faster":
        cost = "with a real loss of AP" if difference.upper < 0 else "without a measurable loss of AP"
        return f"deploy the discrete model where speed matters: {speed}, {cost}: {gap}"
    return (
        f"keep the original: the discrete model changes AP by {gap}; {speed}; the original's export needs no "
        "GridSample either; use the discrete model only for a runtime that is slow at gathering four pixels"
    )


# ---- settings ---------------------------------------------------------------------------------------------------


def plan_discrete(model: Path, header: ModelHeader, flags: Mapping[str, Any], *, sets: Sequence[str] = ()) -> RunConfig:
    """Resolve the settings of the second stage: those of the model's run, a share of its epochs, discrete sampling.

    `flags` are settings as given on the command line, `sets` the words of `--set`.

    Raises:
        UsageError: the model uses discrete sampling already, or no dataset is known.
    """
    if header.sampling == "discrete":
        raise UsageError(
            f"{model} uses discrete sampling already",
            hint="pass the run or model that it was made from; rtdetr train --set sampling=discrete trains it further",
            code="already-discrete",
        )
    given = {word.partition("=")[0].strip() for word in sets}
    if "sampling" in given:
        raise UsageError("finetune-discrete trains with discrete sampling; --set sampling cannot change that")
    run_settings = settings_file(model)
    # The file of a user's own preset may be gone; the run's settings hold all of it.
    first = resolve_run({} if run_settings else {"preset": preset_for(header)}, config_file=run_settings)
    published = first.preset.official
    # The run's own name, start and length belong to the first stage.
    base: dict[str, Any] = {
        "weights": str(model),
        "sampling": "discrete",
        "imgsz": header.imgsz,
        "name": "",
        "epochs": epochs_of(first.settings.epochs, published),
    }
    if "data" not in flags:
        trained_with = training_data(model, header)
        if trained_with is None:
            raise UsageError(
                f"no dataset given, and {model.name} does not record what it was trained on",
                hint="pass a dataset with --data DATA",
                code="data-missing",
            )
        base["data"] = str(trained_with.source)
        if trained_with.images is not None:
            base["images"] = str(trained_with.images)
    if published.discrete_epochs:
        base["calm"] = min(0.5, 1 - published.discrete_strong_until / published.discrete_epochs)
    config = resolve_run(
        {**{k: v for k, v in base.items() if k not in given}, **flags, "preset": first.settings.preset},
        sets=[*model_sets(header), *sets],
        config_file=run_settings,
    )
    if config.settings.name:
        return config
    stem = f"{Path(config.preset.name).stem}-{Path(str(config.settings.data)).stem}-discrete"
    name = next_name(Path(config.settings.out), stem)
    return replace(config, settings=replace(config.settings, name=name))


def open_stage(run: Path) -> tuple[Path, RunConfig]:
    """Return the model and the settings of a second stage that was started.

    Raises:
        UsageError: the folder is not a run, or not one of `finetune-discrete`.
        ModelError: the model that it started from is gone.
    """
    config = run_config(run)
    settings = config.settings
    if settings.sampling != "discrete" or settings.weights in NAMED["weights"]:
        raise UsageError(f"{run} is not a run of finetune-discrete", hint=f"rtdetr train --resume {run}")
    model = weights_file(settings.weights)
    if not model.is_file():
        raise ModelError(
            f"the model {model}, which {run} is compared with, no longer exists",
            hint=f"rtdetr train --resume {run} finishes the training without the comparison",
            code="model-missing",
        )
    # The folder may have been moved.
    parent, name = os.path.split(run.resolve())
    return model, replace(config, settings=replace(settings, out=parent, name=name))


def epochs_of(first: int, published: OfficialSchedule) -> int:
    """Return the epochs of the second stage: the published share of the first."""
    share = published.discrete_epochs / published.epochs if published.discrete_epochs else DEFAULT_SHARE
    return max(MIN_EPOCHS, round(first * share))


def preset_for(header: ModelHeader) -> str:
    """Return the preset of a model: its own, or the one with the most similar sizes.

    Raises:
        UsageError: no preset has its depth.
    """
    if header.preset and os.path.isfile(header.preset):
        return header.preset
    spec = header_spec(header.architecture)
    preset = nearest_preset(spec, header.preset) if spec is not None else None
    if spec is None or preset is None or preset.model.depth != spec.depth:
        raise UsageError("no preset has the backbone of this model", hint="rtdetr presets", code="preset-unknown")
    return preset.name


def model_sets(header: ModelHeader) -> list[str]:
    """Return the words of `--set` that make the preset's sizes those of the model."""
    known = ModelSpec.model_fields
    return [f"model.{key}={json.dumps(value)}" for key, value in header.architecture.items() if key in known]
