"""`rtdetr export`: write a model in deployment formats and verify each file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import (
    DedupeOption,
    JsonFlag,
    LayersOption,
    QueriesOption,
    SamplingOption,
    SizeOption,
    TolApFlag,
)
from rtdetr_cli.cli.select import parse_size, resolve_model
from rtdetr_cli.config.settings import MAX_BATCH
from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.export.options import CALIBRATION_IMAGES, ExportOptions, choose_formats

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rtdetr_cli.export.artefacts import Artefact
    from rtdetr_cli.export.run import ExportEvent
    from rtdetr_cli.workflows.export import ExportPlan

TargetOption = Annotated[
    str | None,
    typer.Option(
        help="With --rtx: GPUs such as sm86 (RTX 30), sm89 (RTX 40), sm120 (RTX 50), comma-separated "
        "(default: this machine's GPU, or all without one)."
    ),
]
PreprocessFlag = Annotated[
    bool,
    typer.Option("--preprocess-in-graph", help="Accept uint8 images of any size; resize in the graph."),
]
Int8Flag = Annotated[
    bool,
    typer.Option("--int8", help="Also INT8, calibrated on train images: ONNX, or OpenVINO with --openvino."),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="Dataset (its train split) or folder of images to calibrate INT8 on (default: the run's)."),
]
CalibrationImagesOption = Annotated[int, typer.Option(min=1, help="Number of images to calibrate INT8 on.")]
KeepFloatOption = Annotated[
    str | None, typer.Option(help="Parts that INT8 leaves in float: backbone,encoder,decoder, or some of them.")
]
BundleOption = Annotated[
    Path | None,
    typer.Option(help="Folder for the ONNX file with a program, a Dockerfile and a README that need no torch."),
]


def export(
    model: Annotated[
        Path | None, typer.Argument(help="Weights or run folder (default: the newest run).", show_default=False)
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX float32 (the default format).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX float16; sensitive layers stay float32.")] = False,
    trt_fp16: Annotated[
        bool, typer.Option("--trt-fp16", help="TensorRT engine of the float16 graph, built on this machine.")
    ] = False,
    rtx: Annotated[
        bool, typer.Option("--rtx", help="Build the engine with TensorRT for RTX, which needs no GPU for that.")
    ] = False,
    target: TargetOption = None,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="OpenVINO .xml and .bin, weights compressed to float16.")
    ] = False,
    int8: Int8Flag = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Dynamic batch size.")] = False,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", "-b", min=1, max=MAX_BATCH, help="Batch size; with --dynamic, the largest of an engine."
        ),
    ] = 1,
    imgsz: SizeOption = None,
    opset: Annotated[int, typer.Option(help="ONNX opset: 18, or 17 for older runtimes.")] = 18,
    layers: LayersOption = None,
    queries: QueriesOption = None,
    sampling: SamplingOption = None,
    gridsample: Annotated[
        bool, typer.Option("--gridsample", help="Use the GridSample operator instead of gather.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No post-processing: output logits and boxes_cxcywh.")] = False,
    dedupe: DedupeOption = None,
    preprocess: PreprocessFlag = False,
    verify: Annotated[
        Path | None, typer.Option(help="Dataset or folder of images to verify on (default: the run's val split).")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to verify on: train, val or test.")] = "val",
    tol_ap: TolApFlag = None,
    calibration: CalibrationOption = None,
    calibration_images: CalibrationImagesOption = CALIBRATION_IMAGES,
    keep_float: KeepFloatOption = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Skip verification.")] = False,
    device: Annotated[str, typer.Option(help="Device for verification: auto, cpu, or a GPU such as 0.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder (default: export/ next to the model).")
    ] = None,
    bundle: BundleOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Export a model and verify that the exported file gives the same detections."""
    from rtdetr_cli.infer.duplicates import parse_dedupe

    gamma = parse_dedupe(dedupe)
    path = resolve_model(model)
    formats = choose_formats(onnx=onnx, fp16=fp16, trt_fp16=trt_fp16, openvino=openvino, rtx=rtx, int8=int8)
    parts = tuple(name.strip() for name in keep_float.split(",")) if keep_float else ()
    size = parse_size(imgsz) if imgsz else None
    options = ExportOptions(formats, size, batch, dynamic, opset, gridsample, raw, preprocess, float_parts=parts)
    from rtdetr_cli.workflows.export import plan_export

    plan = plan_export(
        path,
        options,
        target=target,
        verify=verify,
        split=split,
        no_gate=no_gate,
        calibration=calibration,
        device=device,
        out=out,
        bundle=bundle,
    )
    for note in plan.notes:
        terminal.say(note)
    events = plan.events(
        sampling=sampling,
        layers=layers,
        queries=queries,
        dedupe=gamma,
        tol_ap=tol_ap,
        calibration_images=calibration_images,
    )
    _run(plan, events, bundle, as_json=as_json)


