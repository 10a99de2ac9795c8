"""`rtdetr eval`: how good a model is, how sure that is, and where it goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.evaluate.bootstrap import Interval
    from rtdetr_cli.evaluate.errors_analysis import ErrorAnalysis
    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.evaluate.source import Chosen
    from rtdetr_cli.evaluate.thresholds import Calibration, Point


_NOT_SHOWN = ("names", "stale_exports", "export_folders", "dial", "elsewhere")  # facts for this command alone


def evaluate_command(
    model: Annotated[
        Path | None, typer.Argument(help="Model file or run folder; the newest run when left out.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Dataset; the one that the model was trained with when left out."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, when it cannot be guessed.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="COCO results made by anything, in place of a model.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch: Annotated[str, typer.Option("--batch", "-b", help="Images at once.")] = "auto",
    layers: Annotated[int | None, typer.Option(min=1, help="Use only this many decoder layers.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Use only this many queries.")] = None,
    imgsz: Annotated[str | None, typer.Option(help="Input size, 640 or 480x640 (height first).")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="bilinear or discrete, for a published file, which cannot say.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a GPU: 0.")] = "auto",
    calibrate: Annotated[
        str | None,
        typer.Option(help="f1, or precision=0.9: find score thresholds and store them in the model."),
    ] = None,
    ci: Annotated[
        int, typer.Option(min=0, max=100_000, help="Resamples for a 95 % interval of AP, such as 1000; 0 for none.")
    ] = 0,
    fail_under: Annotated[
        float | None, typer.Option(help="Leave with exit code 6 when AP is below this fraction.")
    ] = None,
    save_json: Annotated[Path | None, typer.Option(help="Write the detections as COCO results.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with tables, plots and images.")] = None,
    evaluator: Annotated[str, typer.Option(help="hotcoco or pycocotools.")] = "hotcoco",
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Judge a model, or detections made by anything, by COCO's metrics; say how sure they are and what goes wrong."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.judging import parse_batch, run_model
    from rtdetr_cli.cli.select import output_file, parse_size, resolve_model

    # ------------------------------------------------------------------------------- refuse before heavy work
    size = parse_size(imgsz) if imgsz else None
    _refuse_clashes(
        predictions,
        {
            "MODEL": model,
            "--layers": layers,
            "--queries": queries,
            "--imgsz": imgsz,
            "--sampling": sampling,
            "--calibrate": calibrate,
        },
        data,
    )
    if evaluator not in ("hotcoco", "pycocotools"):
        raise UsageError(f"there is no evaluator {evaluator!r}", hint="--evaluator hotcoco or pycocotools")
    if fail_under is not None and not 0 <= fail_under <= 1:
        raise UsageError(
            f"--fail-under {fail_under:g} is not a fraction from 0 to 1", hint="an AP of 40 is --fail-under 0.4"
        )
    parse_batch(batch)
    for flag, target in (("--save-json", save_json), ("--html", html)):
        if target is not None:
            output_file(target, flag)
    if calibrate is not None:
        from rtdetr_cli.evaluate.thresholds import parse_target

        parse_target(calibrate)
        if split == "train":
            raise UsageError(
                "--calibrate on the train split: a model is surer of images it was trained on, so such thresholds "
                "mislead",
                hint="--split val, or another dataset with --data",
                code="calibrate-split",
            )

    # ------------------------------------------------------------------------------------------------ evaluate
    facts: dict[str, Any]
    if predictions is not None:
        from rtdetr_cli.evaluate.results import read_results
        from rtdetr_cli.evaluate.run import metrics_from
        from rtdetr_cli.evaluate.source import choose_split

        chosen = choose_split(data, split=split, images=images, find_images=False)
        table = read_results(predictions, chosen.dataset)
        evaluation = metrics_from(chosen.dataset, table, evaluator, notes=chosen.notes)
        facts, what = {"predictions": str(predictions)}, str(predictions)
        path = None
    else:
        path = resolve_model(model)
        if calibrate is not None:
            from rtdetr_cli.evaluate.stored import refuse_to_store

            refuse_to_store(path)
        chosen, evaluation, facts = run_model(
            path,
            data=data,
            images=images,
            split=split,
            batch=batch,
            evaluator=evaluator,
            options={
                "device": device,
                "imgsz": size,
                "layers": layers,
                "queries": queries,
                "sampling": sampling,
            },
        )
        what = f"{path} ({facts['kind']}, {facts['imgsz'][0]}x{facts['imgsz'][1]})"
    for note in evaluation.notes:
        terminal.warn(note)
    if facts.get("elsewhere") and calibrate is None:
        terminal.warn(facts["elsewhere"])
    if evaluator == "pycocotools":
        from rtdetr_cli.evaluate.coco import FALLBACK_LACKS

        terminal.say(FALLBACK_LACKS)
    for name, reason in evaluation.unreadable[:5]:
        terminal.warn(f"{name}: {reason}")

    # ----------------------------------------------------------------------------------- how sure, where wrong
    interval: Interval | None = None
    class_intervals: dict[str, Any] = {}
    ap = evaluation.metrics["AP"]
    if ci and ap is not None:
        from rtdetr_cli.evaluate.bootstrap import resample

        drawn = resample(evaluation.dataset, evaluation.table, resamples=ci)
        interval = drawn.interval(ap)
        for label, row in enumerate(evaluation.per_class):
            known = drawn.class_interval(row["AP"], label) if row["AP"] is not None else None
            if known is not None:
                class_intervals[row["name"]] = known
    calibration = _calibrate(path, evaluation, calibrate, facts) if calibrate and path is not None else None
    from rtdetr_cli.evaluate.errors_analysis import analyse

    analysis = analyse(evaluation, calibration.thresholds.per_class if calibration else None)
    if calibration:
        analysis = _named(analysis, f"the thresholds calibrated now for {calibration.thresholds.target}")

    # -------------------------------------------------------------------------------------------------- results
    document = _document(evaluation, analysis, interval, class_intervals, calibration, facts)
    if save_json is not None:
        _save_results(save_json, evaluation)
        document["saved"] = {"results": str(save_json)}
    if html is not None:
        from rtdetr_cli.evaluate.report import write_page

        with terminal.progress(None, "page"):
            write_page(html, evaluation, analysis, model=what, interval=interval, calibration=calibration)
        document.setdefault("saved", {})["html"] = str(html)
    if fail_under is not None:
        document["gate"] = {"fail_under": fail_under, "passed": ap is not None and ap >= fail_under}
    if as_json:
        terminal.emit_json(document)
    else:
        _show(evaluation, analysis, what, chosen, interval, class_intervals, calibration, document)
    if interval is not None:
        from rtdetr_cli.evaluate.bootstrap import too_small

        if said := too_small(interval):
            terminal.warn(said)
    if fail_under is not None and (ap is None or ap < fail_under):
        reason = "AP is not defined" if ap is None else f"AP {ap:.4f} is below {fail_under:g}"
        failure = GateError(f"{reason} (--fail-under)", code="fail-under")
        if not as_json:
            raise failure
        terminal.complain(failure.message)  # stdout already has its one document
        raise typer.Exit(failure.exit_code)


def _refuse_clashes(predictions: Path | None, others: dict[str, object], data: Path | None) -> None:
    if predictions is None:
        return
    clash = [name for name, value in others.items() if value is not None]
    if clash:
        raise UsageError(
            f"--predictions takes the place of a model, so {' and '.join(clash)} cannot be used with it",
            hint="rtdetr eval --predictions results.json --data DATA",
            code="clash",
        )
    if data is None:
        raise UsageError(
            "--predictions needs the dataset that the images are from", hint="--data DATA", code="data-missing"
        )


def _calibrate(path: Path, evaluation: Evaluation, target: str, facts: dict[str, Any]) -> Calibration:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.classes import map_classes
    from rtdetr_cli.evaluate.stored import export_folders, stale_exports, store_thresholds
    from rtdetr_cli.evaluate.thresholds import calibrate

    found = calibrate(evaluation.dataset, evaluation.table, evaluation.matches, target)
    if facts["dial"]:
        terminal.warn(
            f"the thresholds are for the model with {' '.join(facts['dial'])}: export and predict with the same"
        )
    labels = map_classes(facts["names"], evaluation.dataset).labels
    height, width = facts["imgsz"]
    header = store_thresholds(
        path, found.thresholds, labels, imgsz=(height, width), layers=facts["layers"], queries=facts["queries"]
    )
    facts["stale_exports"] = [str(p) for p in stale_exports(path, header)]
    facts["export_folders"] = [str(p) for p in export_folders(path)]
    for note in found.notes:
        terminal.warn(note)
    for stale in facts["stale_exports"]:
        terminal.warn(f"{stale} was exported before and carries other thresholds: export it again")
    terminal.say(f"exports made before were looked for in {', '.join(facts['export_folders'])}")
    return found


def _named(analysis: ErrorAnalysis, origin: str) -> ErrorAnalysis:
    from dataclasses import replace

    return replace(analysis, origin=origin)


def _save_results(path: Path, evaluation: Evaluation) -> None:
    import json

    from rtdetr_cli.evaluate.results import coco_results

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco_results(evaluation.dataset, evaluation.table)), encoding="utf-8")


def _document(
    evaluation: Evaluation,
    analysis: ErrorAnalysis,
    interval: Interval | None,
    class_intervals: dict[str, Any],
    calibration: Calibration | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    document = evaluation.to_json()
    document["model"] = {k: v for k, v in facts.items() if k not in _NOT_SHOWN}
    document["errors"] = analysis.to_json()
    if interval is not None:
        document["interval"] = interval.to_json()
        for row in document["per_class"]:
            if row["name"] in class_intervals:
                row["interval"] = class_intervals[row["name"]].to_json()
    if calibration is not None:
        thresholds = calibration.thresholds
        overall, classes = evaluation.at_thresholds(thresholds)
        document["calibration"] = {
            "target": thresholds.target,
            "overall": thresholds.overall,
            "per_class": [
                {"name": name, **point.to_json()} for name, point in zip(evaluation.dataset.names, classes, strict=True)
            ],
            "at_thresholds": overall.to_json(),
            "one_for_all": evaluation.at_one(thresholds.overall).to_json(),
            "notes": list(calibration.notes),
            "stale_exports": facts["stale_exports"],
            "export_folders": facts["export_folders"],
        }
    return document


def _show(
    evaluation: Evaluation,
    analysis: ErrorAnalysis,
    what: str,
    chosen: Chosen,
    interval: Interval | None,
    class_intervals: dict[str, Any],
    calibration: Calibration | None,
    document: dict[str, Any],
) -> None:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.coco import METRICS
    from rtdetr_cli.evaluate.errors_analysis import KINDS

    dataset = evaluation.dataset
    terminal.out(
        f"{what} on {dataset.name} {dataset.split}: {len(dataset)} images, {document['boxes']} boxes, "
        f"{len(dataset.categories)} classes ({evaluation.evaluator})"
    )
    if interval is not None:
        terminal.out(f"AP {interval}")
    terminal.table(METRICS, [[evaluation.metrics[name] for name in METRICS]])
    rows: list[list[object]] = []
    for row in evaluation.per_class:
        known = class_intervals.get(row["name"])
        rows.append(
            [
                row["name"],
                row["boxes"],
                row["AP"],
                *([None if known is None else f"± {known.half:.3f}"] if interval is not None else []),
                *(row[key] for key in ("AP50", "precision", "recall", "f1", "threshold", "APs", "APm", "APl")),
            ]
        )
    columns = ["class", "boxes", "AP", *(["95 %"] if interval is not None else []), "AP50"]
    terminal.table(
        [*columns, "P", "R", "F1", "score", "APs", "APm", "APl"],
        rows,
        title="By class, precision and recall at its best F1",
    )
    terminal.table(
        ("size", "AP", "AP50", "P", "R", "F1", "score"),
        [
            [size, *(figures[k] for k in ("AP", "AP50", "precision", "recall", "f1", "threshold"))]
            for size, figures in evaluation.by_size.items()
        ],
        title="By size, small to 32x32, large from 96x96",
    )
    _show_thresholds(evaluation, calibration)
    terminal.table(
        ("error", "count", "AP50 gained if fixed"),
        [[kind, analysis.counts[kind], None if analysis.gains is None else analysis.gains[kind]] for kind in KINDS],
        title="Errors",
    )
    terminal.out(f"errors are counted at {analysis.origin}; the gains are over all detections")
    empty = analysis.empty
    if empty["pictures"]:
        terminal.out(
            f"on the {empty['pictures']} images without objects: {empty['false_positives']} false positives "
            f"on {empty['with_false_positives']}"
        )
    worst = [f"{dataset.file_names[p.image]} ({p.missed} missed, {p.wrong} wrong)" for p in analysis.worst(3)]
    if worst:
        terminal.out(f"worst images: {', '.join(worst)}")
    if analysis.suspects:
        count = len(analysis.suspects)
        told = "annotation looks" if count == 1 else "annotations look"
        them = "it" if count == 1 else "them"
        terminal.out(f"{count} {told} doubtful: --html FILE shows {them}, --json lists {them}")
    if analysis.suspects_note:
        terminal.out(analysis.suspects_note)
    if evaluation.seconds:
        rate = len(dataset) / max(evaluation.seconds["total"], 1e-9)
        terminal.say(f"{terminal.duration(evaluation.seconds['total'])}, {rate:.1f} images a second")


def _show_thresholds(evaluation: Evaluation, calibration: Calibration | None) -> None:
    from rtdetr_cli.cli import terminal

    def said(point: Point) -> str:
        figures = (("precision", point.precision), ("recall", point.recall), ("F1", point.f1))
        return ", ".join(f"{name} {terminal.show(value)}" for name, value in figures)

    thresholds = calibration.thresholds if calibration else evaluation.thresholds
    if thresholds is None:
        best = evaluation.best
        if best.threshold is not None:
            terminal.out(f"one score for all classes, best F1: {best.threshold:.3f} gives {said(best)}\n")
        return
    overall, classes = evaluation.at_thresholds(thresholds)
    one = evaluation.at_one(thresholds.overall)
    where = "stored in the model now" if calibration else "stored in the model"
    terminal.table(
        ("class", "threshold", "precision", "recall", "F1"),
        [
            *(
                [name, p.threshold, p.precision, p.recall, p.f1]
                for name, p in zip(evaluation.dataset.names, classes, strict=True)
            ),
            ["all, each at its own", None, overall.precision, overall.recall, overall.f1],
            [f"all, at {one.threshold:.3f}", one.threshold, one.precision, one.recall, one.f1],
        ],
        title=f"Thresholds for {thresholds.target}, {where}",
    )
