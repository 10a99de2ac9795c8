"""`rtdetr eval`: metrics of a model, their confidence intervals, thresholds, and an analysis of its errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.cli.evaluation import EvaluatedModel
    from rtdetr_cli.evaluate.bootstrap import Interval
    from rtdetr_cli.evaluate.error_analysis import ErrorAnalysis
    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.evaluate.thresholds import Calibration


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
    batch: Annotated[str, typer.Option("--batch", "-b", help="Images per forward pass, or auto.")] = "auto",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of decoder layers to use.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Number of queries to use.")] = None,
    imgsz: Annotated[str | None, typer.Option(help="Input size: 640, or height first 480x640.")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="Sampling of a published file: bilinear (default) or discrete.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a GPU such as 0.")] = "auto",
    calibrate: Annotated[
        str | None,
        typer.Option(help="Find score thresholds for f1 or precision=0.9 and store them in the model."),
    ] = None,
    ci: Annotated[
        int,
        typer.Option(min=0, max=100_000, help="Bootstrap resamples for a 95 % interval of AP, such as 1000; 0: none."),
    ] = 0,
    fail_under: Annotated[float | None, typer.Option(help="Exit with code 6 if AP is below this (0 to 1).")] = None,
    save_json: Annotated[Path | None, typer.Option(help="Write the detections as COCO results.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML report with tables, plots and images.")] = None,
    evaluator: Annotated[str, typer.Option(help="hotcoco or pycocotools.")] = "hotcoco",
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Evaluate a model, or detections from a file, with the COCO metrics and an analysis of the errors."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.evaluation import evaluate_model, evaluate_predictions, parse_batch
    from rtdetr_cli.cli.select import output_file, parse_size, resolve_model
    from rtdetr_cli.evaluate.bootstrap import small_split_warning
    from rtdetr_cli.evaluate.coco import PYCOCOTOOLS_LACKS
    from rtdetr_cli.evaluate.stored_thresholds import check_can_store

    overrides: dict[str, Any] = {"layers": layers, "queries": queries, "sampling": sampling}
    overrides["imgsz"] = parse_size(imgsz) if imgsz else None
    if predictions is not None:
        _check_predictions(data, MODEL=model, **overrides, calibrate=calibrate)
    _check_options(evaluator, fail_under, calibrate, split)
    parse_batch(batch)
    for flag, target in (("--save-json", save_json), ("--html", html)):
        if target is not None:
            output_file(target, flag)

    if predictions is not None:
        evaluated = evaluate_predictions(predictions, data=data, images=images, split=split, evaluator=evaluator)
    else:
        path = resolve_model(model)
        if calibrate is not None:
            check_can_store(path)
        evaluated = evaluate_model(
            path,
            data=data,
            images=images,
            split=split,
            batch=batch,
            device=device,
            evaluator=evaluator,
            **overrides,
        )
    _print_notes(evaluated, calibrating=calibrate is not None)
    if evaluator == "pycocotools":
        terminal.say(PYCOCOTOOLS_LACKS)
    report = _analyze(evaluated, ci=ci, target=calibrate)
    document = report.to_json()
    if fail_under is not None:
        document["gate"] = {"fail_under": fail_under, "passed": report.passes(fail_under)}
    if saved := _save(report, save_json, html):
        document["saved"] = saved
    if as_json:
        terminal.emit_json(document)
    else:
        _print_report(report)
    if report.interval is not None and (warning := small_split_warning(report.interval)):
        terminal.warn(warning)
    if fail_under is not None and not report.passes(fail_under):
        _fail(report.ap, fail_under, as_json=as_json)


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
    from rtdetr_cli.evaluate.thresholds import parse_target

    if evaluator not in EVALUATORS:
        raise UsageError(f"there is no evaluator {evaluator!r}", hint="--evaluator hotcoco or pycocotools")
    if fail_under is not None and not 0 <= fail_under <= 1:
        raise UsageError(
            f"--fail-under {fail_under:g} is not a fraction from 0 to 1", hint="an AP of 40 is --fail-under 0.4"
        )
    if calibrate is not None:
        parse_target(calibrate)
        if split == "train":
            raise UsageError(
                "--calibrate cannot use the train split: scores are higher on images that the model was trained on, "
                "so the thresholds would be too high",
                hint="--split val, or another dataset with --data",
                code="calibrate-split",
            )


def _print_notes(evaluated: EvaluatedModel, *, calibrating: bool) -> None:
    from rtdetr_cli.cli import terminal

    evaluation = evaluated.evaluation
    for note in evaluation.notes:
        terminal.warn(note)
    if calibrating and evaluated.overrides:
        terminal.warn(
            f"the thresholds are for the model with {evaluated.overrides}: use the same flags in export and predict"
        )
    elif evaluated.thresholds_warning and not calibrating:
        terminal.warn(evaluated.thresholds_warning)
    for name, reason in evaluation.unreadable[:5]:
        terminal.warn(f"{name}: {reason}")


@dataclass(frozen=True, slots=True)
class _Report:
    """Everything that is printed or written about one evaluation."""

    evaluated: EvaluatedModel
    analysis: ErrorAnalysis
    interval: Interval | None = None
    class_intervals: dict[int, Interval] = field(default_factory=dict)  # by label
    calibration: Calibration | None = None
    exports: dict[str, list[str]] = field(default_factory=dict)  # stale ones, and the folders that were searched

    @property
    def evaluation(self) -> Evaluation:
        return self.evaluated.evaluation

    @property
    def ap(self) -> float | None:
        return self.evaluation.metrics["AP"]

    def passes(self, fail_under: float) -> bool:
        return self.ap is not None and self.ap >= fail_under

    def to_json(self) -> dict[str, Any]:
        document = self.evaluation.to_json()
        document["model"] = self.evaluated.facts
        document["errors"] = self.analysis.to_json()
        if self.interval is not None:
            document["interval"] = self.interval.to_json()
            for label, interval in self.class_intervals.items():
                document["per_class"][label]["interval"] = interval.to_json()
        if self.calibration is not None:
            thresholds = self.calibration.thresholds
            overall, classes = self.evaluation.at_thresholds(thresholds)
            names = self.evaluation.dataset.names
            document["calibration"] = {
                "target": thresholds.target,
                "overall": thresholds.overall,
                "per_class": [{"name": n, **point.to_json()} for n, point in zip(names, classes, strict=True)],
                "at_thresholds": overall.to_json(),
                "one_for_all": self.evaluation.at_one_threshold(thresholds.overall).to_json(),
                "notes": list(self.calibration.notes),
                **self.exports,
            }
        return document


def _analyze(evaluated: EvaluatedModel, *, ci: int, target: str | None) -> _Report:
    """Compute the intervals, calibrate and store thresholds where asked, and analyze the errors."""
    from rtdetr_cli.evaluate.bootstrap import resample
    from rtdetr_cli.evaluate.error_analysis import analyze_errors

    evaluation = evaluated.evaluation
    interval, class_intervals = None, {}
    ap = evaluation.metrics["AP"]
    if ci and ap is not None:
        resamples = resample(evaluation.dataset, evaluation.table, resamples=ci)
        interval = resamples.interval(ap)
        for label, row in enumerate(evaluation.per_class):
            of_class = None if row["AP"] is None else resamples.class_interval(row["AP"], label)
            if of_class is not None:
                class_intervals[label] = of_class
    if target is None:
        return _Report(evaluated, analyze_errors(evaluation), interval, class_intervals)
    calibration, exports = _calibrate(evaluated, target)
    thresholds = calibration.thresholds
    origin = f"the thresholds calibrated now for {thresholds.target}"
    analysis = analyze_errors(evaluation, thresholds.per_class, origin=origin)
    return _Report(evaluated, analysis, interval, class_intervals, calibration, exports)


def _calibrate(evaluated: EvaluatedModel, target: str) -> tuple[Calibration, dict[str, list[str]]]:
    """Find thresholds, store them in the model, and look for exports that carry other ones."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.classes import map_classes
    from rtdetr_cli.evaluate.stored_thresholds import export_folders, stale_exports, store_thresholds
    from rtdetr_cli.evaluate.thresholds import calibrate

    evaluation, facts = evaluated.evaluation, evaluated.facts
    path = Path(facts["model"])
    calibration = calibrate(evaluation.dataset, evaluation.table, evaluation.matches, target)
    labels = map_classes(evaluated.class_names, evaluation.dataset).labels
    height, width = facts["imgsz"]
    header = store_thresholds(
        path, calibration.thresholds, labels, imgsz=(height, width), layers=facts["layers"], queries=facts["queries"]
    )
    for note in calibration.notes:
        terminal.warn(note)
    stale = [str(export) for export in stale_exports(path, header)]
    for export in stale:
        terminal.warn(f"{export} was exported before and carries other thresholds: export it again")
    folders = [str(folder) for folder in export_folders(path)]
    terminal.say(f"searched for older exports in {', '.join(folders)}")
    return calibration, {"stale_exports": stale, "export_folders": folders}


