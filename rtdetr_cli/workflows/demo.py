"""Run every command in turn on a synthetic dataset: nothing is downloaded, and the model must learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import GateError, RtdetrError, UsageError
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.run import export_model
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.selection import select_by
from rtdetr_cli.infer.sources import find_sources
from rtdetr_cli.infer.stream import Predicted, predict_images
from rtdetr_cli.runs import EXPORT
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.events import Event, RunFinished
from rtdetr_cli.workflows.finetune import finetune

TRAIN_IMAGES = 800
VAL_IMAGES = 100
SIDE = 192
REQUIRED_AP50 = 0.5
DRAWN_IMAGES = 12


class Demo:
    """One demo in one folder; its methods are called in the order of their definition."""

    def __init__(self, folder: Path, *, epochs: int) -> None:
        self.folder = folder
        self.data = folder / "shapes"
        self.epochs = epochs
        self.run = self.best = Path()  # folder and model of the training

    def make_dataset(self) -> None:
        """Generate the dataset; an earlier demo's is replaced by identical files.

        Raises:
            UsageError: the folder holds other files.
            RtdetrError: the folder cannot be written.
        """
        problem = ""
        if self.folder.exists() and not self.folder.is_dir():
            problem = f"{self.folder} is a file, not a folder"
        elif self.folder.is_dir() and any(self.folder.iterdir()) and not (self.data / "train.json").is_file():
            problem = f"the folder {self.folder} is not empty and not from an earlier demo"
        if problem:
            raise UsageError(problem, hint="choose another folder: rtdetr demo DIR")
        try:
            generate_dataset(self.data, train=TRAIN_IMAGES, val=VAL_IMAGES, imgsz=SIDE, seed=0)
        except OSError as error:
            reason = error.strerror or error
            raise RtdetrError(f"cannot write to {self.folder}: {reason}", code="not-writable") from error

    def check_dataset(self) -> dict[str, int]:
        """Check every image and box; return the number of findings of each severity."""
        return examine(self.data, imgsz=(SIDE, SIDE)).counts()

    def train(self, *, stop: StopFlag) -> Iterator[Event]:
        """Train `tiny` from random weights."""
        flags = {"data": str(self.data), "preset": "tiny", "weights": "none", "epochs": self.epochs}
        config = resolve_run({**flags, "out": str(self.folder / "runs"), "seed": 0}, sets=["eval_every=4"])
        for event in finetune(config, stop=stop, argv=["rtdetr", "demo"]):
            if isinstance(event, RunFinished):
                self.run, self.best = event.folder, event.best
            yield event

    def val_set(self) -> Dataset:
        """Return the val images."""
        val = load_splits(self.data).val
        assert val is not None
        return val

    def evaluate(self) -> Evaluation:
        """Evaluate the best model on the val images."""
        return evaluate(open_backend(self.best), self.val_set())

    def predict(self) -> tuple[Path, int, int]:
        """Draw the detections on the first val images; return (folder, images, boxes)."""
        val = self.val_set()
        folder = self.folder / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        sources = find_sources([str(val.path(i)) for i in range(min(DRAWN_IMAGES, len(val)))])
        backend = open_backend(self.best)
        boxes = sum(
            len(event.detections)
            for event in predict_images(sources, backend, select_by(backend.header), batch=4, draw_to=folder)
            if isinstance(event, Predicted)
        )
        return folder, len(sources), boxes

    def export(self, *, notify: Callable[[str], None]) -> Artefact:
        """Export to ONNX and verify the file on the val images.

        Raises:
            GateError: the file does not give the same detections as the model.
        """
        model, header = load_model(self.best)
        (artefact,) = export_model(
            model, header, self.run / EXPORT, images=self.val_set(), stem=self.best.stem, notify=notify
        )
        if not artefact.passed:
            summary = artefact.verdict.summary if artefact.verdict else "not verified"
            raise GateError(f"the export does not give the same detections as the model: {summary}", code="parity")
        return artefact


def check_accuracy(metrics: dict[str, Any]) -> None:
    """Raise a `GateError` if the accuracy of the demo is too low."""
    ap50 = metrics.get("AP50") or 0.0
    if ap50 < REQUIRED_AP50:
        raise GateError(
            f"the demo reached AP50 {ap50:.3f} on the val images, less than {REQUIRED_AP50}",
            hint="check this machine with rtdetr doctor",
            code="demo-learned-little",
        )
