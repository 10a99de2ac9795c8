"""`rtdetr export`: files for deployment, each shown to detect what the model detects before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_cli.errors import DataError, GateError, RtdetrError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rtdetr_cli.datasets.records import Dataset
    from rtdetr_cli.export.run import Artefact
    from rtdetr_cli.weights.header import ModelHeader


def export(
    model: Annotated[
        Path | None, typer.Argument(help="Weights or run folder; the newest run when left out.", show_default=False)
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX, float32; what is made when no format is named.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="ONNX typed float16, the parts that need it float32.")] = False,
    trt_fp16: Annotated[
        bool, typer.Option("--trt-fp16", help="TensorRT engine of the float16 graph, built and checked here.")
    ] = False,
    openvino: Annotated[
        bool, typer.Option("--openvino", help="OpenVINO .xml and .bin, float16-compressed weights.")
    ] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Leave the batch open.")] = False,
    batch: Annotated[
        int, typer.Option("--batch", "-b", min=1, help="Fixed batch; with --dynamic the largest of an engine.")
    ] = 1,
    imgsz: Annotated[str | None, typer.Option(help="Input size, 640 or 480x640 (height first).")] = None,
    opset: Annotated[int, typer.Option(help="18, or 17 for older runtimes.")] = 18,
    layers: Annotated[int | None, typer.Option(min=1, help="Use only this many decoder layers.")] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Use only this many queries.")] = None,
    sampling: Annotated[
        str | None, typer.Option(help="bilinear or discrete, for a published file, which cannot say.")
    ] = None,
    gridsample: Annotated[
        bool, typer.Option("--gridsample", help="The GridSample operator in place of the gather.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="No post-processing: logits and boxes_cxcywh.")] = False,
    preprocess: Annotated[
        bool, typer.Option("--preprocess-in-graph", help="Take uint8 images of any size and resize in the graph.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option(help="Dataset or folder of images for the gate; the run's own val split when left out."),
    ] = None,
    tol_ap: Annotated[float, typer.Option(help="Largest difference of AP between model and export.")] = 0.002,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Do not hold the export against the model.")] = False,
    device: Annotated[str, typer.Option(help="Where the gate runs: auto, cpu, or a GPU: 0.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; export/ in the run, or beside the model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Deploy a model; a file that does not detect what the model detects is not called done."""
    from rtdetr_cli.cli import terminal
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
            f"{path} is an export already", hint="name the weights that it was made of: .safetensors or .pth"
        )

    from rtdetr_cli.export.graph import ExportOptions
    from rtdetr_cli.export.run import export_model, gate_rounds

    # TensorRT last: many machines lack it, and what can be made without it is made first.
    wanted = {"onnx": onnx, "fp16": fp16 or trt_fp16, "openvino": openvino, "trt-fp16": trt_fp16}
    formats = tuple(name for name, asked in wanted.items() if asked) or ("onnx",)
    options = ExportOptions(formats, size, batch, dynamic, opset, gridsample, raw, preprocess)
    options.check()

    from rtdetr_cli.infer.selection import used_elsewhere
    from rtdetr_cli.infer.torch_backend import refuse_other_sampling
    from rtdetr_cli.weights.load import load_model

    refuse_other_sampling(path, sampling)
    loaded, header = load_model(path, sampling=sampling, layers=layers, queries=queries)
    elsewhere = used_elsewhere(header, size or header.imgsz)
    if elsewhere is not None:
        terminal.warn(f"{elsewhere[0]}: the files carry them all the same")
    images = None if no_gate else _images(verify, path, header)
    folder = out or (path.parent / "export")
    rounds = 0 if images is None else gate_rounds(options.formats) * min(len(images), 200)
    artefacts: list[Artefact] = []
    stopped: RtdetrError | None = None
    with terminal.progress(rounds or None, "gate") as bar:
        try:
            export_model(
                loaded,
                header,
                folder,
                options,
                images=images,
                stem=path.stem,
                tol_ap=tol_ap,
                tell=terminal.say,
                progress=bar.advance,
                build_progress=_tell_tenths(terminal.say),
                device=device,
                finished=artefacts.append,
            )
        except RtdetrError as error:
            if not artefacts:
                raise
            stopped = error  # what was made before is told first
    if no_gate:
        terminal.warn("--no-gate: nobody has looked whether these files detect what the model detects")
    _report(artefacts, as_json, stopped)


