"""Measure latency and AP of models, on every backend or at several settings of one model.

AP is of the whole split, by the same backend with the same settings as the latency. How latency is measured is
described in `infer.timing`.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, RtdetrError, UsageError
from rtdetr_cli.evaluate.bootstrap import Resamples, resample
from rtdetr_cli.evaluate.run import evaluate
from rtdetr_cli.infer.backend import Backend, check_model_path, open_backend
from rtdetr_cli.infer.graph import first_line
from rtdetr_cli.infer.packages import has_package
from rtdetr_cli.infer.timing import Spread, images_to_time, measure_steadily
from rtdetr_cli.machine import cpu_count, cpu_name, installed_version
from rtdetr_cli.weights.header import EXPORT_SUFFIXES
from rtdetr_cli.workflows.benchmark_report import Row
from rtdetr_cli.workflows.sweep import Setting, sweep_settings

PACKAGES = {
    "torch": "torch",
    "onnx": "onnxruntime",
    "onnx-int8": "onnxruntime",
    "openvino": "openvino",
    "openvino-int8": "nncf",
    "tensorrt": "tensorrt",
}
"""The backends, INT8 as one of its own, and the package that each needs."""
FORMATS = {
    "onnx": ("onnx",),
    "onnx-int8": ("int8",),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino-int8",),
    "tensorrt": ("fp16", "trt-fp16"),
}
"""What is exported for each; the last file is measured."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: a model on one of the backends of `PACKAGES` at a setting."""

    model: Path
    backend: str
    setting: Setting


@dataclass(frozen=True, slots=True)
class Failure:
    """A point that could not be measured, and why."""

    point: Point
    error: RtdetrError

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"model": str(self.point.model), "backend": self.point.backend, "error": self.error.message}


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """What to measure, and how; `skipped` has the backends that this machine lacks, with the reason."""

    points: tuple[Point, ...]
    skipped: dict[str, str]
    batch: int
    warmup: int
    runs: int
    device: str
    threads: int | None

    @property
    def int8(self) -> bool:
        """Whether a point needs images to calibrate on."""
        return any(point.backend.endswith("-int8") for point in self.points)

    def without_int8(self, reason: str) -> BenchmarkPlan:
        """Return the plan with the points that need calibration skipped for a reason."""
        left = tuple(point for point in self.points if not point.backend.endswith("-int8"))
        names = dict.fromkeys(point.backend for point in self.points if point not in left)
        return replace(self, points=left, skipped={**self.skipped, **dict.fromkeys(names, reason)})


