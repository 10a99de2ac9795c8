"""`rtdetr eval`: metrics of a model, their confidence intervals, thresholds, and an analysis of its errors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.evaluation import evaluate_model, evaluate_predictions, parse_batch
from rtdetr_cli.cli.options import (
    BackendOption,
    BatchOption,
    DedupeOption,
    DeviceOption,
    JsonFlag,
    LayersOption,
    QueriesOption,
    SamplingOption,
    SizeOption,
)
from rtdetr_cli.cli.select import model_name, output_file, parse_size, resolve_model
from rtdetr_cli.errors import GateError, UsageError
from rtdetr_cli.files import write_text
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import EXPORT_SUFFIXES

if TYPE_CHECKING:
    from rtdetr_cli.cli.evaluation import EvaluatedModel
    from rtdetr_cli.evaluate.bootstrap import Interval
    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.weights.header import Thresholds


def evaluate_command(
    model: Annotated[
        Path | None, typer.Argument(help="Model file or run folder (default: the newest run).", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset (default: the one that the model was trained with).")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder, if not found automatically.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Evaluate detections from a COCO results file instead of a model.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on: train, val or test.")] = "val",
    batch: BatchOption = "auto",
    layers: LayersOption = None,
    queries: QueriesOption = None,
    imgsz: SizeOption = None,
    sampling: SamplingOption = None,
    dedupe: DedupeOption = None,
    device: DeviceOption = "auto",
    runtime: BackendOption = "torch",
    calibrate: Annotated[
        str | None,
        typer.Option(help="Find score thresholds for f1 or precision=0.9 and store them in the model."),
    ] = None,
    ci: Annotated[
        int,
        typer.Option(min=0, max=100_000, help="Bootstrap resamples for a 95% interval of AP, such as 1000; 0: none."),
    ] = 0,
    fail_under: Annotated[float | None, typer.Option(help="Exit with code 6 if AP is below this (0 to 1).")] = None,
    save_json: Annotated[Path | None, typer.Option(help="Write the detections as COCO results.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML report with tables, plots and images.")] = None,
    evaluator: Annotated[str, typer.Option(help="hotcoco or pycocotools.")] = "hotcoco",
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a model, or detections from a file, with the COCO metrics and an analysis of the errors."""
    from rtdetr_cli.evaluate.coco import PYCOCOTOOLS_LACKS
    from rtdetr_cli.evaluate.thresholds import check_can_store
    from rtdetr_cli.infer.duplicates import parse_dedupe

    size = parse_size(imgsz) if imgsz else None
    overrides: dict[str, Any] = {"layers": layers, "queries": queries, "sampling": sampling, "imgsz": size}
    overrides["dedupe"] = parse_dedupe(dedupe)
    if predictions is not None:
        _check_predictions(data, MODEL=model, **overrides, calibrate=calibrate)
    _check_options(evaluator, fail_under, calibrate, split)
    batch_size = parse_batch(batch)
    for flag, target in (("--save-json", save_json), ("--html", html)):
        if target is not None:
            output_file(target, flag)

    common: dict[str, Any] = {"data": data, "images": images, "split": split, "evaluator": evaluator}
    if predictions is not None:
        evaluated = evaluate_predictions(predictions, **common)
    else:
        path = resolve_model(model)
        if calibrate is not None:
            check_can_store(path)
        evaluated = evaluate_model(path, batch=batch_size, device=device, runtime=runtime, **common, **overrides)
    _print_notes(evaluated, overrides, calibrating=calibrate is not None)
    if evaluator == "pycocotools":
        terminal.say(PYCOCOTOOLS_LACKS)
    _report(
        evaluated, ci=ci, calibrate=calibrate, fail_under=fail_under, save_json=save_json, html=html, as_json=as_json
    )


def _check_predictions(data: Path | None, **others: object) -> None:
    clash = [name if name == "MODEL" else f"--{name}" for name, value in others.items() if value is not None]
    if clash:
        raise UsageError(
            f"--predictions replaces the model, so {' and '.join(clash)} cannot be used with it",
            hint="rtdetr eval --predictions results.json --data DATA",
            code="clash",
        )
    if data is None:
        raise UsageError(
            "--predictions needs the dataset that the images are from", hint="--data DATA", code="data-missing"
        )


