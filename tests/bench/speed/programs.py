"""Whole commands, each in a process of its own, from the start of the interpreter to its end."""

from __future__ import annotations

import site
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from rtdetr_cli.datasets.generate import generate_dataset
from tests.bench.speed.harness import ROOT, Comparison, Settings, Turn, checkout, run, run_program
from tests.bench.speed.steps import EARLIER

IMAGES = 200  # for the comparison of backends


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
def ultralytics_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give an epoch of the same network from random weights, with its evaluation; each program uses its own defaults.

    The network is RT-DETR with HGNetv2-L, which both have. ultralytics gets an environment of its own, which shares
    this one's torch and is removed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv")
        packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
        (packages / "shared.pth").write_text("\n".join(site.getsitepackages()))
        python = folder / "venv" / "bin" / "python"
        run_program([python, "-m", "pip", "install", "--quiet", "ultralytics"], folder=folder)
        shapes = generate_dataset(folder / "shapes", train=48, val=16, imgsz=(480, 640))
        run(["-m", "rtdetr_cli", "validate", shapes, "--convert", "yolo", "--to", folder / "yolo"])
        ours = f"train --preset hgl --weights none --epochs 1 --device cpu --data {folder / 'yolo'}".split()
        ours += f"--imgsz {settings.imgsz} --effective-batch {settings.batch} --out {folder / 'ours'}".split()
        theirs = ["detect", "train", "model=rtdetr-l.yaml", "pretrained=False", "epochs=1", "device=cpu", "plots=False"]
        theirs += [f"data={folder / 'yolo' / 'data.yaml'}", f"imgsz={settings.imgsz}", f"batch={settings.batch}"]
        offline = {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(folder)}
        yield (
            partial(run, ["-m", "rtdetr_cli", *ours], threads=settings.threads),
            partial(
                run_program, [python.with_name("yolo"), *theirs], folder=folder, threads=settings.threads, **offline
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
        name="ultralytics",
        title="`rtdetr train`, one epoch of hgl from random weights with its evaluation, 48 images",
        peer="`yolo train` of the same network",
        aim=1.2,
        sides=ultralytics_sides,
        rounds=3,
        warmup=0,
        slow=True,
    ),
)
