"""Plan an export, for `rtdetr export` and `Detector.export`: everything that can be refused is, before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import GateError, UsageError
from rtdetr_cli.export.images import calibration_images, verification_images
from rtdetr_cli.export.options import BUNDLE_FILES, ExportOptions
from rtdetr_cli.files import ensure_writable
from rtdetr_cli.infer.packages import has_package
from rtdetr_cli.infer.selection import threshold_mismatch
from rtdetr_cli.runs import EXPORT
from rtdetr_cli.text import abbreviate
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, own_header

if TYPE_CHECKING:
    from rtdetr_cli.export.artefacts import Artefact
    from rtdetr_cli.export.run import ExportEvent


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export that is ready to start.

    Attributes:
        model: path of the weights.
        options: with the targets of an engine of TensorRT for RTX.
        images: to verify on; None skips verification.
        calibration: images to calibrate INT8 on.
        folder: for the files.
        device: for verification and engines.
        notes: how images were chosen, and what will be missing.
    """

    model: Path
    options: ExportOptions
    images: Dataset | Sequence[Path] | None
    calibration: Sequence[Path]
    folder: Path
    device: str
    notes: Sequence[str]

    def image_runs(self) -> int | None:
        """Return how many images verification runs: on the model, each format, and the float16 twin; None without."""
        if self.images is None:
            return None
        from rtdetr_cli.export.tensorrt import runs_here
        from rtdetr_cli.export.verify import MAX_IMAGES

        options = self.options
        formats = [f for f in options.formats if f != "rtx-fp16" or runs_here(options.targets, self.device)]
        return (1 + len(formats) + ("fp16" in formats)) * min(len(self.images), MAX_IMAGES)

    def events(
        self, *, sampling: str | None, layers: int | None, queries: int | None, dedupe: float | None, **details: Any
    ) -> Iterator[ExportEvent]:
        """Load the model and export it as `export.run.export_events` does, which takes `details`.

        `dedupe` is a gamma; None is the model's own value.
        """
        from rtdetr_cli.export.artefacts import Notice
        from rtdetr_cli.export.run import export_events
        from rtdetr_cli.infer.torch_backend import check_sampling
        from rtdetr_cli.weights.load import load_model

        check_sampling(self.model, sampling)
        model, header = load_model(self.model, sampling=sampling, layers=layers, queries=queries)
        header = header.with_dedupe(dedupe)
        if mismatch := threshold_mismatch(header, self.options.imgsz or header.imgsz):
            yield Notice(f"warning: {mismatch[0]}; exported anyway")
        yield from export_events(
            *(model, header, self.folder, self.options),
            images=self.images,
            stem=self.model.stem,
            device=self.device,
            calibration=self.calibration,
            **details,
        )


def plan_export(
    model: Path,
    options: ExportOptions,
    *,
    target: str | None = None,
    verify: Path | None = None,
    split: str = "val",
    no_gate: bool = False,
    calibration: Path | None = None,
    device: str = "auto",
    out: Path | None = None,
    bundle: Path | None = None,
) -> ExportPlan:
    """Check the arguments of an export, and choose its images; the model is not loaded yet.

    The arguments are the flags of `rtdetr export`.

    Raises:
        UsageError: options clash, the model is exported already, or there are no images.
        DataError: a dataset cannot be read.
        ModelError: the model is missing or damaged.
        EnvironmentProblem: a package is missing.
        RtdetrError: the folder of the bundle cannot be written.
    """
    if no_gate and verify is not None:
        raise UsageError("--verify and --no-gate cannot be combined")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    if calibration is not None and not options.int8:
        raise UsageError("--calibration has no effect without --int8")
    if model.suffix.lower() in EXPORT_SUFFIXES:
        hint = "pass the weights that it was exported from: .safetensors or .pth"
        raise UsageError(f"{model} is already exported", hint=hint)
    options.check()
    notes: list[str] = []
    if "trt-fp16" in options.formats and not has_package("tensorrt"):
        notes.append(
            "warning: TensorRT is not installed: no engine is built here; --rtx builds one for GeForce RTX on any "
            "machine"
        )
    if "rtx-fp16" in options.formats:
        from rtdetr_cli.export.tensorrt import rtx_targets

        options = replace(options, targets=rtx_targets(target, device))
    elif target is not None:
        raise UsageError("--target is for engines of TensorRT for RTX: add --rtx")
    if bundle is not None:
        check_bundle(bundle, options)
    header, images, calibrated = own_header(model), None, list[Path]()
    if not no_gate:
        images, chosen = verification_images(verify, model, header, split=split)
        notes += chosen
    if options.int8:
        calibrated, chosen = calibration_images(calibration, verify, model, header, images)
        notes += [f"calibration: {note}" for note in chosen if note not in notes]
    return ExportPlan(model, options, images, calibrated, out or model.parent / EXPORT, device, notes)


def check_bundle(folder: Path, options: ExportOptions) -> None:
    """Refuse a bundle that cannot be made, before the export.

    Raises:
        UsageError: no ONNX file with post-processing is exported, or the folder holds other files.
        RtdetrError: the folder cannot be written.
    """
    if options.raw:
        raise UsageError("--bundle and --raw cannot be combined: its program needs the post-processing")
    if not {"onnx", "int8", "fp16"} & set(options.formats):
        raise UsageError("--bundle needs an ONNX file", hint="add --onnx")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--bundle {folder} is a file, not a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in BUNDLE_FILES) if folder.exists() else []
    if others:
        raise UsageError(
            f"--bundle {folder} already holds other files: {abbreviate(others, 4)}",
            hint="choose an empty or new folder",
        )
    ensure_writable(folder, hint="choose another folder with --bundle")


def gate_error(artefacts: Sequence[Artefact], keep_float: Sequence[str] = ()) -> GateError | None:
    """Return the error for the files that failed verification, if any; `keep_float` are the parts kept in float."""
    failed = [f"{a.path.name}: {a.verdict.summary}" for a in artefacts if a.verdict and not a.passed]
    if not failed:
        return None
    hint = "parity.json has all figures; --tol-ap allows a larger AP difference, --no-gate skips verification"
    best = next((a.costs[0] for a in artefacts if a.costs), None)
    if best is not None:
        kept = ",".join([*keep_float, best.part])
        hint = f"the {best.part} costs most in INT8: --keep-float {kept}; {hint}"
    return GateError(f"verification failed: {'; '.join(failed)}", hint=hint, code="parity")