def _check_options(evaluator: str, fail_under: float | None, calibrate: str | None, split: str) -> None:
    from rtdetr_cli.evaluate.coco import EVALUATORS
    from rtdetr_cli.evaluate.thresholds import check_calibration

    if evaluator not in EVALUATORS:
        raise UsageError(f"there is no evaluator {evaluator!r}", hint="--evaluator hotcoco or pycocotools")
    if fail_under is not None and not 0 <= fail_under <= 1:
        raise UsageError(
            f"--fail-under {fail_under:g} is not a fraction from 0 to 1", hint="an AP of 40 is --fail-under 0.4"
        )
    if calibrate is not None:
        check_calibration(calibrate, split)


def _print_notes(evaluated: EvaluatedModel, overrides: dict[str, Any], *, calibrating: bool) -> None:
    from rtdetr_cli.infer.duplicates import gamma_word
    from rtdetr_cli.infer.selection import threshold_mismatch

    evaluation, backend = evaluated.evaluation, evaluated.backend
    for note in evaluation.notes:
        terminal.warn(note)
    if calibrating:
        flags = {name: overrides[name] for name in ("layers", "queries")}
        flags["imgsz"] = "x".join(map(str, overrides["imgsz"] or ()))
        flags["dedupe"] = "" if overrides["dedupe"] is None else gamma_word(overrides["dedupe"])
        if given := " ".join(f"--{name} {value}" for name, value in flags.items() if value):
            terminal.warn(f"the thresholds are for the model with {given}: use the same flags in export and predict")
    elif backend and (mismatch := threshold_mismatch(backend.header, backend.imgsz)):
        terminal.warn(mismatch[0])
    for name, reason in evaluation.unreadable[:5]:
        terminal.warn(f"{name}: {reason}")


