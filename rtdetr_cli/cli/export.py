"""`rtdetr export`: write a model in deployment formats and verify each file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.terminal import JsonFlag
from rtdetr_cli.errors import DataError, GateError, RtdetrError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rtdetr_cli.datasets.records import Dataset
    from rtdetr_cli.export.artefacts import Artefact
    from rtdetr_cli.export.events import BuildProgress
    from rtdetr_cli.export.run import ExportEvent
    from rtdetr_cli.weights.header import ModelHeader

VERIFY_HINT = "--verify DATA or a folder of images; or --no-gate to skip verification"


def export(
    model: Annotated[
        Path | None, typer.Argument(help="Weights or run folder (default: the newest run).", show_default=False)
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX float32 (the default format).")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX float16; sensitive layers stay float32.")] = False,
    trt_fp16: Annotated[
        bool, typer.Option("--trt-fp16", help="TensorRT engine of the float16 graph, built on this machine.")
    ] = False,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="OpenVINO .xml and .bin, weights compressed to float16.")
    ] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Dynamic batch size.")] = False,
    batch: Annotated[
        int, typer.Option("--batch", "-b", min=1, help="Batch size; with --dynamic, the largest of an engine.")
    ] = 1,
    imgsz: Annotated[str | None, typer.Option(help="Input size: 640, or height first 480x640.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset: 18, or 17 for older runtimes.")] = 18,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of decoder layers to use.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Number of queries to use.")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="Sampling of a published file, which doesn't state it: bilinear or discrete.")
    ] = None,
    gridsample: Annotated[
        bool, typer.Option("--gridsample", help="Use the GridSample operator instead of gather.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No post-processing: output logits and boxes_cxcywh.")] = False,
    preprocess: Annotated[
        bool,
        typer.Option("--preprocess-in-graph", help="Accept uint8 images of any size; resize in the graph."),
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(help="Dataset or folder of images to verify on (default: the run's val split).")
    ] = None,
    tol_ap: Annotated[float, typer.Option(help="Maximum AP difference between model and export.")] = 0.002,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Skip verification.")] = False,
    device: Annotated[str, typer.Option(help="Device for verification: auto, cpu, or a GPU such as 0.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder (default: export/ beside the model).")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Export a model and verify that the exported file gives the same detections."""
    from rtdetr_cli.cli.select import parse_size, resolve_model
    from rtdetr_cli.weights.header import EXPORT_SUFFIXES

    size = parse_size(imgsz) if imgsz else None
    if no_gate and verify is not None:
        raise UsageError("--verify and --no-gate exclude each other")
    if not 0 <= tol_ap <= 1:
        raise UsageError(f"--tol-ap {tol_ap:g} is not a fraction from 0 to 1")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    path = resolve_model(model)
    if path.suffix.lower() in EXPORT_SUFFIXES:
        raise UsageError(
            f"{path} is already exported", hint="pass the weights that it was exported from: .safetensors or .pth"
        )

    from rtdetr_cli.export.graph import ExportOptions

    # TensorRT comes last: many machines lack it, and everything else should be finished by then.
    requested = {"onnx": onnx, "fp16": fp16 or trt_fp16, "openvino": openvino, "trt-fp16": trt_fp16}
    formats = tuple(name for name, wanted in requested.items() if wanted) or ("onnx",)
    options = ExportOptions(formats, size, batch, dynamic, opset, gridsample, raw, preprocess)
    options.check()

    from rtdetr_cli.export.run import count_image_runs, export_events
    from rtdetr_cli.infer.selection import threshold_mismatch
    from rtdetr_cli.infer.torch_backend import check_sampling
    from rtdetr_cli.weights.load import load_model

    check_sampling(path, sampling)
    loaded, header = load_model(path, sampling=sampling, layers=layers, queries=queries)
    other_setting = threshold_mismatch(header, size or header.imgsz)
    if other_setting is not None:
        terminal.warn(f"{other_setting[0]}; exported anyway")
    images = None if no_gate else _verification_images(verify, path, header)
    runs = None if images is None else count_image_runs(formats, images)
    folder = out or path.parent / "export"
    artefacts, error = _render(
        export_events(loaded, header, folder, options, images=images, stem=path.stem, tol_ap=tol_ap, device=device),
        runs,
    )
    if no_gate:
        terminal.warn("--no-gate: these files have not been verified")
    _report(artefacts, error, as_json=as_json)


