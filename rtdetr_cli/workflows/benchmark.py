"""How quick and how good: one model in every runtime, and one model at every setting of its speed dial.

The method, since such figures invite dispute: images are read from their files; one run takes a batch from its
files to `Detections`, and is timed in three parts. Preprocessing is reading, stretching and turning into the
network's input, in one thread; the network is the runtime's call and nothing else, waited for on a GPU;
post-processing is what is left. Warm-up runs come first and are thrown away. The figures are the median and the
90th percentile of single runs. AP is of the whole split, by the same backend with the same settings.
"""

from __future__ import annotations

import itertools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, ModelError, UsageError
from rtdetr_cli.evaluate.bootstrap import Interval, Resamples, resample
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import Backend, check_model_path, open_backend
from rtdetr_cli.weights.header import EXPORT_SUFFIXES

BACKENDS = ("torch", "onnx", "openvino", "tensorrt")
PACKAGES = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
FORMATS = {"onnx": "onnx", "openvino": "openvino", "tensorrt": "trt-fp16"}
SWEEPS = ("layers", "queries", "imgsz")
PARTS = ("preprocess", "network", "postprocess", "total")
IMAGES_TIMED = 16  # that the timed runs go round: a single one would always lie in the cache
QUERY_SHARES = (1.0, 2 / 3, 1 / 3, 1 / 6)
SIZE_SHARES = (1.0, 0.75, 0.5)


# --------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, slots=True)
class Setting:
    """One position of the speed dial; None keeps what the model has."""

    layers: int | None = None
    queries: int | None = None
    imgsz: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 90th percentile of single runs, in milliseconds."""

    median: float
    p90: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        model: file that was named.
        backend: one of `BACKENDS`.
        precision: of the network: `fp32` or `fp16`.
        device: what it ran on.
        imgsz: (height, width).
        layers, queries: that were used; None for a foreign graph, which does not say.
        batch: images in a run.
        times: `PARTS` to their spread.
        ap: AP of the split; None without a dataset.
        metrics: the twelve numbers.
        difference: AP minus that of the first row of the table, with its paired interval; None for that row.
        front: True where nothing is both quicker and better.
    """

    model: str
    backend: str
    precision: str
    device: str
    imgsz: tuple[int, int]
    layers: int | None
    queries: int | None
    batch: int
    times: dict[str, Spread]
    ap: float | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    difference: Interval | None = None
    front: bool = False

    @property
    def setting(self) -> str:
        """The position of the dial in words."""
        parts = [f"{self.imgsz[0]}" if self.imgsz[0] == self.imgsz[1] else f"{self.imgsz[0]}x{self.imgsz[1]}"]
        parts += [f"{self.layers} layer{'s' * (self.layers > 1)}"] if self.layers else []
        parts += [f"{self.queries} quer{'ies' if self.queries > 1 else 'y'}"] if self.queries else []
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        document = asdict(self)
        document["imgsz"] = list(self.imgsz)
        document["difference"] = None if self.difference is None else self.difference.to_json()
        document["pictures_per_second"] = 1000 * self.batch / self.times["total"].median
        return document


@dataclass(frozen=True, slots=True)
class Skipped:
    """A backend that is not there, and why; only where the user did not ask for it by name."""

    backend: str
    reason: str


# ------------------------------------------------------------------------------------------------- what to run


