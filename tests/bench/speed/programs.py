"""Whole commands, each in a process of its own, from the start of the interpreter to its end."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from rtdetr_cli.datasets.generate import NAMES, generate_image
from tests.bench.speed.harness import ROOT, Comparison, Settings, Turn, checkout, run
from tests.bench.speed.steps import EARLIER

IMAGES = 200  # for the comparison of backends
YOLO_IMAGES = {"train": 48, "val": 16}


def export_preset(folder: Path, *, preset: str = "r18", verify_on: Sequence[Path] | None = None) -> tuple[Path, Path]:
    """Write a model with values drawn from a seed, which don't matter for the time, and its ONNX file.

    With images to verify on, OpenVINO is exported too.
    """
    import torch

    from rtdetr_cli.config.presets import load_preset
    from rtdetr_cli.export.options import ExportOptions
    from rtdetr_cli.export.run import export_model
    from rtdetr_cli.model.build import build_detector
    from rtdetr_cli.weights.header import ModelHeader
    from rtdetr_cli.weights.load import load_model, save_model

    torch.manual_seed(0)
    spec = load_preset(preset).model
    model = build_detector(spec, num_classes=80).eval()
    header = ModelHeader(
        names=tuple(f"thing {i}" for i in range(80)),
        category_ids=tuple(range(80)),
        imgsz=(640, 640),
        architecture=spec.model_dump(mode="json"),
        preset=preset,
        layers=model.layers,
        queries=model.queries,
    )
    path = folder / f"{preset}.safetensors"
    save_model(path, model.state_dict(), header)
    model, header = load_model(path)  # with its identity
    options = ExportOptions(formats=("onnx",) if verify_on is None else ("onnx", "openvino"))
    made = export_model(model, header, folder / "export", options, images=verify_on, stem=preset, device="cpu")
    return path, made[0].path


def write_images(folder: Path, count: int) -> Path:
    """Write JPEG images of 640x480."""
    folder.mkdir()
    for number in range(count):
        levels = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(levels).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:03d}.jpg", quality=92)
    return folder


_NETWORK = """
import sys, torch, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
session.run(None, {i.name: numpy.ones(i.shape, types[i.type]) for i in session.get_inputs()})
"""


@contextmanager
def predict_sides(_: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give `rtdetr predict` on one image with an ONNX file, and importing torch and running the file once."""
    with tempfile.TemporaryDirectory() as folder:
        _, file = export_preset(Path(folder))
        images = write_images(Path(folder) / "images", 1)
        command = ["-m", "rtdetr_cli", "predict", images, "--weights", file, "--out", Path(folder) / "out"]
        yield partial(run, command), partial(run, ["-c", _NETWORK, file])


@contextmanager
def backend_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give `rtdetr predict` on many images with `--backend auto`, whose export is made before, and with torch."""
    import openvino  # noqa: F401

    from rtdetr_cli.infer.exported import verified_export

    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", IMAGES)
        model, _ = export_preset(Path(folder), verify_on=sorted(images.iterdir())[:4])
        assert verified_export(model) is not None, "the export has failed verification"
        command = ["-m", "rtdetr_cli", "predict", images, "--weights", model, "--device", "cpu", "--no-save"]
        yield tuple(
            partial(run, [*command, "--out", Path(folder) / name, "--backend", name], threads=settings.threads)
            for name in ("auto", "torch")
        )  # type: ignore[misc]


@contextmanager
def help_sides(_: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give `rtdetr --help` and that of a Typer app with as many commands that do nothing."""
    from rtdetr_cli.cli.app import COMMANDS

    with tempfile.TemporaryDirectory() as folder:
        lines = ["import typer", "app = typer.Typer(rich_markup_mode=None)"]
        for number in range(len(COMMANDS)):
            lines += ["@app.command()", f"def command{number}(source: str, many: int = 1):", "    'Do one thing.'"]
        program = Path(folder) / "bare.py"
        program.write_text("\n".join([*lines, "app()"]))
        yield partial(run, ["-m", "rtdetr_cli", "--help"]), partial(run, [program, "--help"])


@contextmanager
def demo_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give the whole demo, and that of an earlier commit of ours."""
    with tempfile.TemporaryDirectory() as folder, checkout(EARLIER) as tree:
        numbers = iter(range(1000))

        def demo(where: Path) -> None:
            target = Path(folder) / str(next(numbers))
            run(["-m", "rtdetr_cli", "demo", target, "--json"], tree=where, threads=settings.threads)

        yield partial(demo, ROOT), partial(demo, tree)


@contextmanager
def ultralytics_command() -> Iterator[list[str]]:
    """Install ultralytics in an environment of its own, which shares this one's torch, and give its command."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder)
        shared = Path(folder) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (shared / "shared.pth").write_text("\n".join(site.getsitepackages()))
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "ultralytics"], check=True)
        words = {"YOLO_CONFIG_DIR": str(Path(folder) / "settings"), "YOLO_OFFLINE": "true"}
        yield ["env", *(f"{name}={value}" for name, value in words.items()), str(python.with_name("yolo"))]