def _save(report: _Report, results: Path | None, html: Path | None) -> dict[str, str]:
    """Write the files that were asked for; return their paths by kind."""
    saved = {}
    if results is not None:
        import json

        from rtdetr_cli.evaluate.results import coco_results
        from rtdetr_cli.files import atomic_write

        with atomic_write(results) as temporary:
            detections = coco_results(report.evaluation.dataset, report.evaluation.table)
            temporary.write_text(json.dumps(detections), encoding="utf-8")
        saved["results"] = str(results)
    if html is not None:
        from rtdetr_cli.cli import terminal
        from rtdetr_cli.evaluate.report import write_page

        with terminal.progress(None, "report"):
            write_page(
                html,
                report.evaluation,
                report.analysis,
                model=report.evaluated.description,
                interval=report.interval,
                calibration=report.calibration,
            )
        saved["html"] = str(html)
    return saved


def _fail(ap: float | None, fail_under: float, *, as_json: bool) -> None:
    from rtdetr_cli.cli import terminal

    reason = "AP is not defined" if ap is None else f"AP {ap:.4f} is below {fail_under:g}"
    failure = GateError(f"{reason} (--fail-under)", code="fail-under")
    if not as_json:
        raise failure
    terminal.complain(failure.message)  # stdout already has its one document
    raise typer.Exit(failure.exit_code)


