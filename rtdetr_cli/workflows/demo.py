"""The whole chain on a dataset of our own making: nothing is fetched, nothing is skipped, and it must learn.

Each step is the one that the commands take; what the demo adds is the order, and that it ends in a figure that could
have failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import GateError, RtdetrError, UsageError
from rtdetr_cli.evaluate.run import Evaluation, evaluate
from rtdetr_cli.export.run import Artefact, export_model
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.infer.job import Predicted, predict_images
from rtdetr_cli.infer.selection import select_by
from rtdetr_cli.infer.sources import find_sources
from rtdetr_cli.train.stop import StopFlag
from rtdetr_cli.weights.load import load_model
from rtdetr_cli.workflows.finetune import RunFinished, Event, finetune

TRAIN_IMAGES = 800
VAL_IMAGES = 100
SIDE = 192
EPOCHS = 10
WANTED_AP50 = 0.5
SHOWN = 12


@dataclass(slots=True)
class Demo:
    """One demo in one folder; the steps are called in the order in which they stand.

    Attributes:
        folder: where everything goes; made, or empty, or an earlier demo's.
        epochs: of the training.
        train_images, val_images: of the dataset; fewer make a faster and worse demo.
        seed: of the dataset and of the training.
    """

    folder: Path
    epochs: int = EPOCHS
    train_images: int = TRAIN_IMAGES
    val_images: int = VAL_IMAGES
    seed: int = 0
    run: Path = field(default_factory=Path)
    best: Path = field(default_factory=Path)

    @property
    def data(self) -> Path:
        """Folder of the dataset."""
        return self.folder / "shapes"

    def make_dataset(self) -> Path:
        """Write the dataset; an earlier demo's is made again, to the same bytes.

        Raises:
            UsageError: the folder holds something else.
            RtdetrError: it cannot be written.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file, not a folder", hint="rtdetr demo DIR names another")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.data / "train.json").is_file():
            raise UsageError(
                f"the folder {self.folder} is not empty and holds no earlier demo", hint="rtdetr demo DIR names another"
            )
        try:
            return generate_dataset(self.data, train=self.train_images, val=self.val_images, imgsz=SIDE, seed=self.seed)
        except OSError as error:
            raise RtdetrError(
                f"{self.folder} cannot be written: {error.strerror or error}", code="not-writable"
            ) from error

    def check_dataset(self) -> dict[str, int]:
        """Have the doctor look at every image and box; return the number of findings of each severity."""
        return examine(self.data, imgsz=(SIDE, SIDE)).counts()

    def train(self, *, stop: StopFlag | None = None) -> Iterator[Event]:
        """Train `tiny` from random weights."""
        config = resolve_run(
            {
                "data": str(self.data),
                "preset": "tiny",
                "weights": "none",
                "epochs": self.epochs,
                "out": str(self.folder / "runs"),
                "seed": self.seed,
            },
            sets=["eval_every=4"],
        )
        for event in finetune(config, stop=stop, argv=["rtdetr", "demo"]):
            if isinstance(event, RunFinished):
                self.run, self.best = event.folder, event.best
            yield event

    def held_out(self) -> Dataset:
        """Return the images that training has not seen."""
        val = load_splits(self.data).val
        assert val is not None
        return val

    def evaluate(self) -> Evaluation:
        """Evaluate the best model on the held-out images."""
        return evaluate(open_backend(self.best), self.held_out())

    def predict(self) -> tuple[Path, int, int]:
        """Draw the first held-out images with what the model finds; return (folder, images, boxes)."""
        val = self.held_out()
        folder = self.folder / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        sources = find_sources([str(val.path(i)) for i in range(min(SHOWN, len(val)))])
        backend = open_backend(self.best)
        boxes = sum(
            len(event.found)
            for event in predict_images(sources, backend, select_by(backend.header), batch=4, draw_to=folder)
            if isinstance(event, Predicted)
        )
        return folder, len(sources), boxes

    def export(self, *, tell: Callable[[str], None]) -> Artefact:
        """Export to ONNX and hold the file against the model on the held-out images.

        Raises:
            GateError: the file does not detect what the model detects.
        """
        model, header = load_model(self.best)
        artefact = export_model(
            model, header, self.run / "export", images=self.held_out(), stem=self.best.stem, tell=tell
        )[0]
        if not artefact.passed:
            assert artefact.verdict is not None
            raise GateError(f"the export does not agree with the model: {artefact.verdict.summary}", code="parity")
        return artefact


def judge(metrics: dict[str, Any]) -> None:
    """Hold the demo to what it promises.

    Raises:
        GateError: it did not learn.
    """
    found = metrics.get("AP50") or 0.0
    if found < WANTED_AP50:
        raise GateError(
            f"the demo reached AP50 {found:.3f} on held-out images, less than {WANTED_AP50}",
            hint="rtdetr doctor says whether this machine is fit",
            code="demo-learned-little",
        )