def choose_backends(wanted: str | None) -> tuple[list[str], list[Skipped]]:
    """Read `--backends`, or find out what this machine has.

    Raises:
        UsageError: an unknown backend.
        EnvironmentProblem: one that was asked for by name is not installed.
    """
    if wanted is None:
        there = [name for name in BACKENDS if _installed(name)]
        return there, [Skipped(n, f"{PACKAGES[n]} is not installed") for n in BACKENDS if n not in there]
    names = [name.strip().lower() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise UsageError(
            f"there is no backend {unknown[0]!r}" if unknown else "--backends names no backend",
            hint=f"--backends {','.join(BACKENDS)}, or some of them",
            code="backend",
        )
    for name in names:
        if not _installed(name):
            raise EnvironmentProblem(
                f"the backend {name} needs the package {PACKAGES[name]}, which is not installed",
                hint=f"pip install {PACKAGES[name]}",
                code="package-missing",
            )
    return list(dict.fromkeys(names)), []


def _installed(backend: str) -> bool:
    return util.find_spec(PACKAGES[backend]) is not None


def parse_sweep(text: str) -> dict[str, list[str]]:
    """Read `layers,queries,imgsz`, each alone or with values: `layers=1/3,imgsz=320/480x640`.

    Raises:
        UsageError: an unknown name.
    """
    found: dict[str, list[str]] = {}
    for word in text.split(","):
        name, _, values = word.strip().partition("=")
        if name not in SWEEPS or name in found:
            problem = f"--sweep {text}: {name!r} is " + ("named twice" if name in found else "nothing to sweep")
            raise UsageError(problem, hint="--sweep layers,queries,imgsz, or with values: layers=1/2/3", code="sweep")
        found[name] = [v for v in values.split("/") if v]
    return found


def sweep_settings(sweep: dict[str, list[str]], *, layers: int, queries: int, imgsz: tuple[int, int]) -> list[Setting]:
    """Return every combination, the model's own setting first.

    Args:
        sweep: of `parse_sweep`; a name without values gets some below the model's own.
        layers: the model's own, which are the most it can use.
        queries: likewise.
        imgsz: the model's own (height, width); others may be larger.

    Raises:
        UsageError: a value that the model cannot take.
    """
    own = Setting(layers, queries, imgsz)
    chosen_layers = _counts("layers", sweep, layers, list(range(layers, 0, -1)))
    chosen_queries = _counts("queries", sweep, queries, [max(1, round(queries * share)) for share in QUERY_SHARES])
    sizes = [imgsz]
    if "imgsz" in sweep:
        default = [(_multiple(imgsz[0] * s), _multiple(imgsz[1] * s)) for s in SIZE_SHARES]
        sizes = [_size(v) for v in sweep["imgsz"]] or default
    settings = [Setting(*values) for values in itertools.product(chosen_layers, chosen_queries, sizes)]
    return [own, *(s for s in dict.fromkeys(settings) if s != own)]


def _counts(name: str, sweep: dict[str, list[str]], own: int, default: list[int]) -> list[int]:
    if name not in sweep:
        return [own]
    values = sweep[name]
    bad = [v for v in values if not v.isdecimal() or not 1 <= int(v) <= own]
    if bad:
        raise UsageError(f"--sweep {name}={bad[0]}: this model has 1 to {own} {name}", code="sweep")
    return [int(v) for v in values] or default


def _multiple(side: float) -> int:
    return max(32, round(side / 32) * 32)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    sides = [int(p) for p in parts if p.isdecimal()]
    if len(sides) != len(parts) or len(parts) > 2 or any(s % 32 or s < 32 for s in sides):
        raise UsageError(f"--sweep imgsz={text} is not a size of multiples of 32", code="size")
    return sides[0], sides[-1]


# ------------------------------------------------------------------------------------------------------- time


class Stopwatch:
    """Time the three parts of a backend's runs, on the backend itself and without changing what it computes."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._enter = self._leave = 0.0
        self._wait: Callable[[], None] = lambda: None
        self._hooks: list[Any] = []
        if backend.kind == "torch":
            self._watch_torch()
        else:
            self._watch_graph()

    def _watch_graph(self) -> None:
        infer = self.backend.infer  # type: ignore[attr-defined]

        def timed(feeds: Any) -> Any:
            self._enter = time.perf_counter()
            outputs = infer(feeds)
            self._leave = time.perf_counter()
            return outputs

        self.backend.infer = timed  # type: ignore[attr-defined]
        self._infer = infer

    def _watch_torch(self) -> None:
        import torch

        device = self.backend.device  # type: ignore[attr-defined]
        if device.type == "cuda":
            self._wait = lambda: torch.cuda.synchronize(device)

        def enter(module: Any, inputs: Any) -> None:
            self._wait()
            self._enter = time.perf_counter()

        def leave(module: Any, inputs: Any, outputs: Any) -> None:
            self._wait()
            self._leave = time.perf_counter()

        model = self.backend.model  # type: ignore[attr-defined]
        self._hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]

    def close(self) -> None:
        """Take the watch off."""
        for hook in self._hooks:
            hook.remove()
        if self.backend.kind != "torch":
            self.backend.infer = self._infer  # type: ignore[attr-defined]

    def run(self, sources: Sequence[Path | bytes]) -> dict[str, float]:
        """Take a batch from its files to detections; return the milliseconds of each part."""
        start = time.perf_counter()
        images, sizes = [], []
        for source in sources:
            image = read_image(source)
            sizes.append((image.shape[1], image.shape[0]))
            images.append(stretch(image, self.backend.imgsz))
        self.backend.run(np.stack(images), np.asarray(sizes, np.int64))
        self._wait()
        end = time.perf_counter()
        seconds = (self._enter - start, self._leave - self._enter, end - self._leave, end - start)
        return {part: 1000 * s for part, s in zip(PARTS, seconds, strict=True)}


def measure(
    backend: Backend, sources: Sequence[Path | bytes], *, batch: int, warmup: int, runs: int
) -> dict[str, Spread]:
    """Time a backend; see the module's account of the method.

    Args:
        backend: opened.
        sources: image files, or their bytes; the runs go round them.
        batch: images in a run.
        warmup: runs thrown away.
        runs: runs that count.
    """
    watch = Stopwatch(backend)
    supply = itertools.cycle(sources)
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    try:
        for number in range(warmup + runs):
            took = watch.run(list(itertools.islice(supply, batch)))
            if number >= warmup:
                for part in PARTS:
                    times[part].append(took[part])
    finally:
        watch.close()
    return {part: Spread(float(np.median(t)), float(np.quantile(t, 0.9))) for part, t in times.items()}


def images_to_time(dataset: Dataset | None) -> list[Path | bytes]:
    """Return images of the split, spread over it; without one, a made photograph of 640 x 480 px in memory."""
    if dataset is not None and len(dataset):
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(IMAGES_TIMED, len(dataset))).astype(int))
        return [dataset.path(int(i)) for i in chosen]
    return [_made_image()]


def _made_image() -> bytes:
    import io

    from PIL import Image

    coarse = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    image: NDArray[np.uint8] = stretch(coarse, (480, 640))
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=90)
    return stream.getvalue()


# -------------------------------------------------------------------------------------------------- benchmark


@dataclass(frozen=True, slots=True)
class Plan:
    """What one benchmark measures.

    Attributes:
        models: files.
        backends: of `BACKENDS`, for models that are weights; an exported file runs in its own.
        settings: positions of the dial for each model; one without a sweep.
        batch, warmup, runs: of the timing.
        device: for torch, ONNX Runtime and TensorRT.
        threads: of the CPU.
    """

    models: tuple[Path, ...]
    backends: tuple[str, ...]
    settings: dict[Path, list[Setting]]
    batch: int = 1
    warmup: int = 10
    runs: int = 50
    device: str = "auto"
    threads: int | None = None

    def points(self) -> list[tuple[Path, str, Setting]]:
        """Return every (model, backend, setting) to be measured."""
        found: list[tuple[Path, str, Setting]] = []
        for model in self.models:
            own = EXPORT_SUFFIXES.get(model.suffix.lower())
            for backend in (own,) if own else self.backends:
                found.extend((model, backend, setting) for setting in self.settings[model])
        return found


def plan(
    models: Sequence[Path],
    *,
    backends: Sequence[str],
    sweep: dict[str, list[str]] | None = None,
    batch: int = 1,
    warmup: int = 10,
    runs: int = 50,
    device: str = "auto",
    threads: int | None = None,
) -> Plan:
    """Decide what is measured, and refuse what cannot be, before anything is timed.

    Raises:
        ModelError: a file that is missing or no model.
        UsageError: a sweep over an exported file, or over values that a model does not have.
    """
    settings: dict[Path, list[Setting]] = {}
    for model in models:
        check_model_path(model)
        exported = model.suffix.lower() in EXPORT_SUFFIXES
        if sweep and exported:
            raise UsageError(
                f"{model.name} is an export, whose layers, queries and size are fixed: nothing can be swept",
                hint="sweep the .safetensors or .pth file; it is exported for each backend on the way",
                code="sweep",
            )
        settings[model] = [Setting()]
        if sweep:
            from rtdetr_cli.weights.load import load_model

            _, header = load_model(model)
            settings[model] = sweep_settings(sweep, layers=header.layers, queries=header.queries, imgsz=header.imgsz)
    return Plan(tuple(models), tuple(backends), settings, batch, warmup, runs, device, threads)


def benchmark(
    what: Plan,
    dataset: Dataset | None,
    *,
    tell: Callable[[str], None] = lambda text: None,
    resamples: int = 1000,
) -> Iterator[Row]:
    """Measure every point of a plan. Exports are made in a folder that is gone afterwards.

    Args:
        what: the plan.
        dataset: the split for AP and for the timed images; None times a made image.
        tell: is told what is being done, one line a step.
        resamples: of the paired interval of each difference.
    """
    sources = images_to_time(dataset)
    first: tuple[Evaluation, Resamples] | None = None
    with tempfile.TemporaryDirectory(prefix="rtdetr-benchmark-") as folder:
        for number, (model, kind, setting) in enumerate(what.points()):
            row, evaluation = _measure_point(
                what, model, kind, setting, dataset, sources, Path(folder) / str(number), tell
            )
            if evaluation is not None and evaluation.metrics["AP"] is not None:
                drawn = resample(evaluation.dataset, evaluation.table, resamples=resamples)
                if first is None:
                    first = (evaluation, drawn)
                else:
                    row = replace(row, difference=_difference(first, (evaluation, drawn)))
            yield row


def _difference(base: tuple[Evaluation, Resamples], other: tuple[Evaluation, Resamples]) -> Interval:
    value = (other[0].metrics["AP"] or 0.0) - (base[0].metrics["AP"] or 0.0)
    return other[1].gap(base[1], value)


def _measure_point(
    what: Plan,
    model: Path,
    kind: str,
    setting: Setting,
    dataset: Dataset | None,
    sources: Sequence[Path | bytes],
    folder: Path,
    tell: Callable[[str], None],
) -> tuple[Row, Evaluation | None]:
    exported = model.suffix.lower() in EXPORT_SUFFIXES
    path = model
    if kind != "torch" and not exported:
        path = _export(model, kind, setting, what.batch, folder, tell)
    dial = {} if kind != "torch" else {"layers": setting.layers, "queries": setting.queries, "imgsz": setting.imgsz}
    device = what.device if kind != "openvino" else "auto"
    backend = open_backend(path, device=device, threads=what.threads, **dial)  # type: ignore[arg-type]
    times = measure(backend, sources, batch=what.batch, warmup=what.warmup, runs=what.runs)
    evaluation = None
    if dataset is not None:
        evaluation = evaluate(backend, dataset, batch=backend.fixed_batch or max(4, what.batch))
    header = backend.header
    foreign = not header.names
    row = Row(
        model=str(model),
        backend=kind,
        precision=str(header.extra.get("precision", "fp32")) if kind in ("onnx", "tensorrt") else "fp32",
        device=device_name(backend),
        imgsz=backend.imgsz,
        layers=None if foreign else (setting.layers or header.layers or None),
        queries=None if foreign else (setting.queries or header.queries),
        batch=what.batch,
        times=times,
        ap=None if evaluation is None else evaluation.metrics["AP"],
        metrics={} if evaluation is None else evaluation.metrics,
    )
    return row, evaluation


def _export(model: Path, kind: str, setting: Setting, batch: int, folder: Path, tell: Callable[[str], None]) -> Path:
    """Export a model for a runtime at one setting, without the gate: its AP is measured here."""
    from rtdetr_cli.export.graph import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.weights.load import load_model

    detector, header = load_model(model, layers=setting.layers, queries=setting.queries)
    tell(f"{model.name}: exporting for {kind}")
    options = ExportOptions(formats=(FORMATS[kind],), imgsz=setting.imgsz, batch=batch)
    made = export_model(detector, header, folder, options, stem=model.stem)
    if not made:
        raise ModelError(f"{model} could not be exported for {kind}", code="export")
    return made[0].path


def device_name(backend: Backend) -> str:
    """Return what a backend runs on: the GPU's name, or `cpu`."""
    if backend.kind == "torch":
        device = backend.device  # type: ignore[attr-defined]
        if device.type == "cuda":
            import torch

            return torch.cuda.get_device_name(device)
        return str(device)
    if backend.kind == "onnx":
        providers = backend.session.get_providers()  # type: ignore[attr-defined]
        return "cuda" if "CUDAExecutionProvider" in providers else "cpu"
    return "cuda" if backend.kind == "tensorrt" else "cpu"


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Mark the rows for which no other row is at least as good and as quick, and better in one of the two."""
    marked = []
    for row in rows:
        if row.ap is None:
            marked.append(row)
            continue
        time_ = row.times["total"].median
        beaten = any(
            other.ap is not None
            and other.ap >= row.ap
            and other.times["total"].median <= time_
            and (other.ap > row.ap or other.times["total"].median < time_)
            for other in rows
        )
        marked.append(replace(row, front=not beaten))
    return marked


def environment() -> dict[str, Any]:
    """Return what figures depend on: processor, threads, versions."""
    import os

    versions = {}
    for package in ("torch", "onnxruntime", "openvino", "tensorrt", "numpy", "pillow"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ------------------------------------------------------------------------------------------------------ files


def write_files(folder: Path, rows: Sequence[Row], document: dict[str, Any]) -> dict[str, Path]:
    """Write the table (Markdown), the document (JSON) and, where AP is known, the plot (PNG).

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"table": folder / "benchmark.md", "json": folder / "benchmark.json"}
    paths["table"].write_text(_markdown(rows), encoding="utf-8")
    paths["json"].write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if any(row.ap is not None for row in rows):
        paths["plot"] = folder / "benchmark.png"
        draw_plot(paths["plot"], rows)
    return paths


