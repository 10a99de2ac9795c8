"""`rtdetr benchmark`: latency and accuracy side by side, in every runtime or at every setting of the dial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.errors import RtdetrError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.datasets.records import Dataset
    from rtdetr_cli.workflows.benchmark import Row

NEXT_TO_NOTHING = 0.01  # AP that most would give for speed


def benchmark(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MODEL]...", help="Models; the newest run when left out.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset for AP; the model's own when left out.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, when it cannot be guessed.")] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    backends: Annotated[
        str | None, typer.Option(help="torch,onnx,openvino,tensorrt, or some; all that are installed when left out.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="layers,queries,imgsz, or some: measure fewer of each. With values: layers=1/3."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, or a GPU: 0.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images at once.")] = 1,
    warmup: Annotated[int, typer.Option(min=0, help="Runs thrown away.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 50,
    out: Annotated[
        Path | None, typer.Option(help="Folder for table, JSON and plot; the run's benchmark/ when sweeping.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Measure latency (median and 90th percentile, in three parts) and AP."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.select import BEST, model_file, resolve_model
    from rtdetr_cli.workflows import benchmark as workflow

    wanted = workflow.parse_sweep(sweep) if sweep is not None else None
    # A sweep multiplies: one runtime unless more are named.
    named, skipped = workflow.choose_backends("torch" if wanted is not None and backends is None else backends)
    for skip in skipped:
        terminal.say(f"without {skip.backend}: {skip.reason}")
    files = [model_file(m) for m in models] if models else [resolve_model(None)]
    plan = workflow.plan(
        files, backends=named, sweep=wanted, batch=batch, warmup=warmup, runs=runs, device=device, threads=threads
    )
    if wanted is not None and out is None:
        first = files[0]
        out = (first.parent if first.name == BEST else Path()) / "benchmark"
    dataset = _split(files, data, images, split)

    points = plan.points()
    rows: list[Row] = []
    with terminal.progress(len(points), "benchmark") as bar:
        for row in workflow.benchmark(plan, dataset, tell=terminal.say):
            rows.append(row)
            bar.advance(1, ms=row.times["total"].median, AP=row.ap)
    rows = workflow.mark_front(rows)
    document: dict[str, Any] = {
        "rows": [row.to_json() for row in rows],
        "front": [index for index, row in enumerate(rows) if row.front],
        "batch": batch,
        "warmup": warmup,
        "runs": runs,
        "threads": threads,
        "pictures": None if dataset is None else len(dataset),
        "environment": workflow.environment(),
    }
    if out is not None:
        try:
            saved = workflow.write_files(out, rows, {"schema_version": terminal.SCHEMA_VERSION, **document})
        except OSError as error:
            raise RtdetrError(f"{out} cannot be written: {error.strerror or error}", code="not-writable") from error
        document["saved"] = {name: str(path) for name, path in saved.items()}
    if as_json:
        terminal.emit_json(document)
        return
    machine = document["environment"]
    columns, cells, same = workflow.narrowed(*workflow.table_rows(rows))
    terminal.out(
        f"{machine['processor']}, {threads or machine['cores']} threads, batch {batch}, "
        f"median / 90th percentile of {runs} runs after {warmup}"
    )
    if same:
        terminal.out(f"all rows: {same}")
    terminal.table(columns, cells)
    if any(row.front for row in rows):
        terminal.out("* nothing is both quicker and better; differences are to the first row, on the same images")
    if wanted is not None:
        _advise(rows)
    for path in document.get("saved", {}).values():
        terminal.say(f"wrote {path}")


def _split(files: list[Path], data: Path | None, images: Path | None, split: str) -> Dataset | None:
    """Return the split for AP; without --data the first model's own, or none, which is said."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.source import choose_split
    from rtdetr_cli.weights.header import read_header

    first = files[0]
    header = read_header(first) if first.suffix == ".safetensors" else None
    try:
        chosen = choose_split(data, split=split, images=images, model=first, header=header)
    except UsageError as error:
        if error.code != "data-missing":
            raise
        terminal.warn("no dataset is named, so latency is measured on a made image of 640x480 and AP not at all")
        return None
    for note in chosen.notes:
        terminal.say(note)
    return chosen.dataset


def _advise(rows: list[Row]) -> None:
    """Say which point of a sweep is much quicker for next to nothing, and how to take it."""
    from rtdetr_cli.cli import terminal

    base = rows[0]
    if not base.ap:
        return
    quicker = [
        row
        for row in rows[1:]
        if (row.model, row.backend) == (base.model, base.backend)
        and row.difference is not None
        and row.difference.value >= -NEXT_TO_NOTHING
        and row.times["total"].median < 0.97 * base.times["total"].median
    ]
    if not quicker:
        return
    best = min(quicker, key=lambda row: row.times["total"].median)
    assert best.difference is not None
    share = 1 - best.times["total"].median / base.times["total"].median
    height, width = best.imgsz
    size = str(height) if height == width else f"{height}x{width}"
    gap = best.difference
    terminal.out(
        f"{share:.0%} quicker for {gap.value:+.3f} AP (95 %: {gap.lower:+.3f} to {gap.upper:+.3f}): "
        f"--layers {best.layers} --queries {best.queries} --imgsz {size} at eval, predict and export"
    )