def _tell_tenths(say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """Return what tells of a build by TensorRT, which takes minutes: a line at each tenth of each phase."""
    told: dict[str, int] = {}

    def tell(phase: str, done: int, steps: int) -> None:
        tenth = 10 * done // max(steps, 1)
        if tenth > told.get(phase, -1):
            told[phase] = tenth
            say(f"tensorrt  {phase} {done}/{steps}")

    return tell


def _images(verify: Path | None, model: Path, header: ModelHeader) -> Dataset | Sequence[Path]:
    """Return what the gate looks at: a split with labels, or images without."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.evaluate.source import choose_split

    try:
        chosen = choose_split(verify, model=model, header=header)
    except UsageError as error:
        if error.code != "data-missing":
            raise
        raise UsageError(
            f"there are no images to hold the export against: {model.name} does not say what it was trained on",
            hint="--verify DATA or a folder of images; or --no-gate to go without",
            code="no-images",
        ) from None
    except DataError as error:
        if verify is None:
            raise DataError(
                error.message,
                hint="--verify DATA or a folder of images; or --no-gate to go without",
                code=error.code,
            ) from None
        if error.code == "empty-split":
            raise _nothing_to_verify(error.message) from None
        if error.code != "format-unknown" or not verify.is_dir():
            raise
        found = _images_in(verify)
        terminal.say(f"verify {verify}: {len(found)} images without labels, so no AP")
        return found
    for note in chosen.notes:
        terminal.say(note)
    return chosen.dataset


def _images_in(folder: Path) -> list[Path]:
    """Return the images in a folder without labels."""
    from rtdetr_cli.infer.sources import find_sources

    try:
        sources = find_sources([str(folder)])
    except DataError:
        raise _nothing_to_verify(f"the folder {folder} holds no images") from None
    found = [source.path for source in sources if not source.video]
    if not found:
        raise _nothing_to_verify(f"the folder {folder} holds {len(sources)} videos and no images")
    return found


def _nothing_to_verify(message: str) -> UsageError:
    return UsageError(
        f"{message}, so there is nothing to hold the export against",
        hint="--verify DATA or a folder of images; or --no-gate to go without",
        code="no-images",
    )


def _report(artefacts: Sequence[Artefact], as_json: bool, stopped: RtdetrError | None = None) -> None:
    """Tell what was made, then what did not pass and what stopped the rest: the first of these gives the exit code."""
    from rtdetr_cli.cli import terminal

    failed = [a for a in artefacts if not a.passed]
    faults: list[RtdetrError] = [] if stopped is None else [stopped]
    if failed:
        told = "; ".join(f"{a.path.name}: {a.verdict.summary}" for a in failed if a.verdict is not None)
        message = f"the export does not detect what the model detects: {told}"
        hint = "the figures are in parity.json; --tol-ap allows more AP to be lost, --no-gate skips the check"
        faults.insert(0, GateError(message, hint=hint, code="parity"))
    if as_json:
        document: dict[str, object] = {"artefacts": [a.to_json() for a in artefacts]}
        if stopped is not None:
            document["error"] = {
                "code": stopped.code,
                "message": stopped.message,
                "hint": stopped.hint,
                "exit_code": stopped.exit_code,
            }
        terminal.emit_json(document)
    else:
        terminal.table(
            ("file", "precision", "MB", "matched", "score error", "AP model", "AP export", "gate"),
            [_row(a) for a in artefacts],
        )
        # Outside the table, which a narrow terminal folds: a path must stay whole to be copied.
        for artefact in artefacts:
            terminal.out(str(artefact.path))
    if not faults:
        return
    # Said here and not raised: with --json the document is out, and a second one would break who reads one line.
    for fault in faults:
        terminal.complain(fault.message, fault.hint)
    raise typer.Exit(faults[0].exit_code)


def _row(artefact: Artefact) -> tuple[object, ...]:
    from rtdetr_cli.export.run import size_of

    size = size_of(artefact.path) / 1e6
    if artefact.verdict is None:
        return (artefact.path.name, artefact.precision, f"{size:.1f}", None, None, None, None, "not run")
    agreement, ap = artefact.verdict.agreement.figures, artefact.verdict.ap.figures
    return (
        artefact.path.name,
        artefact.precision,
        f"{size:.1f}",
        agreement.get("matched"),
        _small(agreement.get("score_error")),
        ap.get("ap_model"),
        ap.get("ap_export"),
        "passed" if artefact.passed else "FAILED " + ", ".join(artefact.verdict.failed_parts),
    )


def _small(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"