def table_rows(rows: Sequence[Row]) -> tuple[list[str], list[list[object]]]:
    """Return columns and cells of the table; a column that would hold one value throughout is left out."""
    several = len({row.model for row in rows}) > 1
    batched = rows[0].batch > 1 if rows else False
    columns = [
        *(["model"] if several else []),
        "backend",
        "type",
        "size",
        "layers",
        "queries",
        *(f"{part} ms\nmedian / p90" for part in ("pre", "network", "post", "total")),
        *(["images/s"] if batched else []),
        "AP",
        "AP - first (95 %)",
        "best",
    ]
    cells: list[list[object]] = []
    for row in rows:
        height, width = row.imgsz
        times = row.times
        cells.append(
            [
                *([row.model] if several else []),
                row.backend,
                row.precision,
                str(height) if height == width else f"{height}x{width}",
                row.layers,
                row.queries,
                *(f"{times[part].median:.1f} / {times[part].p90:.1f}" for part in PARTS),
                *([f"{1000 * row.batch / times['total'].median:.1f}"] if batched else []),
                row.ap,
                None if row.difference is None else f"{row.difference.value:+.3f} ± {row.difference.half:.3f}",
                "*" if row.front else "",
            ]
        )
    return columns, cells


def narrowed(columns: list[str], cells: list[list[object]]) -> tuple[list[str], list[list[object]], str]:
    """Leave out columns of settings that are the same in every row, and say them in words: a terminal is narrow."""
    same = [
        position
        for position, name in enumerate(columns)
        if name in ("type", "size", "layers", "queries") and len({row[position] for row in cells}) == 1
    ]
    said = ", ".join(f"{columns[p]} {cells[0][p]}" for p in same if cells[0][p] is not None)
    kept = [p for p in range(len(columns)) if p not in same]
    return [columns[p] for p in kept], [[row[p] for p in kept] for row in cells], said


