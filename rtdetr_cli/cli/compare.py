"""`rtdetr compare`: whether one of two models is better, and how certain that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.evaluation import evaluate_model, evaluate_predictions, parse_batch
from rtdetr_cli.cli.options import BatchOption, DeviceOption, JsonFlag
from rtdetr_cli.cli.select import model_file, model_name
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import EXPORT_SUFFIXES

if TYPE_CHECKING:
    from rtdetr_cli.cli.evaluation import EvaluatedModel


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Model, run folder, or COCO results (.json).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Model, run folder, or COCO results (.json).")],
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset (default: the one that A was trained with).")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder, if not found automatically.")] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on: train, val or test.")] = "val",
    ci: Annotated[
        int, typer.Option(min=100, max=100_000, help="Bootstrap resamples for the confidence interval.")
    ] = 1000,
    batch: BatchOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Compare two models on the same images, with a confidence interval of the difference in AP."""
    from rtdetr_cli.evaluate.bootstrap import compare as compare_tables
    from rtdetr_cli.evaluate.bootstrap import small_split_warning

    options: dict[str, Any] = {"images": images, "split": split, "batch": parse_batch(batch), "device": device}
    if not _is_results(a) and not _is_results(b) and a.resolve() == b.resolve():
        raise UsageError(f"A and B are both {a}", hint="pass two different models", code="same-model")
    name_a, model_a = _evaluate(a, data, **options)
    name_b, model_b = _evaluate(b, model_a.source, known_notes=model_a.notes, **options)
    first, second = model_a.evaluation, model_b.evaluation
    shared = [note for note in first.notes if note in second.notes]
    for note in shared:
        terminal.warn(note)
    for name, evaluation in ((name_a, first), (name_b, second)):
        for note in evaluation.notes:
            if note not in shared:
                terminal.warn(f"{name}: {note}")
    dataset = first.dataset
    if dataset.image_ids.tolist() != second.dataset.image_ids.tolist():
        raise DataError(
            "A and B cannot be compared: different images could be read for each of them", code="images-differ"
        )
    ap_a, ap_b = first.metrics["AP"], second.metrics["AP"]
    if ap_a is None or ap_b is None:
        raise DataError(
            f"the {dataset.split} split of {dataset.name} has no boxes, so there is no AP to compare",
            hint="choose another split with --split, or another dataset with --data",
            code="empty-split",
        )
    comparison, (resamples_a, resamples_b) = compare_tables(
        dataset, (first.table, second.table), (ap_a, ap_b), resamples=ci
    )
    rows = []
    for label, (row_a, row_b) in enumerate(zip(first.per_class, second.per_class, strict=True)):
        facts = {key: row_a[key] for key in ("name", "category_id", "boxes")}
        difference = interval = None
        if row_a["AP"] is not None:
            difference = row_b["AP"] - row_a["AP"]
            interval = resamples_b.class_interval(difference, label, minus=resamples_a)
        figures = {"a": row_a["AP"], "b": row_b["AP"], "difference": difference}
        rows.append({**facts, **figures, "interval": None if interval is None else interval.to_json()})
    document: dict[str, Any] = {
        "a": {"name": name_a, "metrics": first.metrics, "interval": comparison.a.to_json()},
        "b": {"name": name_b, "metrics": second.metrics, "interval": comparison.b.to_json()},
        "difference": comparison.difference.to_json(),
        "probability_b_better": comparison.probability_b_better,
        "verdict": comparison.verdict,
        "sentence": comparison.sentence(),
        "pictures": len(dataset),
        "resamples": ci,
        "per_class": rows,
    }
    if as_json:
        terminal.emit_json(document)
    else:
        _print_tables(document)
    if warning := small_split_warning(max(comparison.a, comparison.b, key=lambda interval: interval.half_width)):
        terminal.warn(warning)
    if not as_json:
        _show_next(a, b, comparison.verdict)


def _show_next(a: Path, b: Path, verdict: str) -> None:
    """Print the command that comes next: export the better model, or compare the speed of equally good ones."""
    if verdict == "undecided":
        if not _is_results(a) and not _is_results(b):
            terminal.next_step("rtdetr", "benchmark", a, b)
        return
    better = a if verdict == "a" else b
    if not _is_results(better) and model_file(better).suffix.lower() not in EXPORT_SUFFIXES:
        terminal.next_step("rtdetr", "export", better)


def _is_results(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _evaluate(
    path: Path, data: Path | None, *, images: Path | None, split: str, **options: Any
) -> tuple[str, EvaluatedModel]:
    """Evaluate a model or a file of results; return its name and the evaluation."""
    if _is_results(path):
        return str(path), evaluate_predictions(path, data=data, images=images, split=split)
    file = model_file(path)
    model = evaluate_model(file, data=data, images=images, split=split, **options)
    return str(model_name(file)), model


def _print_tables(document: dict[str, Any]) -> None:
    from rtdetr_cli.evaluate.coco import METRICS

    def cell(value: float | None, interval: dict[str, Any] | None = None, *, sign: str = "") -> str:
        if value is None:
            return "-"
        return f"{value:{sign}.3f}" + (f" ± {interval['half']:.3f}" if interval else "")

    a, b = document["a"], document["b"]
    rows = []
    for name in METRICS:
        value_a, value_b = a["metrics"][name], b["metrics"][name]
        gap = None if value_a is None or value_b is None else value_b - value_a
        intervals = (a["interval"], b["interval"], document["difference"]) if name == "AP" else (None, None, None)
        rows.append([name, cell(value_a, intervals[0]), cell(value_b, intervals[1]), cell(gap, intervals[2], sign="+")])
    terminal.out(f"A {a['name']}")
    terminal.out(f"B {b['name']}")
    terminal.table(("", "A", "B", "B - A"), rows)
    with_boxes = [row for row in document["per_class"] if row["boxes"]]
    terminal.table(
        ("class", "boxes", "A", "B", "B - A"),
        [
            [row["name"], row["boxes"], row["a"], row["b"], cell(row["difference"], row["interval"], sign="+")]
            for row in with_boxes
        ],
        title="AP by class",
    )
    if missing := len(document["per_class"]) - len(with_boxes):
        terminal.out(f"not listed: {counted(missing, 'class')} without boxes in this split\n")
    terminal.out(document["sentence"])
