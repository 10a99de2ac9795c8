"""`rtdetr verify`: check that an existing file gives the same detections as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import DeviceOption, JsonFlag, TolApFlag
from rtdetr_cli.cli.select import model_file
from rtdetr_cli.errors import GateError, UsageError
from rtdetr_cli.text import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rtdetr_cli.datasets.records import Dataset
    from rtdetr_cli.export.check_file import FileCheck
    from rtdetr_cli.export.verify import Verdict
    from rtdetr_cli.weights.header import ModelHeader


def verify(
    file: Annotated[Path, typer.Argument(help="Model file to verify: any format, from any tool.")],
    against: Annotated[Path, typer.Option(help="Model that it must agree with: weights, a run folder or an export.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Dataset or folder of images (default: the data that MODEL was trained on)."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to verify on: train, val or test.")] = "val",
    tol_ap: TolApFlag = None,
    write: Annotated[bool, typer.Option("--write", help="Record the verdict in the header of FILE.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Check that a file gives the same detections as a model; exit with code 6 where it does not."""
    path, model = model_file(file), model_file(against)
    if path.resolve() == model.resolve():
        raise UsageError(f"{path} cannot be verified against itself")

    from rtdetr_cli.export.check_file import open_pair, record, verify_pair
    from rtdetr_cli.export.verify import Reference, result_of

    pair = open_pair(path, model, device=device, write=write)
    if pair.foreign:
        terminal.say(f"{path.name} has no header: the classes and the preprocessing of {model.name} are assumed")
    reference = Reference(pair.reference, _images(data, model, pair.reference.header, split))
    terminal.say(f"verify  {path} against {model} on {counted(len(reference.paths), 'image')}")
    with terminal.progress(2 * len(reference.paths), "verify") as bar:
        verdict = result_of(verify_pair(pair, reference, tol_ap=tol_ap), bar.advance)
    written = write and record(pair, verdict)
    _report(pair, verdict, written=written, as_json=as_json)
    if write and not written:
        terminal.warn(f"{path} has no header, so the failed verification is not recorded")
    if verdict.passed and verdict.weakness:
        terminal.warn(verdict.weakness)
    if not verdict.passed:
        terminal.fail(GateError(f"verification failed: {verdict.summary}", code="parity"))


def _images(data: Path | None, model: Path, header: ModelHeader, split: str) -> Dataset | Sequence[Path]:
    from rtdetr_cli.export.images import verification_images

    hint = "--data DATA, or --data with a folder of images"
    images, notes = verification_images(data, model, header, split=split, hint=hint)
    for note in notes:
        terminal.say(note)
    return images


def _report(pair: FileCheck, verdict: Verdict, *, written: bool, as_json: bool) -> None:
    if as_json:
        gate = verdict.to_json()
        terminal.emit_json({"path": str(pair.path), "against": str(pair.model), "gate": gate, "written": written})
        return
    results = {True: "passed", False: "FAILED", None: "not checked"}
    rows = [
        (name, results[part.passed], "; ".join(part.findings) or _figures(part.figures))
        for name, part in verdict.parts.items()
    ]
    terminal.table(("part", "result", "details"), rows)
    if verdict.passed:
        terminal.out(f"verified: {verdict.summary}" + (", recorded in the header" if written else ""))


def _figures(figures: dict[str, Any]) -> str:
    if "why_not" in figures:
        return str(figures["why_not"])
    shown = {
        "batch": "batch {}",
        "matched": "{:.3f} matched",
        "score_error": "score error {:.1e}",
        "box_error": "1 - IoU {:.1e}",
        "ap_model": "AP {:.4f}",
        "ap_export": "{:.4f} in the file",
    }
    return ", ".join(text.format(figures[name]) for name, text in shown.items() if figures.get(name) is not None)
