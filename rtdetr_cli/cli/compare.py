"""`rtdetr compare`: is B better than A, and is that more than luck?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.evaluate.run import Evaluation


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Model, run folder, or COCO results (.json).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The other one.")],
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset; the one that A was trained with when left out.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, when it cannot be guessed.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    ci: Annotated[int, typer.Option(min=100, max=100_000, help="Resamples of the images.")] = 1000,
    batch: Annotated[str, typer.Option("--batch", "-b", help="Images at once.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, or a GPU: 0.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Judge two models on the same images, and say whether one is better and how sure that is."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.judging import parse_batch

    parse_batch(batch)
    if not _is_results(a) and not _is_results(b) and a.resolve() == b.resolve():
        raise UsageError(f"A and B are both {a}", hint="name two models", code="same-model")
    first, name_a, source = _judge(a, data, images=images, split=split, batch=batch, device=device)
    second, name_b, _ = _judge(b, source, images=images, split=split, batch=batch, device=device)
    for name, evaluation in ((name_a, first), (name_b, second)):
        for note in evaluation.notes:
            terminal.warn(f"{name}: {note}")
    dataset = first.dataset
    if dataset.image_ids.tolist() != second.dataset.image_ids.tolist():
        raise DataError("A and B could not read the same images, so they cannot be paired", code="images-differ")
    values = (first.metrics["AP"], second.metrics["AP"])
    if values[0] is None or values[1] is None:
        raise DataError(
            f"the {dataset.split} split of {dataset.name} has no boxes, so there is no AP to compare",
            hint="--split or --data names another",
            code="empty-split",
        )

    from rtdetr_cli.evaluate.bootstrap import compare as compare_tables
    from rtdetr_cli.evaluate.bootstrap import too_small

    found, (drawn_a, drawn_b) = compare_tables(
        dataset, (first.table, second.table), (values[0], values[1]), resamples=ci
    )
    document: dict[str, Any] = {
        "a": {"name": name_a, "metrics": first.metrics, "interval": found.a.to_json()},
        "b": {"name": name_b, "metrics": second.metrics, "interval": found.b.to_json()},
        "difference": found.difference.to_json(),
        "probability_b_better": found.better,
        "verdict": found.verdict,
        "sentence": found.sentence(),
        "pictures": len(dataset),
        "resamples": ci,
        "per_class": [],
    }
    for label, (row_a, row_b) in enumerate(zip(first.per_class, second.per_class, strict=True)):
        gap = None if row_a["AP"] is None else drawn_b.class_gap(drawn_a, row_b["AP"] - row_a["AP"], label)
        document["per_class"].append(
            {
                "name": row_a["name"],
                "category_id": row_a["category_id"],
                "boxes": row_a["boxes"],
                "a": row_a["AP"],
                "b": row_b["AP"],
                "difference": None if row_a["AP"] is None else row_b["AP"] - row_a["AP"],
                "interval": None if gap is None else gap.to_json(),
            }
        )
    if as_json:
        terminal.emit_json(document)
    else:
        _show(document, found.a.half, found.b.half, found.difference.half)
    if said := too_small(found.a if found.a.half > found.b.half else found.b):
        terminal.warn(said)


def _is_results(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _judge(
    path: Path, data: Path | None, *, images: Path | None, split: str, batch: str, device: str
) -> tuple[Evaluation, str, Path | None]:
    """Evaluate a model or a file of results; return it with its name and the dataset it was judged on."""
    if _is_results(path):
        from rtdetr_cli.evaluate.results import read_results
        from rtdetr_cli.evaluate.run import metrics_from
        from rtdetr_cli.evaluate.source import choose_split

        if data is None:
            raise UsageError(
                f"{path} holds results, and the dataset that they are for is not named",
                hint="--data DATA",
                code="data-missing",
            )
        chosen = choose_split(data, split=split, images=images, find_images=False)
        return metrics_from(chosen.dataset, read_results(path, chosen.dataset)), str(path), data
    from rtdetr_cli.cli.judging import run_model
    from rtdetr_cli.cli.select import BEST, model_file

    file = model_file(path)
    chosen, evaluation, _ = run_model(
        file,
        data=data,
        images=images,
        split=split,
        batch=batch,
        evaluator="hotcoco",
        options={"device": device, "imgsz": None, "layers": None, "queries": None, "sampling": None},
    )
    name = str(file.parent) if file.name == BEST else str(file)
    return evaluation, name, chosen.splits.source


def _show(document: dict[str, Any], half_a: float, half_b: float, half: float) -> None:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.coco import METRICS

    a, b = document["a"]["metrics"], document["b"]["metrics"]
    halves = {"AP": (half_a, half_b, half)}

    def gap(name: str) -> float | None:
        return None if a[name] is None or b[name] is None else b[name] - a[name]

    def cell(value: float | None, known: float | None, *, signed: bool = False) -> str:
        if value is None:
            return "-"
        shown = f"{value:+.3f}" if signed else f"{value:.3f}"
        return shown if known is None else f"{shown} ± {known:.3f}"

    rows = []
    for name in METRICS:
        known = halves.get(name, (None, None, None))
        rows.append([name, cell(a[name], known[0]), cell(b[name], known[1]), cell(gap(name), known[2], signed=True)])
    terminal.out(f"A {document['a']['name']}")
    terminal.out(f"B {document['b']['name']}")
    terminal.table(("", "A", "B", "B - A"), rows)
    terminal.table(
        ("class", "boxes", "A", "B", "B - A"),
        [
            [
                row["name"],
                row["boxes"],
                row["a"],
                row["b"],
                cell(row["difference"], row["interval"] and row["interval"]["half"], signed=True),
            ]
            for row in document["per_class"]
        ],
        title="AP by class",
    )
    terminal.out(document["sentence"])
