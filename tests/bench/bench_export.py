"""Every export format of a model in one table: what it contains, its size, its time and its AP.

    python tests/bench/bench_export.py MODEL DATA [--formats onnx int8]

The formats are exported as `rtdetr export` does it, and verified on the val split of DATA. The times are processor time
of one thread for one image, from the resized image to detections: medians of runs that take turns, so other programs
hardly change them. Engines are built, but cannot be run without their GPU. "Before" is the model in PyTorch.

Measured on blood cells (87 val images) with models trained on 205 images, on two shared cores:

| model | file | types | MB | ms | AP |
|---|---|---|---|---|---|
| `tiny`, 192 px | PyTorch | | 6.6 | 37.2 | .5270 |
| | ONNX | float32 | 6.6 | 20.4 | .5270 |
| | ONNX INT8 | 80 int8 constants | 3.4 | 16.7 | .5267 |
| | ONNX float16 | 141 float16, 76 float32 constants | 3.8 | 21.1 | .5270 |
| | OpenVINO | 211 float16, 12 float32 constants | 4.2 | 15.7 | .5272 |
| | OpenVINO INT8 | 80 int8 constants | 3.2 | 11.5 | .5295 |
| | RTX, five GPUs | 110 half, 30 float layers | 11.0 | - | - |
| `r18`, 192 px | PyTorch | | | 164.5 | .5031 |
| | ONNX | float32 | 79.7 | 128.2 | .5031 |
| | ONNX INT8 | 112 int8 constants | 33.9 | 90.0 | .5065 |
| | OpenVINO | 245 float16, 12 float32 constants | 40.8 | 114.7 | .5030 |
| | OpenVINO INT8 | 98 int8 constants | 24.2 | 56.5 | .5027 |
| | RTX, three GPUs | 128 half, 30 float layers | 49.1 | - | - |
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.images.decode import read_image, stretch
from rtdetr_cli.infer.backend import Backend, open_backend
from rtdetr_cli.infer.inspect import inspect_model
from rtdetr_cli.infer.packages import has_package
from rtdetr_cli.workflows.export import plan_export

MODEL_SETTING = {"sampling": None, "layers": None, "queries": None}
PACKAGES = {"openvino": "openvino", "openvino-int8": "nncf", "rtx-fp16": "tensorrt_rtx"}
FORMATS = ("onnx", "int8", "fp16", "openvino", "openvino-int8", "rtx-fp16")
WARMUP = 2


def processor_times(backends: Sequence[Backend], paths: Sequence[Path], runs: int) -> list[float]:
    """Return the median milliseconds of processor time that each backend takes for one image."""
    times: list[list[float]] = [[] for _ in backends]
    for number in range(WARMUP + runs):
        image = read_image(paths[number % len(paths)])
        resized, size = stretch(image, backends[0].imgsz)[None], np.array([[image.shape[1], image.shape[0]]])
        for own, backend in zip(times, backends, strict=True):
            start = time.process_time()
            backend.run(resized, size)
            own.append(1000 * (time.process_time() - start))
    return [statistics.median(own[WARMUP:]) for own in times]


def describe_types(artefact: Artefact) -> str:
    """Return the types of an engine's layers, or of a graph's constants without those of shapes and indices."""
    if artefact.format == "tensorrt":
        return ", ".join(f"{count} {name}" for name, count in artefact.operators.items()) + " layers"
    types = inspect_model(artefact.path)["types"]
    return ", ".join(f"{types[name]} {name}" for name in ("int8", "float16", "float32") if name in types) + " constants"


def export_all(
    model: Path, data: Path, formats: Sequence[str], folder: Path
) -> tuple[dict[str, Artefact], Dataset | Sequence[Path]]:
    """Export the formats whose packages are here; return the artefacts by file name, and the verification images."""
    present = tuple(name for name in formats if name not in PACKAGES or has_package(PACKAGES[name]))
    print("not installed:", ", ".join(sorted(set(formats) - set(present))) or "nothing")
    plan = plan_export(model, ExportOptions(present), verify=data, out=folder, device="cpu")
    assert plan.images is not None
    artefacts: dict[str, Artefact] = {}
    try:
        for event in plan.events(**MODEL_SETTING, dedupe=None):
            if isinstance(event, Artefact):
                artefacts[event.path.name] = event
    except RtdetrError as error:
        print(f"stopped: {error.message}")
    return artefacts, plan.images


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rtdetr-bench-") as folder:
        artefacts, images = export_all(arguments.model, arguments.data, arguments.formats, Path(folder))
        assert isinstance(images, Dataset)
        runnable = [a for a in artefacts.values() if a.format != "tensorrt"]
        backends = [
            open_backend(path, device="cpu", threads=1) for path in (arguments.model, *(a.path for a in runnable))
        ]
        paths = [images.path(i) for i in range(min(len(images), 16))]
        before, *after = processor_times(backends, paths, arguments.runs)
        times = dict(zip((a.path.name for a in runnable), after, strict=True))
        print(f"\n{arguments.model}, {backends[0].imgsz}, {len(images)} val images, {before:.1f} ms in PyTorch\n")
        print("| file | types | MB | ms before -> after | AP before -> after | matched | verified |")
        print("|---|---|---|---|---|---|---|")
        for name, artefact in artefacts.items():
            ap = artefact.verdict.ap.figures if artefact.verdict else {}
            cells = [
                name,
                describe_types(artefact),
                f"{artefact.bytes / 1e6:.1f}",
                f"{before:.1f} -> {times[name]:.1f}" if name in times else "needs its GPU",
                f"{ap['ap_model']:.4f} -> {ap['ap_export']:.4f}" if "ap_model" in ap else "",
                f"{artefact.verdict.agreement.figures.get('matched', 0):.3f}" if artefact.verdict else "",
                artefact.verdict.summary if artefact.verdict and not artefact.passed else artefact.pending or "passed",
            ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
