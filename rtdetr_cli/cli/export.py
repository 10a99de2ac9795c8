"""`rtdetr export`: write a model in deployment formats and verify each file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from rtdetr_cli.errors import GateError, RtdetrError, UsageError
from rtdetr_cli.export.options import CALIBRATION_IMAGES, ExportOptions, choose_formats

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rtdetr_cli.datasets.records import Dataset
    from rtdetr_cli.export.artefacts import Artefact
    from rtdetr_cli.export.run import ExportEvent

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
        int, typer.Option("--batch", "-b", min=1, help="Batch size; with --dynamic, the largest of an engine.")
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
    from rtdetr_cli.cli.select import parse_size
    from rtdetr_cli.infer.duplicates import parse_dedupe
    from rtdetr_cli.infer.packages import has_package

    size = parse_size(imgsz) if imgsz else None
    if no_gate and verify is not None:
        raise UsageError("--verify and --no-gate cannot be combined")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    gamma = parse_dedupe(dedupe)
    path = _unexported(model)
    formats = choose_formats(onnx=onnx, fp16=fp16, trt_fp16=trt_fp16, openvino=openvino, rtx=rtx, int8=int8)
    parts = tuple(name.strip() for name in keep_float.split(",")) if keep_float else ()
    options = ExportOptions(formats, size, batch, dynamic, opset, gridsample, raw, preprocess, float_parts=parts)
    options.check()
    if "trt-fp16" in formats and not has_package("tensorrt"):
        terminal.warn(
            "TensorRT is not installed: no engine is built here; --rtx builds one for GeForce RTX on any machine"
        )
    options = _with_targets(options, target, device)
    if bundle is not None:
        from rtdetr_cli.export.bundle import check_bundle

        check_bundle(bundle, options)
    images = None if no_gate else _verification_images(verify, path, split)
    _run(
        path,
        options,
        {"sampling": sampling, "layers": layers, "queries": queries},
        dedupe=gamma,
        images=images,
        folder=out or path.parent / "export",
        tol_ap=tol_ap,
        device=device,
        calibration=_calibration_images(options, calibration, verify, path, images),
        calibration_images=calibration_images,
        bundle=bundle,
        as_json=as_json,
    )


def _unexported(model: Path | None) -> Path:
    from rtdetr_cli.cli.select import resolve_model
    from rtdetr_cli.weights.header import EXPORT_SUFFIXES

    path = resolve_model(model)
    if path.suffix.lower() in EXPORT_SUFFIXES:
        raise UsageError(
            f"{path} is already exported", hint="pass the weights that it was exported from: .safetensors or .pth"
        )
    return path


def _with_targets(options: ExportOptions, target: str | None, device: str) -> ExportOptions:
    """Return the options with the GPUs that an engine of TensorRT for RTX is built for."""
    if "rtx-fp16" not in options.formats:
        if target is not None:
            raise UsageError("--target is for engines of TensorRT for RTX: add --rtx")
        return options
    from rtdetr_cli.export.tensorrt import rtx_targets

    return replace(options, targets=rtx_targets(target, device))


def _run(
    path: Path,
    options: ExportOptions,
    setting: dict[str, Any],
    *,
    dedupe: float | None,
    images: Dataset | Sequence[Path] | None,
    folder: Path,
    device: str,
    bundle: Path | None,
    as_json: bool,
    **details: Any,
) -> None:
    """Export, show the progress and print the result.

    `setting` is the sampling, layers and queries of the model; `details` are passed to `export_events`.
    """
    from rtdetr_cli.export import tensorrt
    from rtdetr_cli.export.run import count_image_runs, export_events
    from rtdetr_cli.infer.selection import threshold_mismatch
    from rtdetr_cli.infer.torch_backend import check_sampling
    from rtdetr_cli.weights.load import load_model

    check_sampling(path, setting["sampling"])
    loaded, header = load_model(path, **setting)
    header = header.with_dedupe(dedupe)
    other_setting = threshold_mismatch(header, options.imgsz or header.imgsz)
    if other_setting is not None:
        terminal.warn(f"{other_setting[0]}; exported anyway")
    events = export_events(loaded, header, folder, options, images=images, stem=path.stem, device=device, **details)
    runs = None
    if images is not None:
        formats = [f for f in options.formats if f != "rtx-fp16" or tensorrt.runs_here(options.targets, device)]
        runs = count_image_runs(formats, images)
    artefacts, error = _render(events, runs)
    if images is None:
        terminal.warn("--no-gate: these files have not been verified")
    if bundle is not None and error is None and all(artefact.passed for artefact in artefacts):
        from rtdetr_cli.export.bundle import write_bundle

        used = write_bundle(bundle, artefacts, images)
        terminal.say(f"wrote {bundle}: {used.path.name} and a program that runs it")
    else:
        bundle = None
    _report(artefacts, error, keep_float=options.float_parts, bundle=bundle, as_json=as_json)
    if images is not None and not as_json:
        _show_next(artefacts, path, None if options.raw else images)


def _verification_images(verify: Path | None, model: Path, split: str) -> Dataset | Sequence[Path]:
    from rtdetr_cli.export.images import verification_images
    from rtdetr_cli.weights.header import read_header

    header = read_header(model) if model.suffix == ".safetensors" else None
    images, notes = verification_images(verify, model, header, split=split)
    for note in notes:
        terminal.say(note)
    return images


def _calibration_images(
    options: ExportOptions,
    calibration: Path | None,
    verify: Path | None,
    model: Path,
    verified: Dataset | Sequence[Path] | None,
) -> list[Path]:
    if not options.int8:
        if calibration is not None:
            raise UsageError("--calibration has no effect without --int8")
        return []
    from rtdetr_cli.export.images import calibration_images
    from rtdetr_cli.weights.header import read_header

    header = read_header(model) if model.suffix == ".safetensors" else None
    images, notes = calibration_images(calibration, verify, model, header, verified)
    for note in notes:
        terminal.say(f"calibration: {note}")
    return images


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


def _report(
    artefacts: Sequence[Artefact],
    error: RtdetrError | None,
    *,
    keep_float: Sequence[str],
    bundle: Path | None,
    as_json: bool,
) -> None:
    """Print what was exported, then all errors; the first error gives the exit code."""
    errors = [] if error is None else [error]
    failed = [f"{a.path.name}: {a.verdict.summary}" for a in artefacts if a.verdict and not a.passed]
    if failed:
        hint = "parity.json has all figures; --tol-ap allows a larger AP difference, --no-gate skips verification"
        best = next((a.costs[0] for a in artefacts if a.costs), None)
        if best is not None:
            kept = ",".join([*keep_float, best.part])
            hint = f"the {best.part} costs most in INT8: --keep-float {kept}; {hint}"
        errors.insert(0, GateError(f"verification failed: {'; '.join(failed)}", hint=hint, code="parity"))
    if as_json:
        document: dict[str, object] = {"artefacts": [a.to_json() for a in artefacts]}
        if bundle is not None:
            document["bundle"] = str(bundle)
        if error is not None:
            document["error"] = {name: getattr(error, name) for name in ("code", "message", "hint", "exit_code")}
        terminal.emit_json(document)
    else:
        columns = ["file", "precision", "MB", "matched", "score error", "AP model", "AP export", "verification"]
        if any(a.latencies_ms for a in artefacts):
            columns.append("network ms")
        terminal.table(columns, [_row(a)[: len(columns)] for a in artefacts])
        for artefact in artefacts:
            for cost in artefact.costs:
                terminal.out(f"{artefact.path.name} {cost.summary}")
        for artefact in artefacts:  # outside the table, which a narrow terminal folds
            terminal.out(str(artefact.path))
    for each in errors:  # printed rather than raised, since --json must not write a second document
        terminal.complain(each.message, each.hint)
    if errors:
        raise typer.Exit(errors[0].exit_code)


def _show_next(artefacts: Sequence[Artefact], model: Path, images: Dataset | Sequence[Path] | None) -> None:
    """Print how to verify what this machine could not run, else how to use the last file on one of the images."""
    from rtdetr_cli.datasets.records import Dataset

    export = artefacts[-1].path
    if artefacts[-1].pending:
        terminal.next_step("rtdetr", "verify", export, "--against", model, "--write")
    elif images is not None:
        image = images.path(0) if isinstance(images, Dataset) else images[0]
        terminal.next_step("rtdetr", "predict", image, "--weights", export)


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