def write_yolo_dataset(folder: Path) -> Path:
    """Write generated images of 640x480 in YOLO's layout; return the file that describes it."""
    for number, (split, count) in enumerate(YOLO_IMAGES.items()):
        images, labels = folder / "images" / split, folder / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for index in range(count):
            pixels, boxes, classes = generate_image(np.random.default_rng((number, index)), (480, 640))
            Image.fromarray(pixels).save(images / f"{index:03d}.jpg", quality=92)
            shares = np.concatenate([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], 1) / 2
            shares /= (640, 480, 640, 480)
            lines = [" ".join(map(str, [label, *box])) for label, box in zip(classes, shares.tolist(), strict=True)]
            (labels / f"{index:03d}.txt").write_text("\n".join(lines))
    file = folder / "data.yaml"
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return file


def run_program(command: Sequence[object], *, threads: int, folder: Path) -> None:
    """Run a program that is not ours."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(
        [str(c) for c in command], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{command[-1]} failed:\n{ran.stderr[-3000:]}")


@contextmanager
def ultralytics_sides(settings: Settings, *, predict: bool) -> Iterator[tuple[Turn, Turn]]:
    """Give an epoch of the same network from random weights with its evaluation, or the prediction of all its images.

    The network is RT-DETR with HGNetv2-L, which both have. Each program uses its own defaults.
    """
    with tempfile.TemporaryDirectory() as name, ultralytics_command() as yolo:
        folder = Path(name)
        data = write_yolo_dataset(folder / "data")
        common = [
            f"imgsz={settings.imgsz}",
            "device=cpu",
            "plots=False",
            f"project={folder / 'theirs'}",
            "exist_ok=True",
        ]
        theirs = [*yolo, "detect", "train", "model=rtdetr-l.yaml", f"data={data}", "epochs=1", "pretrained=False"]
        theirs += [f"batch={settings.batch}", "name=run", *common]
        ours = ["-m", "rtdetr_cli", "train", "--preset", "hgl", "--data", data, "--weights", "none", "--epochs", 1]
        ours += [
            "--imgsz",
            settings.imgsz,
            "--effective-batch",
            settings.batch,
            "--out",
            folder / "ours",
            "--name",
            "run",
        ]

        def train() -> None:
            shutil.rmtree(folder / "ours", ignore_errors=True)
            run([*ours, "--device", "cpu"], threads=settings.threads)

        their_train = partial(run_program, theirs, threads=settings.threads, folder=folder)
        if not predict:
            yield train, their_train
            return
        train()
        their_train()
        images = data.parent / "images" / "train"
        model = ["--weights", folder / "ours" / "run", "--out", folder / "out", "--device", "cpu"]
        weights = folder / "theirs" / "run" / "weights" / "best.pt"
        yield (
            partial(run, ["-m", "rtdetr_cli", "predict", images, *model], threads=settings.threads),
            partial(
                run_program,
                [*yolo, "detect", "predict", f"model={weights}", f"source={images}", "name=out", *common],
                threads=settings.threads,
                folder=folder,
            ),
        )


COMPARISONS = (
    Comparison(
        name="help",
        title="`rtdetr --help`",
        peer="a bare Typer app with as many commands",
        aim=1.3,
        at_most=True,
        sides=help_sides,
        rounds=11,
    ),
    Comparison(
        name="predict-onnx",
        title="`rtdetr predict` on one image, r18 ONNX at 640",
        peer="importing torch and running the file",
        aim=0.5,
        at_most=True,
        sides=predict_sides,
        rounds=5,
    ),
    Comparison(
        name="backend-auto",
        title=f"`rtdetr predict --backend auto` on {IMAGES} images, r18 at 640, exported before",
        peer="`--backend torch`",
        aim=2.5,
        sides=backend_sides,
        rounds=3,
        slow=True,
    ),
    Comparison(
        name="demo",
        title="the demo",
        peer=f"our commit {EARLIER}",
        aim=1.15,
        sides=demo_sides,
        rounds=1,
        warmup=0,
        slow=True,
    ),
    Comparison(
        name="ultralytics-train",
        title="`rtdetr train`, one epoch of hgl from random weights with its evaluation, 64 images",
        peer="`yolo train` of the same network",
        aim=1.2,
        sides=partial(ultralytics_sides, predict=False),
        rounds=3,
        warmup=0,
        slow=True,
    ),
    Comparison(
        name="ultralytics-predict",
        title="`rtdetr predict` on 48 images, hgl",
        peer="`yolo predict` with the same network",
        aim=1.2,
        sides=partial(ultralytics_sides, predict=True),
        rounds=3,
        slow=True,
    ),
)