def _render(events: Iterable[ExportEvent], runs: int | None) -> tuple[list[Artefact], RtdetrError | None]:
    """Show the progress of an export; return what was exported, and the error that stopped it after that."""
    from rtdetr_cli.export.artefacts import Artefact
    from rtdetr_cli.export.events import ImageRun, Notice

    artefacts: list[Artefact] = []
    show_build = _build_progress()
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
                    case _:
                        show_build(event)
        except RtdetrError as error:
            if not artefacts:
                raise
            return artefacts, error
    return artefacts, None


def _build_progress() -> Callable[[BuildProgress], None]:
    """Return a function that prints a line at every tenth of each TensorRT build phase, which can take minutes."""
    tenths: dict[str, int] = {}

    def show(step: BuildProgress) -> None:
        tenth = 10 * step.done // max(step.total, 1)
        if tenth > tenths.get(step.phase, -1):
            tenths[step.phase] = tenth
            terminal.say(f"tensorrt  {step.phase} {step.done}/{step.total}")

    return show


def _verification_images(verify: Path | None, model: Path, header: ModelHeader) -> Dataset | Sequence[Path]:
    """Return the images to verify on: a split with labels, or images without."""
    from rtdetr_cli.evaluate.source import choose_split

    try:
        chosen = choose_split(verify, model=model, header=header)
    except UsageError as error:
        if error.code != "data-missing":
            raise
        raise UsageError(
            f"there are no images to verify on: {model.name} does not record what it was trained on",
            hint=VERIFY_HINT,
            code="no-images",
        ) from None
    except DataError as error:
        if verify is None:
            raise DataError(error.message, hint=VERIFY_HINT, code=error.code) from None
        if error.code == "empty-split":
            raise _nothing_to_verify_on(error.message) from None
        if error.code != "format-unknown" or not verify.is_dir():
            raise
        images = _images_in(verify)
        terminal.say(f"verify {verify}: {len(images)} images without labels, so AP is not compared")
        return images
    for note in chosen.notes:
        terminal.say(note)
    return chosen.dataset


def _images_in(folder: Path) -> list[Path]:
    """Return the images in a folder without labels."""
    from rtdetr_cli.infer.sources import find_sources

    try:
        sources = find_sources([str(folder)])
    except DataError:
        raise _nothing_to_verify_on(f"the folder {folder} has no images") from None
    images = [source.path for source in sources if not source.video]
    if not images:
        raise _nothing_to_verify_on(f"the folder {folder} has {len(sources)} videos and no images")
    return images


def _nothing_to_verify_on(reason: str) -> UsageError:
    return UsageError(f"there are no images to verify on: {reason}", hint=VERIFY_HINT, code="no-images")


def _report(artefacts: Sequence[Artefact], error: RtdetrError | None, *, as_json: bool) -> None:
    """Print what was exported, then all errors; the first error gives the exit code."""
    errors = [] if error is None else [error]
    failed = [f"{a.path.name}: {a.verdict.summary}" for a in artefacts if a.verdict and not a.passed]
    if failed:
        hint = "parity.json has all figures; --tol-ap allows a larger AP difference, --no-gate skips verification"
        errors.insert(0, GateError(f"verification failed: {'; '.join(failed)}", hint=hint, code="parity"))
    if as_json:
        document: dict[str, object] = {"artefacts": [a.to_json() for a in artefacts]}
        if error is not None:
            document["error"] = {
                "code": error.code,
                "message": error.message,
                "hint": error.hint,
                "exit_code": error.exit_code,
            }
        terminal.emit_json(document)
    else:
        columns = ("file", "precision", "MB", "matched", "score error", "AP model", "AP export", "verification")
        terminal.table(columns, [_row(a) for a in artefacts])
        for artefact in artefacts:  # outside the table, which a narrow terminal folds
            terminal.out(str(artefact.path))
    if errors:
        # Printed rather than raised, since --json must not write a second document.
        for each in errors:
            terminal.complain(each.message, each.hint)
        raise typer.Exit(errors[0].exit_code)


def _row(artefact: Artefact) -> tuple[object, ...]:
    size = f"{artefact.bytes / 1e6:.1f}"
    if artefact.verdict is None:
        return (artefact.path.name, artefact.precision, size, None, None, None, None, "skipped")
    agreement, ap = artefact.verdict.agreement.figures, artefact.verdict.ap.figures
    score_error = agreement.get("score_error")
    return (
        artefact.path.name,
        artefact.precision,
        size,
        agreement.get("matched"),
        None if score_error is None else f"{score_error:.1e}",
        ap.get("ap_model"),
        ap.get("ap_export"),
        "passed" if artefact.passed else "FAILED " + ", ".join(artefact.verdict.failed_parts),
    )