def _run(plan: ExportPlan, events: Iterable[ExportEvent], bundle: Path | None, *, as_json: bool) -> None:
    """Export, show the progress, and print the result, then all errors; the first error gives the exit code."""
    from rtdetr_cli.workflows.export import gate_error

    artefacts, stopped = _render(events, plan.image_runs())
    if plan.images is None:
        terminal.warn("--no-gate: these files have not been verified")
    errors = [error for error in (gate_error(artefacts, plan.options.float_parts), stopped) if error is not None]
    document: dict[str, object] = {"artefacts": [a.to_json() for a in artefacts]}
    if stopped is not None:
        document["error"] = {name: getattr(stopped, name) for name in ("code", "message", "hint", "exit_code")}
    if bundle is not None and not errors:
        from rtdetr_cli.export.bundle import write_bundle

        used = write_bundle(bundle, artefacts, plan.images)
        terminal.say(f"wrote {bundle}: {used.path.name} and a program that runs it")
        document["bundle"] = str(bundle)
    if as_json:
        terminal.emit_json(document)
    else:
        _show(artefacts)
    for each in errors:  # printed rather than raised, since --json must not write a second document
        terminal.complain(each.message, each.hint)
    if errors:
        raise typer.Exit(errors[0].exit_code)
    if plan.images is not None and not as_json:
        _show_next(artefacts, plan)


def _render(events: Iterable[ExportEvent], runs: int | None) -> tuple[list[Artefact], RtdetrError | None]:
    """Show the progress of an export; return what was exported, and the error that stopped it after that."""
    from rtdetr_cli.export.artefacts import Artefact, Notice
    from rtdetr_cli.export.tensorrt import BuildProgress
    from rtdetr_cli.export.verify import ImageRun

    artefacts: list[Artefact] = []
    tenths: dict[str, int] = {}
    with terminal.progress(runs, "verify") as bar:
        try:
            for event in events:
                match event:
                    case Notice():
                        terminal.say(event.message)
                    case ImageRun():
                        bar.advance()
                    case Artefact():
                        artefacts.append(event)
                    case BuildProgress(phase, done, total):  # can take minutes: a line at every tenth
                        tenth = 10 * done // max(total, 1)
                        if tenth > tenths.get(phase, -1):
                            tenths[phase] = tenth
                            terminal.say(f"tensorrt  {phase} {done}/{total}")
        except RtdetrError as error:
            if not artefacts:
                raise
            return artefacts, error
    return artefacts, None


def _show(artefacts: Sequence[Artefact]) -> None:
    columns = ["file", "precision", "MB", "matched", "score error", "AP model", "AP export", "verification"]
    if any(a.latencies_ms for a in artefacts):
        columns.append("network ms")
    terminal.table(columns, [_row(a)[: len(columns)] for a in artefacts])
    for artefact in artefacts:
        for cost in artefact.costs:
            terminal.out(f"{artefact.path.name} {cost.summary}")
    for artefact in artefacts:  # outside the table, which a narrow terminal folds
        terminal.out(str(artefact.path))


def _show_next(artefacts: Sequence[Artefact], plan: ExportPlan) -> None:
    """Print how to verify what this machine could not run, else how to use the last file on one of the images."""
    from rtdetr_cli.datasets.records import image_paths

    export = artefacts[-1].path
    if artefacts[-1].pending:
        terminal.next_step("rtdetr", "verify", export, "--against", plan.model, "--write")
    elif plan.images is not None and not plan.options.raw:
        terminal.next_step("rtdetr", "predict", image_paths(plan.images)[0], "--weights", export)


def _row(artefact: Artefact) -> tuple[object, ...]:
    name, size = artefact.path.name, f"{artefact.bytes / 1e6:.1f}"
    latency = " -> ".join(f"{ms:.1f}" for ms in artefact.latencies_ms) or None
    if artefact.verdict is None:
        result = "pending" if artefact.pending else "skipped"
        return name, artefact.precision, size, None, None, None, None, result, latency
    agreement, ap = artefact.verdict.agreement.figures, artefact.verdict.ap.figures
    score_error = agreement.get("score_error")
    shown_error = None if score_error is None else f"{score_error:.1e}"
    result = "passed" if artefact.passed else "FAILED " + ", ".join(artefact.verdict.failed_parts)
    aps = ap.get("ap_model"), ap.get("ap_export")
    return name, artefact.precision, size, agreement.get("matched"), shown_error, *aps, result, latency