def parse_backends(text: str) -> list[str]:
    """Read `--backends`.

    Raises:
        UsageError: an unknown backend, or none.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in PACKAGES]
    if unknown or not names:
        raise UsageError(
            f"unknown backend {unknown[0]!r}" if unknown else "--backends is empty",
            hint=f"--backends {','.join(PACKAGES)}, or some of them",
            code="backend",
        )
    return names


def refuse_clash(backend: str, *, device: str, threads: int | None) -> None:
    """Refuse TensorRT with CPU threads or on the CPU."""
    if backend == "tensorrt" and threads is not None:
        raise UsageError(
            f"--threads {threads} has no effect on TensorRT, which runs on the GPU",
            hint="remove --threads, or choose other --backends",
            code="backend",
        )
    if backend == "tensorrt" and device == "cpu":
        raise UsageError("TensorRT does not run on --device cpu", hint="choose other --backends", code="backend")


def require_backend(backend: str, *, device: str) -> None:
    """Refuse a backend whose package, or the GPU that it needs, is missing."""
    package = PACKAGES[backend]
    if not has_package(package):
        raise EnvironmentProblem(
            f"the package {package} is not installed", hint=f"pip install {package}", code="package-missing"
        )
    if backend == "tensorrt":
        from rtdetr_cli.export.tensorrt import require_tensorrt

        require_tensorrt(device)


def plan_benchmark(
    models: Sequence[Path],
    *,
    backends: Sequence[str] | None = None,
    sweep: dict[str, list[str]] | None = None,
    batch: int = 1,
    warmup: int = 10,
    runs: int = 50,
    device: str = "auto",
    threads: int | None = None,
) -> BenchmarkPlan:
    """Decide what to measure, and refuse what cannot be measured, before anything is exported or timed.

    Models that are weights run in `backends` (None: all that this machine has, or torch for a sweep of `parse_sweep`),
    exported ones in their own.

    Raises:
        UsageError: options that clash, or a sweep that a model does not allow.
        ModelError: a file that is missing or not a model.
        EnvironmentProblem: a backend that is needed cannot run here.
    """
    runtimes = {model: EXPORT_SUFFIXES.get(model.suffix.lower()) for model in models}
    if backends is None and sweep:
        backends = ["torch"]
    needed = dict.fromkeys([*(backends or []), *(runtime for runtime in runtimes.values() if runtime)])
    for name in needed:
        refuse_clash(name, device=device, threads=threads)
    for model, runtime in runtimes.items():
        check_model_path(model)
        if runtime and sweep:
            raise UsageError(
                f"{model.name} is exported: its layers, queries and size are fixed and cannot be swept",
                hint="sweep the .safetensors or .pth file; it is exported for each backend",
                code="sweep",
            )
    for name in needed:
        require_backend(name, device=device)
    skipped: dict[str, str] = {}
    if backends is None and None in runtimes.values():
        for name in PACKAGES:
            try:
                refuse_clash(name, device=device, threads=threads)
                require_backend(name, device=device)
            except (UsageError, EnvironmentProblem) as error:
                skipped[name] = error.message
        backends = [name for name in PACKAGES if name not in skipped]
    if "torch" in (backends or []):
        from rtdetr_cli.infer.torch_backend import choose_device

        choose_device(device)
    points: list[Point] = []
    for model, runtime in runtimes.items():
        settings = [Setting()]
        if sweep:
            from rtdetr_cli.weights.load import load_model

            _, header = load_model(model)
            settings = sweep_settings(sweep, layers=header.layers, queries=header.queries, imgsz=header.imgsz)
        names = [runtime] if runtime else backends or []
        points += [Point(model, name, setting) for name in names for setting in settings]
    return BenchmarkPlan(tuple(points), skipped, batch, warmup, runs, device, threads)


def benchmark(
    plan: BenchmarkPlan,
    dataset: Dataset | None,
    *,
    calibration: Sequence[Path] = (),
    notify: Callable[[str], None] = lambda text: None,
    resamples: int = 1000,
) -> Iterator[Row | Failure]:
    """Measure every point of a plan, whatever happens to the others.

    Args:
        plan: from `plan_benchmark`.
        dataset: split for AP; without one, AP is not measured and a synthetic image is timed.
        calibration: images to calibrate INT8 on.
        notify: called with a line before each export.
        resamples: for the interval of each AP difference.
    """
    sources = images_to_time(dataset)
    base: tuple[float, Resamples] | None = None
    with tempfile.TemporaryDirectory(prefix="rtdetr-benchmark-") as folder:
        for number, point in enumerate(plan.points):
            try:
                backend = _open(plan, point, Path(folder) / str(number), calibration, notify)
                times = measure_steadily(backend, sources, batch=plan.batch, warmup=plan.warmup, runs=plan.runs)
                row = _row(plan, point, backend, times)
                if dataset is not None:
                    evaluation = evaluate(backend, dataset, batch=backend.fixed_batch or max(4, plan.batch))
                    row = replace(row, ap=evaluation.metrics["AP"], metrics=evaluation.metrics)
                    if row.ap is not None:
                        drawn = resample(evaluation.dataset, evaluation.table, resamples=resamples)
                        if base is None:
                            base = row.ap, drawn
                        else:
                            row = replace(row, difference=drawn.interval(row.ap - base[0], minus=base[1]))
            except RtdetrError as error:
                yield Failure(point, error)
            except Exception as error:  # each runtime raises its own kind
                yield Failure(point, RtdetrError(f"{type(error).__name__}: {first_line(error)}"))
            else:
                yield row


def _open(
    plan: BenchmarkPlan, point: Point, folder: Path, calibration: Sequence[Path], notify: Callable[[str], None]
) -> Backend:
    """Open the model of a point in its backend; weights are exported first, to `folder`."""
    path, setting = point.model, point.setting
    if point.backend != "torch" and path.suffix.lower() not in EXPORT_SUFFIXES:
        notify(f"{path.name}: exporting for {point.backend}")
        path, setting = _export(plan, point, folder, calibration), Setting()  # built into the export
    device = "auto" if point.backend.startswith("openvino") else plan.device
    return open_backend(path, device=device, threads=plan.threads, **asdict(setting))


def _export(plan: BenchmarkPlan, point: Point, folder: Path, calibration: Sequence[Path]) -> Path:
    """Export a model for a backend, unverified, since its AP is measured here."""
    from rtdetr_cli.export.options import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.weights.load import load_model

    detector, header = load_model(point.model, layers=point.setting.layers, queries=point.setting.queries)
    options = ExportOptions(FORMATS[point.backend], point.setting.imgsz, plan.batch)
    files = export_model(
        *(detector, header, folder, options), stem=point.model.stem, device=plan.device, calibration=calibration
    )
    return files[-1].path


def _row(plan: BenchmarkPlan, point: Point, backend: Backend, times: dict[str, Spread]) -> Row:
    header = backend.header
    foreign = not header.names
    precision = str(header.extra.get("precision", "fp32")) if point.backend != "torch" else "fp32"
    if backend.kind == "openvino" and precision == "fp16":  # of the weights in the file; it computes in float32
        precision = "fp32"
    return Row(
        model=str(point.model),
        backend=backend.kind,
        precision=precision,
        device=device_name(backend),
        imgsz=backend.imgsz,
        layers=None if foreign else header.layers or None,
        queries=None if foreign else header.queries,
        batch=plan.batch,
        times=times,
    )


def device_name(backend: Any) -> str:
    """Return what a backend runs on: the GPU's name, `cuda` or `cpu`."""
    if backend.kind == "torch":
        if backend.device.type == "cuda":
            import torch

            return torch.cuda.get_device_name(backend.device)
        return str(backend.device)
    if backend.kind == "onnx":
        return "cuda" if "CUDAExecutionProvider" in backend.session.get_providers() else "cpu"
    return "cuda" if backend.kind == "tensorrt" else "cpu"


def environment() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, system and package versions."""
    packages = dict.fromkeys((*PACKAGES.values(), "numpy", "pillow"))
    versions = {package: version for package in packages if (version := installed_version(package))}
    return {"processor": cpu_name(), "cores": cpu_count(), "system": platform.platform(), "versions": versions}