def _report(
    evaluated: EvaluatedModel,
    *,
    ci: int,
    calibrate: str | None,
    fail_under: float | None,
    save_json: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    from rtdetr_cli.evaluate.bootstrap import small_split_warning
    from rtdetr_cli.evaluate.error_analysis import analyze_errors
    from rtdetr_cli.evaluate.results import coco_results

    evaluation = evaluated.evaluation
    document = evaluation.to_json() | {"model": evaluated.facts}
    interval = _add_intervals(document, evaluation, ci) if ci else None
    calibrated: Thresholds | None = None
    if calibrate is None:
        analysis = analyze_errors(evaluation)
    else:
        calibrated, document["calibration"] = _calibrate(evaluated, calibrate)
        origin = f"the thresholds calibrated now for {calibrated.target}"
        analysis = analyze_errors(evaluation, calibrated.per_class, origin=origin)
    document["errors"] = analysis.to_json()
    ap = evaluation.metrics["AP"]
    passed = fail_under is None or (ap is not None and ap >= fail_under)
    if fail_under is not None:
        document["gate"] = {"fail_under": fail_under, "passed": passed}
    saved = {}
    if save_json is not None:
        write_text(save_json, json.dumps(coco_results(evaluation.dataset, evaluation.table)))
        saved["results"] = str(save_json)
    if html is not None:
        from rtdetr_cli.evaluate.report import write_page

        notes = document["calibration"]["notes"] if calibrated else ()
        facts = {"interval": interval, "calibrated": calibrated, "notes": notes}
        with terminal.progress(None, "report"):
            write_page(html, analysis, model=evaluated.description, **facts)
        saved["html"] = str(html)
    if saved:
        document["saved"] = saved

    if as_json:
        terminal.emit_json(document)
    else:
        _print_metrics(document, evaluated.description, interval)
        _print_thresholds(document)
        _print_errors(document["errors"])
        if html is not None:
            terminal.say(f"report  {html}")
        if evaluation.seconds:
            seconds = evaluation.seconds["total"]
            terminal.say(f"{terminal.duration(seconds)}, {len(evaluation.dataset) / max(seconds, 1e-9):.1f} images/s")
    if interval is not None and (warning := small_split_warning(interval)):
        terminal.warn(warning)
    if not passed:
        reason = "AP is not defined" if ap is None else f"AP {ap:.4f} is below {fail_under:g}"
        terminal.fail(GateError(f"{reason} (--fail-under)", code="fail-under"))
    if not as_json and "model" in evaluated.facts:
        _show_next(Path(evaluated.facts["model"]), evaluated.source)


def _show_next(model: Path, dataset: Path) -> None:
    """Print the command that comes next: export a finetuned model, or finetune a published one."""
    if model.suffix.lower() in EXPORT_SUFFIXES:
        return
    if model.suffix == ".safetensors":
        terminal.next_step("rtdetr", "export", model_name(model))
    else:
        terminal.next_step("rtdetr", "train", dataset, "--weights", model)


def _add_intervals(document: dict[str, Any], evaluation: Evaluation, resamples: int) -> Interval | None:
    """Add the intervals of AP and of the AP of each class to the document; return that of AP."""
    from rtdetr_cli.evaluate.bootstrap import resample

    ap = evaluation.metrics["AP"]
    if ap is None:
        return None
    resampled = resample(evaluation.dataset, evaluation.table, resamples=resamples)
    for label, row in enumerate(document["per_class"]):
        if row["AP"] is not None and (of_class := resampled.class_interval(row["AP"], label)):
            row["interval"] = of_class.to_json()
    interval = resampled.interval(ap)
    document["interval"] = interval.to_json()
    return interval


def _calibrate(evaluated: EvaluatedModel, target: str) -> tuple[Thresholds, dict[str, Any]]:
    """Find thresholds, store them in the model, and look for exports that carry other ones."""
    from rtdetr_cli.evaluate.thresholds import calibrate_model, export_folders, stale_exports

    evaluation = evaluated.evaluation
    path = Path(evaluated.facts["model"])
    assert evaluated.backend is not None
    thresholds, notes, header = calibrate_model(path, evaluation, target, evaluated.backend)
    for note in notes:
        terminal.warn(note)
    stale = [str(export) for export in stale_exports(path, header)]
    for export in stale:
        terminal.warn(f"{export} was exported before and carries other thresholds: export it again")
    folders = [str(folder) for folder in export_folders(path)]
    terminal.say(f"searched for older exports in {', '.join(folders)}")
    overall, single, classes = evaluation.at_thresholds(thresholds)
    names = evaluation.dataset.names
    return thresholds, {
        "target": thresholds.target,
        "overall": thresholds.overall,
        "per_class": [{"name": name, **asdict(point)} for name, point in zip(names, classes, strict=True)],
        "at_thresholds": asdict(overall),
        "one_for_all": asdict(single),
        "notes": list(notes),
        "stale_exports": stale,
        "export_folders": folders,
    }


def _print_metrics(document: dict[str, Any], model: str, interval: Interval | None) -> None:
    from rtdetr_cli.evaluate.coco import METRICS

    dataset, classes = document["dataset"], document["per_class"]
    terminal.out(
        f"{model} on {dataset['name']} {dataset['split']}: {counted(document['pictures'], 'image')}, "
        f"{counted(document['boxes'], 'box')}, {counted(len(classes), 'class')} ({document['evaluator']})"
    )
    if interval is not None:
        terminal.out(f"AP {interval}")
    dedupe = document["dedupe"]
    rows = [[document["metrics"][name] for name in METRICS]]
    titles = list(METRICS)
    if dedupe["without"] is not None:
        titles = ["duplicates", *METRICS]
        rows = [
            [f"rescored (gamma {dedupe['gamma']:g})", *rows[0]],
            ["as they are", *map(dedupe["without"].get, METRICS)],
        ]
    terminal.table(titles, rows)
    if dedupe["gamma"] and dedupe["without"] is None:
        terminal.out(f"duplicates are rescored in the graph (gamma {dedupe['gamma']:g})")
    rates = ("AP", "AP50", "precision", "recall", "f1", "threshold")
    with_boxes = [row for row in classes if row["boxes"]]
    rows = [[row[key] for key in ("name", "boxes", *rates, "APs", "APm", "APl")] for row in with_boxes]
    titles = ["class", "boxes", "AP", "AP50", "P", "R", "F1", "threshold", "APs", "APm", "APl"]
    if interval is not None:
        titles.insert(3, "95%")
        for cells, row in zip(rows, with_boxes, strict=True):
            cells.insert(3, f"± {row['interval']['half']:.3f}" if "interval" in row else None)
    terminal.table(titles, rows, title="By class (precision and recall at the threshold with the best F1)")
    if len(rows) < len(classes):
        terminal.out(f"not listed: {counted(len(classes) - len(rows), 'class')} without boxes in this split\n")
    terminal.table(
        ("size", "AP", "AP50", "P", "R", "F1", "threshold"),
        [[size, *(row[rate] for rate in rates)] for size, row in document["sizes"].items()],
        title="By box size (small up to 32x32, large from 96x96)",
    )


def _print_thresholds(document: dict[str, Any]) -> None:
    if calibration := document.get("calibration"):
        state, thresholds, overall = "now stored", calibration, calibration["at_thresholds"]
    elif stored := document.get("at_thresholds"):
        state, thresholds, overall = "stored", stored, stored["overall"]
    else:
        best = document["best_f1"]
        if best["threshold"] is not None:
            terminal.out(
                f"best F1 with one threshold for all classes: {best['f1']:.3f} at score {best['threshold']:.3f} "
                f"(precision {best['precision']:.3f}, recall {best['recall']:.3f})\n"
            )
        return
    points = list(thresholds["per_class"])
    if {point["threshold"] for point in points} != {thresholds["one_for_all"]["threshold"]}:
        points.append({**overall, "name": "all classes, each at its own threshold", "threshold": None})
    points.append({**thresholds["one_for_all"], "name": "all classes at one threshold"})
    terminal.table(
        ("class", "threshold", "precision", "recall", "F1"),
        [[point[key] for key in ("name", "threshold", "precision", "recall", "f1")] for point in points],
        title=f"Thresholds for {thresholds['target']}, {state} in the model",
    )


def _print_errors(errors: dict[str, Any]) -> None:
    terminal.table(
        ("error", "count", "AP50 gained if fixed"),
        [[row["kind"], row["count"], row["gain"]] for row in errors["kinds"]],
        title="Errors",
    )
    terminal.out(
        f"errors are counted at {errors['thresholds']['origin']}; gains are over all detections; missed leaves out "
        "objects that a classification or location error accounts for"
    )
    if (before := errors["duplicates_without_dedupe"]) is not None:
        left = next(row["count"] for row in errors["kinds"] if row["kind"] == "duplicate")
        terminal.out(f"{counted(left, 'duplicate')} left, {before} without rescoring")
    if most := errors["duplicates"]:
        terminal.out(
            f"a score of at least {most['score']:.3f} removes {most['removed']} of {counted(most['of'], 'duplicate')} "
            f"(and {most['correct_removed']} of {counted(most['correct'], 'correct detection')})"
        )
    empty = errors["empty_pictures"]
    if images := empty["pictures"]:
        terminal.out(
            f"{counted(images, 'image')} without objects: {empty['false_positives'] / images:.2f} false positives per "
            f"image, in {empty['with_false_positives']} of them"
        )
    worst = [
        f"{row['file']} ({row['missed']} missed, {counted(row['wrong'], 'false positive')})"
        for row in errors["worst"][:3]
    ]
    if worst:
        terminal.out(f"worst images: {', '.join(worst)}")
    if errors["suspects"]:
        terminal.out(f"{counted(len(errors['suspects']), 'annotation')} may be wrong: --html FILE shows them")
    if errors["suspects_note"]:
        terminal.out(errors["suspects_note"])
