"""`rtdetr benchmark`: latency and AP side by side, per backend or per setting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import DeviceOption, JsonFlag, ThreadsOption
from rtdetr_cli.cli.select import model_file, model_name, resolve_model
from rtdetr_cli.config.settings import MAX_BATCH
from rtdetr_cli.errors import RtdetrError, UsageError
from rtdetr_cli.files import ensure_writable
from rtdetr_cli.runs import BEST
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, own_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rtdetr_cli.datasets.records import Dataset
    from rtdetr_cli.workflows.benchmark import BenchmarkPlan, Failure
    from rtdetr_cli.workflows.benchmark_report import Row

SMALL_AP_LOSS = 0.01  # most users accept it for a faster model
EXPORT_FLAGS = {"onnx": "--onnx", "openvino": "--openvino", "tensorrt": "--trt-fp16"}


def benchmark(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MODEL]...", help="Models (default: the newest run).", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset for AP (default: the model's own).")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder, if it is not found automatically.")] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate: train, val or test.")] = "val",
    backends: Annotated[
        str | None,
        typer.Option(
            help="Backends: torch,onnx,onnx-int8,openvino,openvino-int8,tensorrt, or some (default: all installed)."
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Measure smaller settings: layers,queries,imgsz, or some of them, or values: layers=1/3."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, max=MAX_BATCH, help="Images per run.")] = 1,
    warmup: Annotated[int, typer.Option(min=0, max=100_000, help="Warmup runs, which are not counted.")] = 10,
    runs: Annotated[int, typer.Option(min=1, max=100_000, help="Timed runs.")] = 50,
    out: Annotated[
        Path | None, typer.Option(help="Folder for table, JSON and plot (with --sweep: benchmark/ in the run).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure latency (median and 90th percentile, in three parts) and AP."""
    from rtdetr_cli.weights.binding import modification_warning
    from rtdetr_cli.workflows import benchmark as workflow
    from rtdetr_cli.workflows import benchmark_report as report
    from rtdetr_cli.workflows.sweep import parse_sweep

    swept = parse_sweep(sweep) if sweep is not None else None
    names = workflow.parse_backends(backends) if backends is not None else None
    files = [model_file(m) for m in models] if models else [resolve_model(None)]
    plan = workflow.plan_benchmark(
        files, backends=names, sweep=swept, batch=batch, warmup=warmup, runs=runs, device=device, threads=threads
    )
    for file in files:
        if warning := modification_warning(file):
            terminal.warn(warning)
    if swept is not None and out is None:
        out = (files[0].parent if files[0].name == BEST else Path()) / "benchmark"
    dataset = _split(files[0], data, images, split)
    plan, calibration = _calibration(plan, files[0], data, dataset, requested=names is not None)
    for name, reason in plan.skipped.items():
        terminal.say(f"skipping {name}: {reason}")
    if out is not None:
        ensure_writable(out)

    rows, failures = _measure(plan, dataset, calibration)
    if not rows:
        raise failures[0].error
    rows = report.mark_front(rows)
    document: dict[str, Any] = {
        "rows": [row.to_json() for row in rows],
        "front": [index for index, row in enumerate(rows) if row.front],
        "batch": batch,
        "warmup": warmup,
        "runs": runs,
        "threads": threads,
        "pictures": None if dataset is None else len(dataset),
        "environment": workflow.environment(),
        "failed": [failure.to_json() for failure in failures],
    }
    if out is not None:
        saved = report.write_files(out, rows, {"schema_version": terminal.SCHEMA_VERSION, **document})
        document["saved"] = {name: str(path) for name, path in saved.items()}
    if as_json:
        terminal.emit_json(document)
    else:
        _show(rows, document)
        if not failures:
            _show_next(rows, dataset, swept=swept is not None)
    for failure in failures:
        terminal.complain(f"{failure.point.backend}: {failure.error.message}", failure.error.hint)
    if failures:
        raise typer.Exit(failures[0].error.exit_code)


