"""The second stage: discrete sampling, trained for a while, and whether it was worth it.

Discrete sampling reads one pixel for each point, so that a runtime without GridSample can run the detector. Our
exports need no GridSample either way (they gather the four pixels themselves), so the discrete model has to pay by
speed on the target, or by running where even the gather cannot. This measures both models and recommends one.

The stage changes what was published: the sampling, frozen offsets, and a shorter schedule. Nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.config.schema import ModelSpec, OfficialSchedule
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.evaluate.bootstrap import Interval, compare, resample
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.evaluate.source import training_data
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.events import Notice
from rtdetr_cli.export.run import export_events
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.runs import DISCRETE_RESULT, EXPORT, RunFolder, next_name, settings_file
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.events import Event, RunFinished
from rtdetr_cli.workflows.finetune import finetune, resume, run_config
from rtdetr_cli.workflows.prepare import load_data, training_sets
from rtdetr_cli.workflows.starting_weights import WORDS, header_spec, nearest_preset, weights_file
from rtdetr_cli.workflows.timing import images_to_time, measure

EQUAL_SPEED = 0.05  # share of the original's latency within which the discrete export counts as equally fast
ROUNDS = 3
MIN_EPOCHS = 2
DEFAULT_SHARE = 12 / 72  # of the first stage's epochs, for a preset without a published second stage
ROW_NAMES = {
    "before": "bilinear, before",
    "untrained": "discrete, not trained",
    "after": "discrete, finetuned",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table: its AP with an interval, and the difference from the original."""

    name: str
    ap: Interval
    ap50: float | None
    difference: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.name,
            "ap": self.ap.to_json(),
            "ap50": self.ap50,
            "difference": self.difference.to_json() if self.difference else None,
        }


@dataclass(frozen=True, slots=True)
class Exported:
    """The verified export of one model, and its latency in ONNX Runtime on this machine."""

    name: str
    artefact: Artefact
    milliseconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "model": self.name,
            **self.artefact.to_json(),
            "milliseconds": self.milliseconds,
            "operators": self.artefact.operators,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of the stage.

    Attributes:
        run: folder of the new run; best: its model.
        rows: before, discrete without training, after.
        exports: of the original and of the discrete model.
        recommendation: in plain words.
        drop: AP that the discrete model lost; negative if it gained.
        max_drop: AP that it was allowed to lose.
    """

    run: Path
    best: Path
    rows: tuple[Row, Row, Row]
    exports: tuple[Exported, ...]
    recommendation: str
    drop: float
    max_drop: float

    @property
    def passed(self) -> bool:
        """True if no more AP was lost than allowed and both exports passed verification."""
        return self.drop <= self.max_drop and all(e.artefact.passed for e in self.exports)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "run": str(self.run),
            "best": str(self.best),
            "table": [row.to_json() for row in self.rows],
            "exports": [e.to_json() for e in self.exports],
            "recommendation": self.recommendation,
            "drop": self.drop,
            "max_drop": self.max_drop,
            "passed": self.passed,
        }


@dataclass(slots=True, eq=False)
class FinetuneDiscrete:
    """One second stage. Call `before`, then `train` unless `trained`, then `after`.

    Attributes:
        model: the file that is finetuned.
        config: of the training, resolved by `plan_discrete`.
        max_drop: AP that may be lost, 0 to 1.
        resamples: of the intervals.
        resuming: the run exists and is to be resumed.
        tell: receives a line for each step of an export.
        val: the images to evaluate on.
        run: folder of the new run; best: its model.
    """

    model: Path
    config: RunConfig
    max_drop: float = 0.01
    resamples: int = 1000
    resuming: bool = False
    tell: Callable[[str], None] = lambda text: None
    val: Dataset = field(init=False)
    run: Path = field(init=False)
    best: Path = field(init=False)
    _evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.config.settings
        self.val = training_sets(load_data(self.config), self.config, [])[1]
        self.run = Path(settings.out) / settings.name
        self.best = RunFolder(self.run).best

    def before(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Evaluate the original, and the same weights with discrete sampling."""
        for name, sampling in (("before", None), ("untrained", "discrete")):
            model, header = load_model(self.model, sampling=sampling)
            if sampling is not None:
                model.set_sampling("discrete", self.config.settings.rounding)
            backend = TorchBackend(model.fuse(), header, device=self._device, imgsz=self.config.imgsz)
            self._evaluations[name] = evaluate(backend, self.val, progress=progress)

    @property
    def trained(self) -> bool:
        """True if the training has finished: the stage was interrupted during the comparison."""
        return self.resuming and bool(RunFolder(self.run).finished)

    def train(self, *, stop: StopFlag | None = None, argv: Sequence[str] = ()) -> Iterator[Event]:
        """Train with discrete sampling, from the beginning or from where it was interrupted."""
        events = resume(self.run, stop=stop) if self.resuming else finetune(self.config, stop=stop, argv=argv)
        for event in events:
            if isinstance(event, RunFinished):
                self.run, self.best = event.folder, event.best
            yield event

    def after(self, *, progress: Callable[[int], None] | None = None) -> Outcome:
        """Evaluate the trained model, export both, and compare them.

        Raises:
            RtdetrError: the training left no model.
        """
        if not self.best.is_file():
            raise RtdetrError(f"the training left no {self.best}", hint=f"rtdetr train --resume {self.run}")
        backend = open_backend(self.best, device=self._device)
        self._evaluations["after"] = evaluate(backend, self.val, progress=progress)
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

    @property
    def _device(self) -> str:
        return self.config.settings.device.partition(",")[0]

    def _rows(self) -> tuple[Row, Row, Row]:
        original = self._evaluations["before"]
        ap = original.metrics["AP"] or 0.0
        resampled = resample(original.dataset, original.table, resamples=self.resamples)
        rows = [Row(ROW_NAMES["before"], resampled.interval(ap), original.metrics["AP50"])]
        for name in ("untrained", "after"):
            other = self._evaluations[name]
            comparison, _ = compare(
                original.dataset,
                (original.table, other.table),
                (ap, other.metrics["AP"] or 0.0),
                resamples=self.resamples,
            )
            rows.append(Row(ROW_NAMES[name], comparison.b, other.metrics["AP50"], comparison.difference))
        return rows[0], rows[1], rows[2]

    def _exports(self) -> tuple[Exported, ...]:
        artefacts: dict[str, Artefact] = {}
        for name, path, folder in (
            ("original", self.model, self.run / f"{EXPORT}-original"),
            ("discrete", self.best, self.run / EXPORT),
        ):
            model, header = load_model(path)
            self.tell(f"export  {name}")
            header = replace(header, imgsz=self.config.imgsz)
            for event in export_events(model, header, folder, images=self.val, stem=self.best.stem, device="cpu"):
                if isinstance(event, Notice):
                    self.tell(event.message)
                elif isinstance(event, Artefact):
                    artefacts[name] = event
        times = latencies([artefact.path for artefact in artefacts.values()], self.val)
        return tuple(Exported(*pair, ms) for pair, ms in zip(artefacts.items(), times, strict=True))