def _print_report(report: _Report) -> None:
    from rtdetr_cli.cli import terminal

    evaluation = report.evaluation
    _print_metrics(report)
    _print_thresholds(evaluation, report.calibration)
    _print_errors(report.analysis)
    if evaluation.seconds:
        seconds = evaluation.seconds["total"]
        terminal.say(f"{terminal.duration(seconds)}, {len(evaluation.dataset) / max(seconds, 1e-9):.1f} images/s")


def _print_metrics(report: _Report) -> None:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.coco import METRICS
    from rtdetr_cli.text import counted

    evaluation = report.evaluation
    dataset = evaluation.dataset
    terminal.out(
        f"{report.evaluated.description} on {dataset.name} {dataset.split}: {len(dataset)} images, "
        f"{int((~dataset.crowd).sum())} boxes, {len(dataset.categories)} classes ({evaluation.evaluator})"
    )
    if report.interval is not None:
        terminal.out(f"AP {report.interval}")
    terminal.table(METRICS, [[evaluation.metrics[name] for name in METRICS]])
    with_interval = report.interval is not None
    rows: list[list[object]] = []
    for label, row in enumerate(evaluation.per_class):
        if row["boxes"]:
            interval = report.class_intervals.get(label)
            rows.append(
                [
                    *(row[key] for key in ("name", "boxes", "AP")),
                    *([f"± {interval.half_width:.3f}" if interval else None] if with_interval else []),
                    *(row[key] for key in ("AP50", "precision", "recall", "f1", "threshold", "APs", "APm", "APl")),
                ]
            )
    columns = ["class", "boxes", "AP", *(["95 %"] if with_interval else []), "AP50"]
    terminal.table(
        [*columns, "P", "R", "F1", "threshold", "APs", "APm", "APl"],
        rows,
        title="By class (precision and recall at the threshold with the best F1)",
    )
    if len(rows) < len(evaluation.per_class):
        without_boxes = counted(len(evaluation.per_class) - len(rows), "class")
        terminal.out(f"not listed: {without_boxes} without boxes in this split\n")
    keys = ("AP", "AP50", "precision", "recall", "f1", "threshold")
    terminal.table(
        ("size", "AP", "AP50", "P", "R", "F1", "threshold"),
        [[size, *(row[key] for key in keys)] for size, row in evaluation.by_size.items()],
        title="By box size (small up to 32x32, large from 96x96)",
    )


def _print_thresholds(evaluation: Evaluation, calibration: Calibration | None) -> None:
    from rtdetr_cli.cli import terminal

    thresholds = calibration.thresholds if calibration else evaluation.thresholds
    if thresholds is None:
        best = evaluation.best
        if best.threshold is not None:
            terminal.out(
                f"best F1 with one threshold for all classes: {best.f1:.3f} at score {best.threshold:.3f} "
                f"(precision {best.precision:.3f}, recall {best.recall:.3f})\n"
            )
        return
    overall, per_class = evaluation.at_thresholds(thresholds)
    names = (*evaluation.dataset.names, "all classes, each at its own", "all classes at one threshold")
    points = (*per_class, overall, evaluation.at_one_threshold(thresholds.overall))
    rows = [[name, p.threshold, p.precision, p.recall, p.f1] for name, p in zip(names, points, strict=True)]
    rows[-2][1] = None  # each class has its own
    terminal.table(
        ("class", "threshold", "precision", "recall", "F1"),
        rows,
        title=f"Thresholds for {thresholds.target}, {'now stored' if calibration else 'stored'} in the model",
    )


def _print_errors(analysis: ErrorAnalysis) -> None:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.text import counted

    gains = analysis.gains or {}
    terminal.table(
        ("error", "count", "AP50 gained if fixed"),
        [[kind, count, gains.get(kind)] for kind, count in analysis.counts.items()],
        title="Errors",
    )
    terminal.out(f"errors are counted at {analysis.origin}; gains are over all detections")
    empty = analysis.empty
    if empty["pictures"]:
        terminal.out(
            f"{counted(empty['pictures'], 'image')} without objects: {empty['with_false_positives']} with false "
            f"positives ({empty['false_positives']} in total)"
        )
    file_names = analysis.evaluation.dataset.file_names
    worst = [
        f"{file_names[i.image]} ({i.missed} missed, {counted(i.false_positives, 'false positive')})"
        for i in analysis.worst(3)
    ]
    if worst:
        terminal.out(f"worst images: {', '.join(worst)}")
    if analysis.suspects:
        terminal.out(f"{counted(len(analysis.suspects), 'annotation')} may be wrong: --html FILE shows them")
    if analysis.suspects_note:
        terminal.out(analysis.suspects_note)
