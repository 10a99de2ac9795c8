"""The second stage: discrete sampling, trained for a while, and the honest question whether it is worth it.

Discrete sampling reads one pixel for each point, so that a runtime without GridSample can run the detector. Our
exports need no GridSample either way (they gather the four pixels themselves), so the discrete model has to earn its
place: by speed on the target, or by a runtime that cannot even do that. This measures both sides and says so.

What the stage changes, as published: the sampling, frozen offsets, and a shorter schedule. Nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.config.run import RunConfig, resolve_run
from rtdetr_cli.config.schema import ModelSpec, OfficialSchedule
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.evaluate.bootstrap import Interval, compare, resample
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.evaluate.source import own_data
from rtdetr_cli.export.run import Artefact, export_model
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.runs import CONFIG, RunFolder
from rtdetr_cli.train.checkpoint import load_checkpoint
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.benchmark import images_to_time, measure
from rtdetr_cli.workflows.finetune import EndReport, Event, config_of, finetune, resume
from rtdetr_cli.workflows.prepare import training_sets
from rtdetr_cli.workflows.start import WORDS, weights_file

RESULT = "discrete.json"
AS_FAST = 0.05  # share of the original's latency within which the discrete export counts as equally fast
ROUNDS = 3
FEWEST_EPOCHS = 2
USUAL_SHARE = 12 / 72  # of the first stage, where nothing was published for a preset


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table: its AP with an interval, and what that is beside the original."""

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
    """The export of one model: its latency in ONNX Runtime on this machine, its operators, the gate's word."""

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
    """What the stage came to.

    Attributes:
        run: folder of the new run; best: its model.
        rows: before, discrete without training, after.
        exports: of the original and of the discrete model.
        recommendation: in plain words.
        drop: AP lost by the discrete model; negative where it won.
        passed: whether no more was lost than allowed.
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
        """True when no more AP was lost than allowed, and both exports passed their gate."""
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
    """One second stage; the steps are called in the order in which they stand.

    Attributes:
        model: the file that is finetuned.
        config: of the training, resolved by `plan_discrete`.
        max_drop: AP that may be lost, 0 to 1.
        resamples: of the intervals.
        begun: whether the run exists, and is to go on.
    """

    model: Path
    config: RunConfig
    max_drop: float = 0.01
    resamples: int = 1000
    begun: bool = False
    tell: Callable[[str], None] = lambda text: None
    val: Dataset = field(init=False)
    run: Path = field(init=False)
    best: Path = field(init=False)
    _found: dict[str, Evaluation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = self.config.settings
        assert settings.data is not None
        splits = load_splits(
            Path(settings.data),
            images=Path(settings.images) if settings.images else None,
            val_fraction=settings.val_fraction,
            seed=settings.seed,
        )
        self.val = training_sets(splits, self.config, [])[1]
        self.run = Path(settings.out) / settings.name
        self.best = self.run / "best.safetensors"

    def before(self, *, progress: Callable[[int], None] | None = None) -> None:
        """Measure the original, and the same weights with discrete sampling."""
        for name, sampling in (("before", None), ("untrained", "discrete")):
            model, header = load_model(self.model, sampling=sampling)
            if sampling is not None:
                model.set_sampling("discrete", self.config.settings.rounding)
            backend = TorchBackend(model.fuse(), header, device=self._device, imgsz=self.config.imgsz)
            self._found[name] = evaluate(backend, self.val, progress=progress)

    @property
    def trained(self) -> bool:
        """True when there is nothing left to train: the stage was ended while it was judged."""
        if not self.begun or RunFolder(self.run).untrained:
            return False
        return bool(load_checkpoint(self.run)[0]["place"]["finished"])

    def train(self, *, stop: StopFlag | None = None, argv: Sequence[str] = ()) -> Iterator[Event]:
        """Train with discrete sampling, from the beginning or from where it was interrupted."""
        events = resume(self.run, stop=stop) if self.begun else finetune(self.config, stop=stop, argv=argv)
        for event in events:
            if isinstance(event, EndReport):
                self.run, self.best = event.folder, event.best
            yield event

    def after(self, *, progress: Callable[[int], None] | None = None) -> Outcome:
        """Measure the trained model, export both, and weigh them.

        Raises:
            RtdetrError: the training left no model.
        """
        if not self.best.is_file():
            raise RtdetrError(f"the training left no {self.best}", hint=f"rtdetr train --resume {self.run}")
        backend = open_backend(self.best, device=self._device)
        self._found["after"] = evaluate(backend, self.val, progress=progress)
        rows = self._rows()
        exports = self._exports()
        drop = rows[0].ap.value - rows[2].ap.value
        outcome = Outcome(
            run=self.run,
            best=self.best,
            rows=rows,
            exports=exports,
            recommendation=recommend(rows, exports, max_drop=self.max_drop),
            drop=drop,
            max_drop=self.max_drop,
        )
        text = json.dumps({"schema_version": 1, **outcome.to_json()}, indent=1, default=float)
        (self.run / RESULT).write_text(text + "\n", encoding="utf-8")
        return outcome

    @property
    def _device(self) -> str:
        return self.config.settings.device.partition(",")[0]

    def _rows(self) -> tuple[Row, Row, Row]:
        names = {
            "before": "bilinear, before",
            "untrained": "discrete, not trained",
            "after": "discrete, finetuned",
        }
        original = self._found["before"]
        value = original.metrics["AP"] or 0.0
        drawn = resample(original.dataset, original.table, resamples=self.resamples)
        rows = [Row(names["before"], drawn.interval(value), original.metrics["AP50"])]
        for name in ("untrained", "after"):
            found = self._found[name]
            other = found.metrics["AP"] or 0.0
            comparison, _ = compare(
                original.dataset, (original.table, found.table), (value, other), resamples=self.resamples
            )
            rows.append(Row(names[name], comparison.b, found.metrics["AP50"], comparison.difference))
        return rows[0], rows[1], rows[2]

    def _exports(self) -> tuple[Exported, ...]:
        made: list[tuple[str, Artefact]] = []
        for name, path, folder in (
            ("original", self.model, self.run / "export-original"),
            ("discrete", self.best, self.run / "export"),
        ):
            model, header = load_model(path)
            self.tell(f"export  {name}")
            header = replace(header, imgsz=self.config.imgsz)
            artefacts = export_model(
                model, header, folder, images=self.val, stem=self.best.stem, tell=self.tell, device="cpu"
            )
            made.append((name, artefacts[0]))
        times = latencies([a.path for _, a in made], self.val)
        return tuple(Exported(name, a, t) for (name, a), t in zip(made, times, strict=True))


def latencies(paths: Sequence[Path], dataset: Dataset) -> list[float]:
    """Return the median milliseconds of the network for each graph, batch 1, in ONNX Runtime on the CPU.

    The graphs take turns, so that whatever else the machine does hurts them alike.
    """
    backends = [open_backend(path, device="cpu") for path in paths]
    sources = images_to_time(dataset)
    found: list[list[float]] = [[] for _ in backends]
    for _ in range(ROUNDS):
        for times, backend in zip(found, backends, strict=True):
            times.append(measure(backend, sources, batch=1, warmup=3, runs=10)["network"].median)
    return [sorted(times)[len(times) // 2] for times in found]


def recommend(rows: tuple[Row, Row, Row], exports: Sequence[Exported], *, max_drop: float) -> str:
    """Say in plain words which of the two to deploy."""
    before, _, after = rows
    assert after.difference is not None
    gap = after.difference
    told = f"{gap.value:+.3f} AP (95 %: {gap.lower:+.3f} to {gap.upper:+.3f})"
    failed = [e.name for e in exports if not e.artefact.passed]
    if failed:
        return f"deploy neither yet: the export of the {' and the '.join(failed)} model did not pass its gate"
    if before.ap.value - after.ap.value > max_drop:
        return f"keep the original: discrete sampling costs more than {max_drop:g} AP: {told}"
    original, discrete = exports[0].milliseconds, exports[1].milliseconds
    word = _pace(discrete, original)
    speed = f"it is {word} ({discrete:.1f} ms against {original:.1f} ms of the original in ONNX Runtime here)"
    if gap.lower > 0:
        return (
            f"deploy the discrete model: it is the better one, {told}; {speed}; it has also been trained for longer, "
            "which may be the gain: the original, trained as long, might be as good"
        )
    if word == "faster":
        cost = "for no difference in AP that can be told" if gap.upper >= 0 else "at a real loss of AP"
        return f"deploy the discrete model where speed counts: {speed}, {cost}: {told}"
    own = "as fast" if word == "as fast" else "faster"
    return (
        f"keep the original: it is {own} ({original:.1f} ms against {discrete:.1f} ms of the discrete model in ONNX "
        f"Runtime here), its export holds no GridSample either, and the discrete model brings {told}; take the "
        "discrete one only for a runtime that is slow at the gather of four pixels"
    )


def _pace(milliseconds: float, beside: float) -> str:
    """Return `faster`, `as fast` or `slower`; a difference of `AS_FAST` is none."""
    if abs(milliseconds - beside) <= AS_FAST * beside * (1 + 1e-9):  # the bound itself is within
        return "as fast"
    return "faster" if milliseconds < beside else "slower"


# ------------------------------------------------------------------------------------------------------- plan


def plan_discrete(model: Path, header: ModelHeader, flags: Mapping[str, Any], *, sets: Sequence[str] = ()) -> RunConfig:
    """Resolve the settings of the second stage: those of the model's run, a share of its epochs, discrete sampling.

    Args:
        model: the file that is finetuned.
        header: of it.
        flags: setting -> value, as given on the command line.
        sets: the words of `--set`.

    Raises:
        UsageError: it samples discretely already, or no dataset is known.
    """
    if header.sampling == "discrete":
        raise UsageError(
            f"{model} samples discretely already",
            hint="name the run or model that it was made from; rtdetr train --set sampling=discrete trains it further",
            code="already-discrete",
        )
    given = {word.partition("=")[0].strip() for word in sets}
    if "sampling" in given:
        raise UsageError("finetune-discrete trains with discrete sampling; --set sampling cannot change that")
    settings_file = next((f / CONFIG for f in (model.parent, model.parent.parent) if (f / CONFIG).is_file()), None)
    own = own_data(model, header)
    base: dict[str, Any] = {"weights": str(model), "sampling": "discrete"}
    if "data" not in flags:
        if own is None:
            raise UsageError(
                f"no dataset is named, and {model.name} does not say what it was trained on",
                hint="--data DATA names a dataset",
                code="data-missing",
            )
        base["data"] = str(own.source)
        if own.images is not None:
            base["images"] = str(own.images)
    earlier = resolve_run({}, config_file=settings_file) if settings_file is not None else None
    # The run's own name, start and length belong to the first stage.
    preset = flags.get("preset") or (earlier.settings.preset if earlier is not None else preset_for(header))
    # The file of a preset of one's own may be gone; the run's settings hold all of it.
    published = resolve_run({"preset": preset}, config_file=settings_file).preset.official
    if "epochs" not in flags:
        first = earlier.settings.epochs if earlier is not None else resolve_run({}).settings.epochs
        base["epochs"] = epochs_of(first, published)
    if published.discrete_epochs:
        base["calm"] = min(0.5, 1 - published.discrete_strong_until / published.discrete_epochs)
    base["imgsz"] = header.imgsz
    base["name"] = ""
    config = resolve_run(
        {**{k: v for k, v in base.items() if k not in given}, **flags, "preset": preset},
        sets=[*model_sets(header), *sets],
        config_file=settings_file,
    )
    if config.settings.name:
        return config
    return named(config, own.source if own is not None and "data" not in flags else Path(str(config.settings.data)))


def begun_stage(run: Path) -> tuple[Path, RunConfig]:
    """Return the model and the settings of a second stage that was begun.

    Raises:
        UsageError: it is no run, or none of `finetune-discrete`.
        ModelError: the model that it began with is gone.
    """
    config = config_of(run)
    settings = config.settings
    if settings.sampling != "discrete" or settings.weights in WORDS:
        raise UsageError(f"{run} is not a run of finetune-discrete", hint=f"rtdetr train --resume {run}")
    model = weights_file(settings.weights)
    if not model.is_file():
        raise ModelError(
            f"the model {model}, which {run} is compared with, is not there any more",
            hint=f"rtdetr train --resume {run} trains to the end without the comparison",
            code="model-missing",
        )
    # The folder may have been moved since.
    place = {"out": os.fspath(run.resolve().parent), "name": run.resolve().name}
    return model, replace(config, settings=replace(settings, **place))


def named(config: RunConfig, data: Path) -> RunConfig:
    """Give the run a name that says what it is, with the next free number."""
    stem = f"{Path(config.preset.name).stem}-{data.stem}-discrete"
    out = Path(config.settings.out)
    number = 1
    while (out / f"{stem}-{number:02d}").exists():
        number += 1
    settings = replace(config.settings, name=f"{stem}-{number:02d}")
    return replace(config, settings=settings)


def epochs_of(first: int, published: OfficialSchedule) -> int:
    """Return the epochs of the second stage: the published share of the first."""
    share = published.discrete_epochs / published.epochs if published.discrete_epochs else USUAL_SHARE
    return max(FEWEST_EPOCHS, round(first * share))


def preset_for(header: ModelHeader) -> str:
    """Return the preset of a model: its own, or the one whose sizes differ in the fewest values.

    Raises:
        UsageError: no preset has its depth.
    """
    names = preset_names()
    if header.preset in names or (header.preset and os.path.isfile(header.preset)):
        return header.preset

    def differing(name: str) -> int:
        spec = load_preset(name).model.model_dump(mode="json")
        return sum(spec.get(key) != value for key, value in header.architecture.items())

    alike = [n for n in names if load_preset(n).model.depth == header.architecture.get("depth")]
    if not alike:
        raise UsageError("no preset has the backbone of this model", hint="rtdetr presets", code="preset-unknown")
    return min(alike, key=differing)


def model_sets(header: ModelHeader) -> list[str]:
    """Return the words of `--set` that make the preset's sizes those of the model."""
    known = ModelSpec.model_fields
    return [f"model.{key}={json.dumps(value)}" for key, value in header.architecture.items() if key in known]