def latencies(paths: Sequence[Path], dataset: Dataset) -> list[float]:
    """Return the median milliseconds of the network for each graph, batch 1, in ONNX Runtime on the CPU.

    The graphs take turns, so that other load on the machine slows all of them equally.
    """
    backends = [open_backend(path, device="cpu") for path in paths]
    sources = images_to_time(dataset)
    times: list[list[float]] = [[] for _ in backends]
    for _ in range(ROUNDS):
        for measured, backend in zip(times, backends, strict=True):
            measured.append(measure(backend, sources, batch=1, warmup=3, runs=10)["network"].median)
    return [statistics.median(measured) for measured in times]


def recommend(rows: tuple[Row, Row, Row], exports: Sequence[Exported], *, max_drop: float) -> str:
    """Say in plain words which of the two models to deploy."""
    before, _, after = rows
    assert after.difference is not None
    difference = after.difference
    gap = f"{difference.value:+.3f} AP (95% interval {difference.lower:+.3f} to {difference.upper:+.3f})"
    failed = [e.name for e in exports if not e.artefact.passed]
    if failed:
        return f"deploy neither model yet: the export of the {' and the '.join(failed)} model failed verification"
    if before.ap.value - after.ap.value > max_drop:
        return f"keep the original: discrete sampling costs more than {max_drop:g} AP: {gap}"
    original, discrete = exports[0].milliseconds, exports[1].milliseconds
    pace = _pace(discrete, original)
    speed = f"it is {pace} ({discrete:.1f} ms, the original {original:.1f} ms, in ONNX Runtime here)"
    if difference.lower > 0:
        return (
            f"deploy the discrete model: its AP is higher, {gap}; {speed}; it was also trained for longer, "
            "which may explain the gain: the original might gain as much from the same training"
        )
    if pace == "faster":
        cost = "without a measurable loss of AP" if difference.upper >= 0 else "with a real loss of AP"
        return f"deploy the discrete model where speed matters: {speed}, {cost}: {gap}"
    return (
        f"keep the original: it is {'as fast' if pace == 'as fast' else 'faster'} ({original:.1f} ms, the discrete "
        f"model {discrete:.1f} ms, in ONNX Runtime here), its export needs no GridSample either, and the discrete "
        f"model changes AP by {gap}; use the discrete model only for a runtime that is slow at gathering four pixels"
    )