def _markdown(rows: Sequence[Row]) -> str:
    columns, cells = table_rows(rows)

    def cell(value: object) -> str:
        shown = "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
        return shown.replace("|", "\\|")

    lines = [" | ".join(column.replace("\n", ", ") for column in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(v) for v in row) for row in cells]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def draw_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draw AP over latency, a colour for each backend and model, the Pareto front joined and labelled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [row for row in rows if row.ap is not None]
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    several = len({row.model for row in known}) > 1
    groups = dict.fromkeys((row.model, row.backend, row.precision) for row in known)
    for model, backend, precision in groups:
        mine = [r for r in known if (r.model, r.backend, r.precision) == (model, backend, precision)]
        name = f"{backend} {precision}" + (f", {Path(model).name}" if several else "")
        axes.scatter([r.times["total"].median for r in mine], [r.ap or 0.0 for r in mine], s=34, label=name, zorder=3)
    front = sorted((r for r in known if r.front), key=lambda r: r.times["total"].median)
    axes.plot(
        [r.times["total"].median for r in front],
        [r.ap or 0.0 for r in front],
        color="0.35",
        linewidth=1,
        linestyle="--",
        drawstyle="steps-post",
        label="nothing is both quicker and better",
        zorder=2,
    )
    slowest = max(r.times["total"].median for r in known)
    quickest = min(r.times["total"].median for r in known)
    for row in _apart(front, known):
        at_edge = row.times["total"].median > quickest + 0.8 * (slowest - quickest)
        axes.annotate(
            row.setting,
            (row.times["total"].median, row.ap or 0.0),
            xytext=(-6 if at_edge else 6, -11),
            textcoords="offset points",
            horizontalalignment="right" if at_edge else "left",
            fontsize=7.5,
            color="0.25",
        )
    batch = known[0].batch
    axes.set_xlabel(f"milliseconds for {'an image' if batch == 1 else f'{batch} images'}, file to boxes (median)")
    axes.set_ylabel("AP")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _apart(front: Sequence[Row], known: Sequence[Row]) -> list[Row]:
    """Return the front's rows whose labels do not lie on one another."""
    width = max(r.times["total"].median for r in known) - min(r.times["total"].median for r in known) or 1.0
    height = max(r.ap or 0.0 for r in known) - min(r.ap or 0.0 for r in known) or 1.0
    kept: list[Row] = []
    for row in reversed(front):  # the best first: that is where people look
        near = any(
            abs(row.times["total"].median - other.times["total"].median) < 0.42 * width
            and abs((row.ap or 0.0) - (other.ap or 0.0)) < 0.045 * height
            for other in kept
        )
        if not near:
            kept.append(row)
    return kept
