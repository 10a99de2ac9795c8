"""What the commands that judge models share: open a model, choose its split, run it with progress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_cli.errors import UsageError

if TYPE_CHECKING:
    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.evaluate.source import Chosen


def parse_batch(text: str) -> int | None:
    """Read `--batch`: a number of images, or None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UsageError(f"--batch {text} is not a number of images", hint="--batch 8, or --batch auto")


def run_model(
    path: Path,
    *,
    data: Path | None,
    images: Path | None,
    split: str,
    batch: str,
    evaluator: str,
    options: dict[str, Any],
) -> tuple[Chosen, Evaluation, dict[str, Any]]:
    """Evaluate a model file on a split.

    Args:
        path: the model file.
        data: the dataset, or None for the model's own.
        images: folder of the images.
        split: `train`, `val` or `test`.
        batch: images at once, or `auto`.
        evaluator: `hotcoco` or `pycocotools`.
        options: of `open_backend`: device, imgsz, layers, queries, sampling.

    Returns:
        The split, the evaluation, and facts about the model for the JSON document.
    """
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.run import evaluate
    from rtdetr_cli.evaluate.source import choose_split
    from rtdetr_cli.infer.backend import open_backend
    from rtdetr_cli.infer.selection import used_elsewhere

    if data is not None and not data.exists():
        choose_split(data, split=split)  # says what is wrong before the model is loaded
    backend = open_backend(path, **options)
    chosen = choose_split(data, split=split, images=images, model=path, header=backend.header)
    for note in chosen.notes:
        terminal.say(note)
    at_once = parse_batch(batch) or backend.fixed_batch or batch_for(backend.kind, options["device"])
    with terminal.progress(len(chosen.dataset), "eval") as bar:
        evaluation = evaluate(backend, chosen.dataset, batch=at_once, progress=bar.advance, evaluator=evaluator)
    header = backend.header
    elsewhere = used_elsewhere(header, backend.imgsz)
    facts = {
        "model": str(path),
        "kind": backend.kind,
        "imgsz": list(backend.imgsz),
        "identity": header.identity,
        "layers": options["layers"] or header.layers or None,
        "queries": options["queries"] or header.queries,
        "sampling": header.sampling,
        "names": list(header.names),
        "elsewhere": "" if elsewhere is None else elsewhere[0],
        "dial": [f"--{name} {_shown(options[name])}" for name in ("layers", "queries", "imgsz") if options[name]],
    }
    return chosen, evaluation, facts


def _shown(value: Any) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else str(value)


def batch_for(kind: str, device: str) -> int:
    """Return a batch that keeps the device busy: a GPU wants many images, a CPU only few."""
    if kind != "torch" or device == "cpu":
        return 4
    import torch

    return 16 if torch.cuda.is_available() else 4
