"""The Python API: the commands' words, defaults and results, as methods of what `load` returns.

    from rtdetr_cli import load

    detector = load("r18")                     # a preset, or best.safetensors, a .pth, .onnx, .xml, .engine, a run
    run = detector.train(data="my.json")       # from here on, the detector is the best model of the run
    print(run.folder, run.metrics["AP"])
    detector.predict("street.jpg").save("street-annotated.jpg")

A runtime is imported when it is needed; an ONNX file never needs torch.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from rtdetr_cli.config.image_size import parse_image_size
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.export.options import CALIBRATION_IMAGES
from rtdetr_cli.infer.backend import Backend, default_batch, open_backend
from rtdetr_cli.infer.detections import Detections, as_image
from rtdetr_cli.infer.duplicates import parse_dedupe
from rtdetr_cli.infer.selection import select_by
from rtdetr_cli.infer.sources import find_sources, is_url
from rtdetr_cli.infer.stream import detect_images
from rtdetr_cli.runs import BEST
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, TRANSFORMERS_TENSORS, ModelHeader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from rtdetr_cli.evaluate.run import Evaluation
    from rtdetr_cli.export.artefacts import Artefact
    from rtdetr_cli.export.run import ExportEvent
    from rtdetr_cli.workflows.events import Event, RunFinished

    Pixels = NDArray[np.uint8] | Image.Image

__all__ = ["Detections", "Detector", "TrainSettings", "load"]

PathLike = str | os.PathLike[str]
Size = int | str | tuple[int, int]


class PredictOptions(TypedDict, total=False):
    """The keywords of `Detector.predict`."""

    conf: float | str
    classes: Sequence[str] | None
    max_det: int
    batch: int


class TrainSettings(TypedDict, total=False):
    """The flags of `rtdetr train`; `rtdetr train --help` describes them."""

    images: PathLike
    preset: str
    weights: PathLike
    epochs: int
    batch: int | Literal["auto"]
    effective_batch: int
    imgsz: Size
    lr: float
    lr_backbone: float
    aug: str
    freeze: Literal["preset", "none", "stem", "backbone", "encoder"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    compile: bool
    workers: int | Literal["auto"]
    cache: Literal["none", "ram", "disk"]
    device: str
    seed: int
    deterministic: bool
    patience: int
    overfit: int
    out: PathLike
    name: str
    log: Sequence[Literal["tensorboard", "wandb", "mlflow"]]


class Detector:
    """A model to predict with, evaluate, export and train, or a preset to train.

    Attributes:
        path: the model file; None for a preset until it is trained, or its published weights are needed.
        preset: the preset's name; empty for a model file.
        run: the result of the last training.
    """

    def __init__(self, path: Path | None, preset: str = "", **options: Any) -> None:
        """Open a model file with the options of `load`; a preset is opened when it is needed."""
        self.path, self.preset, self.options = path, preset, options
        self.run: RunFinished | None = None
        self._backend = None if path is None else open_backend(path, **options)

    @property
    def backend(self) -> Backend:
        """The open model; for a preset that is not trained, its published COCO weights."""
        if self._backend is None:
            self._backend = open_backend(self._model_path(), **self.options)
        return self._backend

    @property
    def header(self) -> ModelHeader:
        """What the model file says about itself."""
        return self.backend.header

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in label order; empty for a foreign graph."""
        return self.header.names

    @property
    def imgsz(self) -> tuple[int, int]:
        """Height and width that images are stretched to."""
        return self.backend.imgsz

    def __repr__(self) -> str:
        if self._backend is None:
            return f"<Detector, preset {self.preset}>"
        height, width = self.imgsz
        return f"<Detector {self.backend.kind} {height}x{width}, {len(self.names)} classes>"

    def _model_path(self) -> Path:
        if self.path is None:
            from rtdetr_cli.config.presets import load_preset
            from rtdetr_cli.weights import hub

            weights = load_preset(self.preset).weights
            if weights is None:
                hint = f"load({self.preset!r}).train(data=...)"
                raise ModelError(f"the preset {self.preset} has no published weights: train it first", hint=hint)
            self.path = hub.fetch(weights)
        return self.path

    # ---- predict ------------------------------------------------------------------------------------------------

    @overload
    def predict(self, source: PathLike, **options: Unpack[PredictOptions]) -> Any: ...
    @overload
    def predict(self, source: Pixels, **options: Unpack[PredictOptions]) -> Detections: ...
    @overload
    def predict(self, source: Sequence[PathLike | Pixels], **options: Unpack[PredictOptions]) -> list[Detections]: ...

    def predict(
        self,
        source: Any,
        *,
        conf: float | str = "auto",
        classes: Sequence[str] | None = None,
        max_det: int = 100,
        batch: int = 8,
    ) -> Any:
        """Detect objects in one image or in several.

        Args:
            source: the file or web address of an image, a Pillow image, or an array (H, W, 3) uint8 RGB (H, W for
                gray); a sequence of them; or a folder or pattern of images, whose videos are left out.
            conf: minimum score, or `auto`: the thresholds stored in the model for each class, else 0.5.
            classes: names of the classes to return; None for all.
            max_det: maximum detections per image.
            batch: images per forward pass.

        Returns:
            `Detections` for one image, a list in the same order for several; boxes in pixels of the upright
            image, best first.

        Raises:
            ImageError: an image cannot be read.
            UsageError: an unknown class, a value out of range, or an array of another type or shape.
        """
        if batch < 1:
            raise UsageError(f"batch {batch} must be at least 1")
        single = isinstance(source, (str, os.PathLike)) or hasattr(source, "shape") or not isinstance(source, Iterable)
        sources = [source] if single else list(source)
        if isinstance(source, (str, os.PathLike)):
            word = os.fspath(source)
            if os.path.isdir(word) or (glob.has_magic(word) and not is_url(word) and not os.path.exists(word)):
                single, sources = False, [item.path for item in find_sources([word]) if not item.video]
        images = [as_image(item) for item in sources]
        selection = select_by(self.header, conf=conf, classes=classes, max_det=max_det)
        detections = []
        downloads = any(isinstance(image, str) for image in images)
        for image, result in zip(images, detect_images(self.backend, images, batch=batch, keep=downloads), strict=True):
            if result.detections is None:
                assert result.item.error is not None
                raise result.item.error
            known = result.item.original if isinstance(image, str) else image
            detections.append(replace(selection.apply(result.detections), image=known))
        return detections[0] if single else detections

    # ---- train --------------------------------------------------------------------------------------------------

    def train(
        self,
        data: PathLike | None = None,
        *,
        resume: PathLike | None = None,
        sets: Sequence[str] = (),
        quiet: bool = False,
        **settings: Unpack[TrainSettings],
    ) -> RunFinished:
        """Finetune on a dataset as `rtdetr train` does; afterwards the detector is the best model of the run.

        Training starts from the model file, or from the preset's COCO weights.

        Args:
            data: the dataset; required unless a run is resumed.
            resume: folder of an interrupted run to resume; needs no other setting.
            sets: more settings, as `key=value`, like `--set`.
            quiet: do not show the plan and the progress on stderr.
            settings: the flags of the command.

        Returns:
            The run: `folder`, `best` (the model file), `metrics`, `best_epoch` (from 0), `epochs`, `page`...

        Raises:
            RtdetrError: of every kind. After Ctrl-C the checkpoint is saved, and the hint says how to resume.
        """
        events = self.train_events(data, resume=resume, sets=sets, **settings)
        if quiet:
            deque(events, maxlen=0)
        else:
            from rtdetr_cli.cli.training_output import render

            render(events, result_on_stdout=False)
        assert self.run is not None
        return self.run

    def train_events(
        self,
        data: PathLike | None = None,
        *,
        resume: PathLike | None = None,
        sets: Sequence[str] = (),
        **settings: Unpack[TrainSettings],
    ) -> Iterator[Event]:
        """Return an iterator that trains and yields what happens; see `train`, `train.events` and `workflows.events`.

        Clashing settings are refused at once, everything else when the iterator starts.
        """
        if self.path is not None and self.path.suffix.lower() in EXPORT_SUFFIXES:
            raise UsageError(
                f"{self.path} is an export, which cannot be trained",
                hint="load the .safetensors or .pth file that it was exported from",
                code="model-exported",
            )
        from rtdetr_cli.train.processes import parse_devices
        from rtdetr_cli.workflows import finetune, launching

        reduced = [name for name in ("layers", "queries", "sampling") if self.options.get(name) is not None]
        if reduced:
            raise UsageError(
                f"{' and '.join(reduced)} of load apply to a model that predicts, not to training",
                hint="load the model without them; the architecture is set with sets=['model.queries=100']",
                code="clash",
            )
        given = {key: os.fspath(v) if isinstance(v, os.PathLike) else v for key, v in settings.items()}
        given |= {} if data is None else {"data": os.fspath(data)}
        if resume is not None:
            config = finetune.run_config(Path(resume))
        else:
            start = {"preset": self.preset} if self.path is None or self.preset else {"weights": str(self.path)}
            used = {"device": self.options.get("device", "auto"), "imgsz": self.options.get("imgsz")}
            given = {**start, **{key: v for key, v in used.items() if v not in (None, "auto")}, **given}
            config, _ = launching.resolve_training(given, sets=sets)
        if len(parse_devices(config.settings.device)) > 1:
            raise UsageError(
                f"device {config.settings.device} needs several processes, which only the command line starts",
                hint=f"rtdetr train --device {config.settings.device} ...",
                code="devices",
            )

        def events() -> Iterator[Event]:
            from rtdetr_cli.train.stop import stop_on_signals
            from rtdetr_cli.workflows.events import RunFinished

            with stop_on_signals() as stop:
                if resume is not None:
                    running = finetune.resume(Path(resume), flags=given, sets=sets, stop=stop)
                else:
                    running = finetune.finetune(config, stop=stop)
                for event in running:
                    if isinstance(event, RunFinished):
                        self.run, self.path, self.preset, self._backend = event, event.best, "", None
                        self.options = {key: self.options[key] for key in ("device", "threads") if key in self.options}
                    yield event

        return events()

    # ---- evaluate -----------------------------------------------------------------------------------------------

    def evaluate(
        self,
        data: PathLike | None = None,
        *,
        images: PathLike | None = None,
        split: str = "val",
        batch: int | Literal["auto"] = "auto",
        evaluator: str = "hotcoco",
        calibrate: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Compute the COCO metrics on a split as `rtdetr eval` does.

        Args:
            data: the dataset; None for the one that the model was trained with.
            images: folder of the images, if it is not found.
            split: `train`, `val` or `test`.
            batch: images per forward pass.
            evaluator: `hotcoco` or `pycocotools`.
            calibrate: `f1` or `precision=0.9`: find the score threshold of each class for it, and store them in the
                model file; `predict` uses them from then on.
            progress: called with the number of images done since its last call.

        Returns:
            The evaluation: `metrics` by COCO's names, `per_class`, `to_json()`...

        Raises:
            UsageError: no dataset is named and the model does not name one, or the model cannot store thresholds.
            DataError: the dataset cannot be read, or has no such split.
        """
        from rtdetr_cli.evaluate import run, thresholds
        from rtdetr_cli.evaluate.source import choose_split

        path, backend = self._model_path(), self.backend
        if calibrate is not None:
            thresholds.check_calibration(calibrate, split)
            thresholds.check_can_store(path)
        chosen = choose_split(
            _path(data),
            split=split,
            images=_path(images),
            model=path,
            header=backend.header,
        )
        size = default_batch(backend) if batch == "auto" else batch
        result = run.evaluate(backend, chosen.dataset, batch=size, progress=progress, evaluator=evaluator)
        notes: tuple[str, ...] = ()
        if calibrate is not None:
            _, notes, header = thresholds.calibrate_model(path, result, calibrate, backend)
            backend.header = replace(backend.header, thresholds=header.thresholds)
        return replace(result, notes=(*chosen.notes, *result.notes, *notes))

    # ---- export -------------------------------------------------------------------------------------------------

    def export(
        self,
        *,
        onnx: bool = False,
        fp16: bool = False,
        trt_fp16: bool = False,
        rtx: bool = False,
        target: str | None = None,
        openvino: bool = False,
        int8: bool = False,
        dynamic: bool = False,
        batch: int = 1,
        imgsz: Size | None = None,
        opset: int = 18,
        gridsample: bool = False,
        raw: bool = False,
        preprocess_in_graph: bool = False,
        verify: PathLike | None = None,
        tol_ap: float | None = None,
        calibration: PathLike | None = None,
        calibration_images: int = CALIBRATION_IMAGES,
        keep_float: Sequence[str] = (),
        no_gate: bool = False,
        out: PathLike | None = None,
        bundle: PathLike | None = None,
        on_event: Callable[[ExportEvent], None] | None = None,
    ) -> list[Artefact]:
        """Export to ONNX (the default), INT8, OpenVINO or TensorRT, and verify each file as `rtdetr export` does.

        The keywords are the flags of the command, which `rtdetr export --help` describes; `on_event` is called with
        everything that happens.

        Returns:
            The exported files with their verdicts, in the order in which they were made.

        Raises:
            GateError: a file does not give the same detections as the model; it is named `*.failed.*`.
            UsageError: options clash, or there are no images to verify on.
            ExportError: a graph cannot be made.
            EnvironmentProblem: a package or device that a format needs is missing.
        """
        from rtdetr_cli.export.artefacts import Artefact
        from rtdetr_cli.export.bundle import write_bundle
        from rtdetr_cli.export.options import ExportOptions, choose_formats
        from rtdetr_cli.workflows.export import gate_error, plan_export

        formats = choose_formats(onnx=onnx, fp16=fp16, trt_fp16=trt_fp16, openvino=openvino, rtx=rtx, int8=int8)
        size, parts = _size(imgsz) or self.options.get("imgsz"), tuple(keep_float)
        flags = dynamic, opset, gridsample, raw, preprocess_in_graph
        plan = plan_export(
            self._model_path(),
            ExportOptions(formats, size, batch, *flags, float_parts=parts),
            target=target,
            verify=_path(verify),
            no_gate=no_gate,
            calibration=_path(calibration),
            device=self.options.get("device", "auto"),
            out=_path(out),
            bundle=_path(bundle),
        )
        artefacts: list[Artefact] = []
        setting = {key: self.options.get(key) for key in ("sampling", "layers", "queries", "dedupe")}
        for event in plan.events(**setting, tol_ap=tol_ap, calibration_images=calibration_images):
            if on_event is not None:
                on_event(event)
            if isinstance(event, Artefact):
                artefacts.append(event)
        error = gate_error(artefacts, parts)
        if error is not None:
            raise error
        if bundle is not None:
            write_bundle(Path(bundle), artefacts, plan.images)
        return artefacts


def load(
    model: PathLike,
    *,
    device: str = "auto",
    imgsz: Size | None = None,
    layers: int | None = None,
    queries: int | None = None,
    sampling: str | None = None,
    threads: int | None = None,
    dedupe: float | str | None = None,
) -> Detector:
    """Open a model, or name a preset to train.

    Args:
        model: a `.safetensors`, a published `.pth`, an `.onnx`, an OpenVINO `.xml`, a TensorRT `.engine`, a run folder
            for its best model, a folder of transformers, or a preset: `tiny`, `r18`, `r34`, `r50m`, `r50`, `r101`,
            `hgl`, `hgx`, `hgh`, or a preset's `.toml`.
        device: `auto`, `cpu`, or a GPU such as `0`.
        imgsz: input size instead of the model's own: one number or (height, width), multiples of 32.
        layers: number of decoder layers to use; only for weights, not for exports, as `queries` and `sampling`.
        queries: number of queries to use.
        sampling: `bilinear` or `discrete`, for a published file, which does not say.
        threads: CPU threads of the runtime.
        dedupe: how much to lower the scores of duplicates: `off`, or a number such as 8; None for the model's own.

    Raises:
        ModelError: the file is missing, truncated or not a model.
        UsageError: an option does not apply to this kind of file.
        EnvironmentProblem: the runtime's package or the device is missing.
    """
    path = Path(model)
    options: dict[str, Any] = {"device": device, "imgsz": _size(imgsz), "layers": layers, "queries": queries}
    options |= {"sampling": sampling, "threads": threads, "dedupe": parse_dedupe(dedupe)}
    if path.is_dir():
        files = [path / name for name in (BEST, TRANSFORMERS_TENSORS) if (path / name).is_file()]
        if not files:
            raise ModelError(f"the folder {path} has no {BEST}", code="model-missing")
        return Detector(files[0], **options)
    if not path.exists() and isinstance(model, str) and not path.suffix and path.name == model:
        from rtdetr_cli.config.presets import load_preset

        return Detector(None, load_preset(model).name, **options)
    if path.suffix == ".toml":
        return Detector(None, str(path), **options)
    return Detector(path, **options)


def _path(path: PathLike | None) -> Path | None:
    return None if path is None else Path(path)


def _size(imgsz: Size | None) -> tuple[int, int] | None:
    try:
        return None if imgsz is None else parse_image_size(imgsz)
    except ValueError as error:
        raise UsageError(f"imgsz: {error}", code="size") from None
