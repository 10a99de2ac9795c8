"""What `eval` and `compare` share: evaluate a model or a file of detections on a split, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.select import open_model
from rtdetr_cli.config.settings import MAX_BATCH
from rtdetr_cli.errors import UsageError
from rtdetr_cli.text import whole_number

if TYPE_CHECKING:
    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.infer.backend import Backend


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """An evaluation, and what was evaluated.

    Attributes:
        source: path of the dataset.
        facts: about the model, for the JSON document.
        backend: the open model; None for detections from a file.
        notes: how the split was chosen.
    """

    evaluation: Evaluation
    source: Path
    facts: dict[str, Any]
    backend: Backend | None = None
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The model or file in words."""
        if "predictions" in self.facts:
            return str(self.facts["predictions"])
        height, width = self.facts["imgsz"]
        return f"{self.facts['model']} ({self.facts['kind']}, {height}x{width})"


def parse_batch(text: str) -> int | None:
    """Read `--batch`: a number of images, or None for `auto`; raises UsageError where it is neither."""
    if text == "auto":
        return None
    if (number := whole_number(text)) and number <= MAX_BATCH:
        return number
    raise UsageError(f"--batch {text} is not a number of images up to {MAX_BATCH:,}", hint="--batch 8, or --batch auto")


def evaluate_predictions(
    path: Path, *, data: Path | None, images: Path | None, split: str, evaluator: str = "hotcoco"
) -> EvaluatedModel:
    """Evaluate a file of COCO results on a split; the images need not exist."""
    from rtdetr_cli.evaluate.results import read_results
    from rtdetr_cli.evaluate.run import evaluate_table
    from rtdetr_cli.evaluate.source import choose_split

    if data is None:
        raise UsageError(f"{path} does not say which dataset it is for", hint="--data DATA", code="data-missing")
    selected = choose_split(data, split=split, images=images, find_images=False)
    table = read_results(path, selected.dataset)
    evaluation = evaluate_table(selected.dataset, table, evaluator, notes=selected.notes)
    return EvaluatedModel(evaluation, selected.source, {"predictions": str(path)})


def evaluate_model(
    path: Path,
    *,
    data: Path | None,
    images: Path | None,
    split: str,
    batch: int | None,
    device: str,
    evaluator: str = "hotcoco",
    runtime: str = "torch",
    known_notes: Sequence[str] = (),
    **overrides: Any,
) -> EvaluatedModel:
    """Evaluate a model file on a split of `choose_split`, and say what is noteworthy about it.

    `overrides` are those of `open_backend`, `runtime` is that of `--backend`; `known_notes` on the split have been
    printed before.
    """
    from rtdetr_cli.evaluate.run import evaluate
    from rtdetr_cli.evaluate.source import choose_split
    from rtdetr_cli.infer.backend import CAUTIONS, default_batch
    from rtdetr_cli.infer.exported import MANY_IMAGES
    from rtdetr_cli.weights.binding import modification_warning

    if data is not None and not data.exists():
        choose_split(data, split=split)  # raises the error of a missing dataset before the model is loaded
    backend = open_model(path, runtime, images=MANY_IMAGES, device=device, **overrides)  # a split has many
    header = backend.header
    for warning in (CAUTIONS.get(device), modification_warning(path, header)):
        if warning:
            terminal.warn(warning)
    selected = choose_split(data, split=split, images=images, model=path, header=header)
    for note in selected.notes:
        if note not in known_notes:
            terminal.say(note)
    with terminal.progress(len(selected.dataset), "eval") as bar:
        batch = batch or default_batch(backend)
        evaluation = evaluate(backend, selected.dataset, batch=batch, progress=bar.advance, evaluator=evaluator)
    facts = {
        "model": str(path),
        "kind": backend.kind,
        "imgsz": list(backend.imgsz),
        "identity": header.identity,
        "layers": header.layers or None,
        "queries": header.queries,
        "sampling": header.sampling,
        "dedupe": backend.dedupe,
    }
    return EvaluatedModel(evaluation, selected.source, facts, backend, selected.notes)