def _measure(
    plan: BenchmarkPlan, dataset: Dataset | None, calibration: Sequence[Path]
) -> tuple[list[Row], list[Failure]]:
    """Measure every point, and print each as soon as it is known."""
    from rtdetr_cli.workflows.benchmark import Failure, benchmark

    rows: list[Row] = []
    failures: list[Failure] = []
    with terminal.progress(len(plan.points), "benchmark") as bar:
        for result in benchmark(plan, dataset, calibration=calibration, notify=terminal.say):
            if isinstance(result, Failure):
                failures.append(result)
                terminal.warn(f"{result.point.backend} failed: {result.error.message}")
                bar.advance(1)
            else:
                rows.append(result)
                terminal.say(result.summary)
                bar.advance(1, ms=result.latency, AP=result.ap)
    return rows, failures


def _calibration(
    plan: BenchmarkPlan, model: Path, data: Path | None, dataset: Dataset | None, *, requested: bool
) -> tuple[BenchmarkPlan, Sequence[Path]]:
    """Return the images to calibrate INT8 on; where there are none, a plan without INT8 if it was not requested."""
    from rtdetr_cli.export.images import calibration_images

    if not plan.int8:
        return plan, ()
    try:
        return plan, calibration_images(None, data, model, own_header(model), dataset)[0]
    except RtdetrError as error:
        if requested:
            raise
        return plan.without_int8(error.message), ()


def _show(rows: list[Row], document: dict[str, Any]) -> None:
    from rtdetr_cli.workflows.benchmark_report import drop_constant_columns, table_rows

    machine = document["environment"]
    table, constants = drop_constant_columns(table_rows(rows))
    terminal.out(
        f"{machine['processor']}, {counted(document['threads'] or machine['cores'], 'thread')}, "
        f"batch {document['batch']}, median / 90th percentile of {counted(document['runs'], 'run')} "
        f"after {counted(document['warmup'], 'warmup run')}"
    )
    if constants:
        terminal.out(f"all rows: {constants}")
    terminal.table(list(table[0]), [list(row.values()) for row in table])
    if document["front"]:
        terminal.out(
            "* no other row is both faster and more accurate; AP is compared with the first row on the same images"
        )
    if any(row.times["total"].unstable for row in rows):
        terminal.out(
            "~ unstable in both of two measurements: the runs differ by more than 20%; close other programs, or use "
            "more --runs"
        )
    for path in document.get("saved", {}).values():
        terminal.say(f"wrote {path}")


def _split(model: Path, data: Path | None, images: Path | None, split: str) -> Dataset | None:
    """Return the split for AP; without --data the model's own, or None where it records none."""
    from rtdetr_cli.evaluate.source import choose_split

    try:
        chosen = choose_split(data, split=split, images=images, model=model, header=own_header(model))
    except UsageError as error:
        if error.code != "data-missing":
            raise
        terminal.warn("no dataset (--data): latency is measured on a synthetic 480x640 image, AP is not measured")
        return None
    for note in chosen.notes:
        terminal.say(note)
    return chosen.dataset


def _show_next(rows: list[Row], dataset: Dataset | None, *, swept: bool) -> None:
    """Print the command that uses the fastest row with little loss of AP; for a sweep, also what its settings gain."""
    base, top = rows[0], max(row.ap or 0.0 for row in rows)
    best = min((row for row in rows if (row.ap or 0.0) >= top - SMALL_AP_LOSS), key=lambda row: row.latency)
    if swept and not top:
        best = base  # without AP, the smallest setting would always win
    settings: list[object] = []
    if swept and (gap := best.difference) is not None and best.latency < 0.97 * base.latency:
        settings = ["--layers", best.layers, "--queries", best.queries, "--imgsz", best.size]
        terminal.out(
            f"{1 - best.latency / base.latency:.0%} faster for {gap.value:+.3f} AP (95% interval {gap.lower:+.3f} to "
            f"{gap.upper:+.3f}): {' '.join(map(str, settings))} with eval, predict or export"
        )
    model = Path(best.model)
    flags = [EXPORT_FLAGS[best.backend]] if best.backend in EXPORT_FLAGS else []
    flags += ["--int8"] if best.precision == "int8" else []
    if model.suffix.lower() not in EXPORT_SUFFIXES and (swept or flags):
        terminal.next_step("rtdetr", "export", model_name(model), *flags, *settings)
    elif dataset is not None:
        terminal.next_step("rtdetr", "predict", dataset.path(0), "--weights", model_name(model))