def _pace(milliseconds: float, reference: float) -> str:
    """Return `faster`, `as fast` or `slower`; a difference of `EQUAL_SPEED` is none."""
    if abs(milliseconds - reference) <= EQUAL_SPEED * reference * (1 + 1e-9):  # the limit itself is within
        return "as fast"
    return "faster" if milliseconds < reference else "slower"


# ---- settings ---------------------------------------------------------------------------------------------------


def plan_discrete(model: Path, header: ModelHeader, flags: Mapping[str, Any], *, sets: Sequence[str] = ()) -> RunConfig:
    """Resolve the settings of the second stage: those of the model's run, a share of its epochs, discrete sampling.

    Args:
        model: the file that is finetuned.
        header: of it.
        flags: setting -> value, as given on the command line.
        sets: the words of `--set`.

    Raises:
        UsageError: the model uses discrete sampling already, or no dataset is known.
    """
    if header.sampling == "discrete":
        raise UsageError(
            f"{model} uses discrete sampling already",
            hint="name the run or model that it was made from; rtdetr train --set sampling=discrete trains it further",
            code="already-discrete",
        )
    given = {word.partition("=")[0].strip() for word in sets}
    if "sampling" in given:
        raise UsageError("finetune-discrete trains with discrete sampling; --set sampling cannot change that")
    run_settings = settings_file(model)
    trained_with = training_data(model, header)
    base: dict[str, Any] = {"weights": str(model), "sampling": "discrete", "imgsz": header.imgsz, "name": ""}
    if "data" not in flags:
        if trained_with is None:
            raise UsageError(
                f"no dataset given, and {model.name} does not say what it was trained on",
                hint="name a dataset with --data DATA",
                code="data-missing",
            )
        base["data"] = str(trained_with.source)
        if trained_with.images is not None:
            base["images"] = str(trained_with.images)
    earlier = resolve_run({}, config_file=run_settings) if run_settings is not None else None
    # The run's own name, start and length belong to the first stage.
    preset = flags.get("preset") or (earlier.settings.preset if earlier is not None else preset_for(header))
    # The file of a user's own preset may be gone; the run's settings hold all of it.
    published = resolve_run({"preset": preset}, config_file=run_settings).preset.official
    if "epochs" not in flags:
        first = earlier.settings.epochs if earlier is not None else resolve_run({}).settings.epochs
        base["epochs"] = epochs_of(first, published)
    if published.discrete_epochs:
        base["calm"] = min(0.5, 1 - published.discrete_strong_until / published.discrete_epochs)
    config = resolve_run(
        {**{k: v for k, v in base.items() if k not in given}, **flags, "preset": preset},
        sets=[*model_sets(header), *sets],
        config_file=run_settings,
    )
    if config.settings.name:
        return config
    stem = f"{Path(config.preset.name).stem}-{Path(str(config.settings.data)).stem}-discrete"
    return _with_settings(config, name=next_name(Path(config.settings.out), stem))


def open_stage(run: Path) -> tuple[Path, RunConfig]:
    """Return the model and the settings of a second stage that was started.

    Raises:
        UsageError: the folder is not a run, or not one of `finetune-discrete`.
        ModelError: the model that it started from is gone.
    """
    config = run_config(run)
    settings = config.settings
    if settings.sampling != "discrete" or settings.weights in WORDS:
        raise UsageError(f"{run} is not a run of finetune-discrete", hint=f"rtdetr train --resume {run}")
    model = weights_file(settings.weights)
    if not model.is_file():
        raise ModelError(
            f"the model {model}, which {run} is compared with, no longer exists",
            hint=f"rtdetr train --resume {run} finishes the training without the comparison",
            code="model-missing",
        )
    # The folder may have been moved.
    return model, _with_settings(config, out=os.fspath(run.resolve().parent), name=run.resolve().name)


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


def _with_settings(config: RunConfig, **settings: Any) -> RunConfig:
    return replace(config, settings=replace(config.settings, **settings))
