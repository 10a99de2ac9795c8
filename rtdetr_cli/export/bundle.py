"""A folder with an exported ONNX model and all that runs it elsewhere, without torch or rtdetr-cli."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy
import onnxruntime
import PIL

from rtdetr_cli import __version__
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.infer.selection import DEFAULT_THRESHOLD
from rtdetr_cli.infer.timing import images_to_time, measure_steadily
from rtdetr_cli.machine import cpu_count, cpu_name
from rtdetr_cli.text import abbreviate, counted
from rtdetr_cli.weights.header import ModelHeader, Thresholds

PACKAGES = {"onnxruntime": onnxruntime, "numpy": numpy, "pillow": PIL}
PREFERRED = ("int8", "fp32", "fp16")  # precisions, of several ONNX files: float16 is slow on a CPU

DOCKERFILE = """\
FROM python:3.12-slim
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY model.onnx labels.json detect.py ./
ENTRYPOINT ["python", "detect.py"]
"""

README = """\
# {preset}detector of {classes}

Exported by rtdetr-cli {version}. It needs Python 3.11 or newer and three packages, but neither torch nor rtdetr-cli:

```sh
pip install -r requirements.txt
python detect.py image.jpg
```

or in a container:

```sh
docker build -t detector .
docker run --rm -v "$PWD:/data" detector /data/image.jpg
```

Each line of the output is a class name, its category id, a score, and a box as x1, y1, x2, y2 in pixels.

| file | content |
|---|---|
| `model.onnx` | the network, {precision}, {megabytes:.1f} MB, input {height}x{width} (height x width) |
| `labels.json` | class names, category ids and the minimum score of each class; edit it to change a threshold |
| `detect.py` | reads an image, runs the network, and prints the objects above their thresholds |

**Speed.** {total:.1f} ms from the image file to boxes, of which the network takes {network:.1f} ms: medians of {runs}
runs, one image at a time, on {processor} with {threads}, measured by rtdetr-cli, which runs the same network.{unstable}

**Verification.** {verification}
"""

RUNS = 20
UNSTABLE = " The runs differed by more than 20%, as when other programs run: measure again on an idle machine."


def write_bundle(folder: Path, artefacts: Sequence[Artefact], images: Dataset | Sequence[Path] | None) -> Artefact:
    """Write the files of `BUNDLE_FILES`, and return the artefact that was used.

    Args:
        folder: see `workflows.export.check_bundle`.
        artefacts: what was exported, at least one ONNX file that passed or was not verified.
        images: those of the verification, to measure the latency on; None for a synthetic one.
    """
    candidates = [a for a in artefacts if a.format == "onnx" and a.passed]
    chosen = min(candidates, key=lambda artefact: PREFERRED.index(artefact.precision))
    shutil.copy(chosen.path, folder / "model.onnx")
    shutil.copy(program(), folder / "detect.py")
    backend = OnnxBackend(folder / "model.onnx", device="cpu")
    texts = {
        "labels.json": json.dumps(labels(backend.header), indent=1, ensure_ascii=False) + "\n",
        "requirements.txt": "".join(f"{name}=={module.__version__}\n" for name, module in PACKAGES.items()),
        "Dockerfile": DOCKERFILE,
        "README.md": describe(backend, chosen, images),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return chosen


def program() -> Path:
    """Return the program that runs a model: inside the package in a wheel, next to it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "examples"
    return (inside if inside.is_dir() else package.parent / "examples") / "onnxruntime_numpy.py"


def labels(header: ModelHeader) -> dict[str, object]:
    """Return what the program needs of a header, under the header's own keys, so that it can read either."""
    count = len(header.names)
    thresholds = header.thresholds or Thresholds("default", DEFAULT_THRESHOLD, (DEFAULT_THRESHOLD,) * count)
    stored = asdict(thresholds)
    return {
        "names": list(header.names),
        "category_ids": list(header.category_ids),
        "imgsz": list(header.imgsz),
        "thresholds": {key: stored[key] for key in ("target", "overall", "per_class")},
    }


def describe(backend: OnnxBackend, artefact: Artefact, images: Dataset | Sequence[Path] | None) -> str:
    """Return the README of a bundle, with the latency measured here."""
    times = measure_steadily(backend, images_to_time(images), batch=1, warmup=3, runs=RUNS)
    header = backend.header
    verdict = artefact.verdict
    height, width = header.imgsz
    return README.format(
        preset=f"{header.preset} " if header.preset else "",
        classes=abbreviate(header.names),
        version=__version__,
        precision=artefact.precision,
        megabytes=artefact.bytes / 1e6,
        height=height,
        width=width,
        total=times["total"].median,
        network=times["network"].median,
        runs=RUNS,
        processor=cpu_name(),
        threads=counted(cpu_count(), "thread"),
        unstable=UNSTABLE if times["total"].unstable else "",
        verification="Skipped." if verdict is None else f"Compared with the trained model: {verdict.summary}.",
    )
