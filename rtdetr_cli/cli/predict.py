"""`rtdetr predict`: detect objects in images and videos."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import select, terminal
from rtdetr_cli.cli.options import (
    BackendOption,
    DedupeOption,
    LayersOption,
    OfflineFlag,
    QueriesOption,
    SamplingOption,
    SizeOption,
    ThreadsOption,
)
from rtdetr_cli.cli.select import open_model, parse_size
from rtdetr_cli.config.settings import MAX_BATCH
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.runs import make_numbered
from rtdetr_cli.text import abbreviate, counted, printable
from rtdetr_cli.weights.header import EXPORT_SUFFIXES

if TYPE_CHECKING:
    from rtdetr_cli.datasets.records import Category
    from rtdetr_cli.infer.backend import Backend
    from rtdetr_cli.infer.selection import Selection
    from rtdetr_cli.infer.sources import Source
    from rtdetr_cli.infer.stream import Predicted
    from rtdetr_cli.infer.write import Results

DEFAULT_MODEL = "r18"
"""The published model that is used when no run has finished yet."""

LOW_SCORE = 0.05
"""When the best score is below this, a lower threshold is not worth suggesting."""

MIN_OVERLAPS, MIN_OVERLAP_SHARE = 3, 0.1
"""Boxes that overlap better ones are explained when there are this many, and this share of all."""


def predict(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Image, folder, 'pattern', video, URL, or - for a list on stdin."),
    ],
    weights: Annotated[
        Path | None,
        typer.Option("--weights", "-w", help="Model file or run (default: the newest run).", show_default=False),
    ] = None,
    conf: Annotated[
        str, typer.Option(help="Minimum score; auto: the thresholds stored in the model, else 0.5.")
    ] = "auto",
    classes: Annotated[list[str] | None, typer.Option(help="Keep only these classes (comma-separated names).")] = None,
    max_det: Annotated[int, typer.Option(min=1, help="Maximum detections per image.")] = 100,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, max=MAX_BATCH, help="Images per forward pass.")] = 1,
    imgsz: SizeOption = None,
    layers: LayersOption = None,
    queries: QueriesOption = None,
    sampling: SamplingOption = None,
    dedupe: DedupeOption = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, a GPU such as 0, or rtx (experimental): TensorRT for RTX, for ONNX files.")
    ] = "auto",
    runtime: BackendOption = "torch",
    threads: ThreadsOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Dataset with the class names of a foreign model, and with image ids."),
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write annotated images and videos.")] = True,
    save_json: Annotated[
        bool, typer.Option("--save-json", help="Write predictions.jsonl, one line per image.")
    ] = False,
    save_coco: Annotated[bool, typer.Option("--save-coco", help="Write predictions.json as COCO results.")] = False,
    save_txt: Annotated[bool, typer.Option("--save-txt", help="Write labels/NAME.txt as YOLO labels.")] = False,
    save_conf: Annotated[bool, typer.Option("--save-conf", help="Add the score of each box to --save-txt.")] = False,
    offline: OfflineFlag = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Output folder (default: runs/predict-NN).", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document per image to stdout.")] = False,
) -> None:
    """Detect objects in images and videos, and write annotated copies; skip files that cannot be read (exit code 1)."""
    from rtdetr_cli.infer.backend import name_classes
    from rtdetr_cli.infer.duplicates import parse_dedupe
    from rtdetr_cli.infer.exported import MANY_IMAGES
    from rtdetr_cli.infer.selection import parse_conf, select_by
    from rtdetr_cli.infer.sources import find_sources
    from rtdetr_cli.infer.write import Results, coco_image_ids

    # Check the options before any file is opened.
    terminal.forbid_downloads(offline)
    _check_options(sampling, out)
    if save_conf and not save_txt:
        raise UsageError("--save-conf adds scores to the files of --save-txt", hint="--save-txt --save-conf")
    parse_conf(conf)
    changes: dict[str, Any] = {"layers": layers, "queries": queries, "sampling": sampling}
    changes |= {"imgsz": parse_size(imgsz) if imgsz else None, "dedupe": parse_dedupe(dedupe)}
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a file name need not be UTF-8
    found = find_sources(sources, sys.stdin)
    model = _find_model(weights)
    categories, ids = _load_dataset(data)
    images = max(len(found), MANY_IMAGES * any(source.video for source in found))
    backend = open_model(model, runtime, images=images, device=device, threads=threads, **changes)
    if categories and not backend.header.names:
        name_classes(backend, [c.name for c in categories], [c.id for c in categories])
    selection = select_by(backend.header, conf=conf, classes=classes, max_det=max_det)
    kinds = {"annotated copies": save, "predictions.jsonl": save_json, "predictions.json": save_coco}
    kinds["labels/"] = save_txt
    folder = _make_folder(out, found, draw=save) if any(kinds.values()) else None
    _show_model(model, backend, selection, found, device=device, compare=conf == "auto")
    results: Results | None = None
    if folder is not None:
        files = {"lines": save_json, "coco": save_coco, "txt": save_txt, "scores": save_conf}
        results = Results(folder, names=backend.header.names, image_ids=coco_image_ids(found, ids), **files)
    run = _Run(found, backend, selection, results, batch=batch, draw_to=folder if save else None, as_json=as_json)
    try:
        run.predict()
    finally:
        if results is not None:
            results.close()
        if folder is not None and out is None and not any(folder.iterdir()):
            folder.rmdir()  # nothing could be read
    run.report(model, folder, [kind for kind, wanted in kinds.items() if wanted])
    run.raise_errors()
    if not as_json and run.classes:
        _show_next(model)


def _show_next(model: Path) -> None:
    """Print the command that comes next: export a finetuned model, measure an exported one, finetune any other."""
    if model.suffix.lower() in EXPORT_SUFFIXES:
        terminal.next_step("rtdetr", "benchmark", model)
    elif model.suffix == ".safetensors":
        terminal.next_step("rtdetr", "export", select.model_name(model))
    else:
        terminal.next_step("rtdetr", "train", "YOUR_DATA", "--weights", model)


def _check_options(sampling: str | None, out: Path | None) -> None:
    if sampling not in (None, "bilinear", "discrete"):
        raise UsageError(f"--sampling {sampling} is neither bilinear nor discrete")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")


def _find_model(weights: Path | None) -> Path:
    """Return the model file; without a name the newest run's, and without a run the published one."""
    from rtdetr_cli.infer.backend import check_model_path

    if weights is not None:
        path = select.model_file(weights)
        check_model_path(path)
        return path
    try:
        return select.resolve_model(None)
    except ModelError as error:
        if error.code != "run-missing":
            raise
    from rtdetr_cli.weights import hub

    terminal.say(f"runs/ has no finished run: using the published {DEFAULT_MODEL} COCO weights")
    return hub.fetch(DEFAULT_MODEL, progress=terminal.transfer, notify=terminal.say)


def _load_dataset(data: Path | None) -> tuple[Sequence[Category], dict[str, int]]:
    """Return the classes of a dataset, and the ids of its images by their file names; nothing without a dataset."""
    if data is None:
        return (), {}
    from rtdetr_cli.checks.load import load_splits

    splits = load_splits(data)
    ids = {
        Path(file).name: image_id
        for split in (splits.train, splits.val, splits.test)
        if split is not None
        for file, image_id in zip(split.file_names, split.image_ids.tolist(), strict=True)
    }
    return splits.categories, ids


def _show_model(
    model: Path, backend: Backend, selection: Selection, sources: Sequence[Source], *, device: str, compare: bool
) -> None:
    """Print the model and its settings; warn of stored thresholds that were calibrated with other settings."""
    from rtdetr_cli.infer.backend import CAUTIONS
    from rtdetr_cli.infer.selection import threshold_mismatch
    from rtdetr_cli.weights.binding import modification_warning

    size = "x".join(map(str, backend.imgsz))
    terminal.say(f"model {model}  {backend.kind} {size} px  {_count(sources)}  conf {selection.description}")
    for warning in (CAUTIONS.get(device), modification_warning(model, backend.header)):
        if warning:
            terminal.warn(warning)
    if compare and (mismatch := threshold_mismatch(backend.header, backend.imgsz)) is not None:
        command = f": rtdetr eval {model} {mismatch[1]} --calibrate f1" if model.suffix == ".safetensors" else ""
        terminal.warn(mismatch[0] + command)


def _make_folder(out: Path | None, sources: Sequence[Source], *, draw: bool) -> Path:
    """Create the output folder; refuse one in which a result would replace a file that is not one."""
    from rtdetr_cli.infer.write import MARKER, RESULT_FILES, saved_name

    if out is None:
        Path("runs").mkdir(exist_ok=True)
        return make_numbered(Path("runs"), "predict")
    drawn = sources if draw else []
    for source in drawn:
        copy = out / saved_name(source)
        if not source.url and copy.exists() and source.path.exists() and copy.samefile(source.path):
            raise UsageError(
                f"--out {out} contains {source.path}, which its annotated copy would replace",
                hint="choose another folder, or --no-save",
                code="out-is-source",
            )
    planned = [out / saved_name(source) for source in drawn] + [out / name for name in RESULT_FILES]
    if not (out / MARKER).exists() and (taken := next((path for path in planned if os.path.lexists(path)), None)):
        raise UsageError(
            f"--out {out} has a file {taken.name} that rtdetr predict did not write, and would replace",
            hint="choose another folder",
            code="out-in-use",
        )
    inner = {parent for source in sources for parent in Path(saved_name(source)).parents}
    for folder in sorted({out / "labels" / parent for parent in inner} | {out / parent for parent in inner - {Path()}}):
        if folder.is_symlink():
            raise UsageError(
                f"{folder} is a link, and results would be written to {os.path.realpath(folder)}",
                hint="choose another folder with --out",
                code="out-in-use",
            )
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    return out


class _Run:
    """Predicts sources, prints each result, and counts.

    `images` includes the `frames` of videos, `empty` are those without detections, `overlaps` the detections that
    overlap a better one, `best_score` the highest score of the requested classes, even below the threshold,
    `truncated` the videos that end early, and `errors` one for each source that could not be read.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        backend: Backend,
        selection: Selection,
        results: Results | None,
        *,
        batch: int,
        draw_to: Path | None,
        as_json: bool,
    ) -> None:
        self.sources, self.backend, self.selection, self.results = sources, backend, selection, results
        self.batch, self.draw_to, self.as_json = batch, draw_to, as_json
        self.images = self.frames = self.overlaps = self.truncated = 0
        self.classes: Counter[str] = Counter()
        self.empty: list[str] = []
        self.best_score: float | None = None
        self.errors: list[RtdetrError] = []
        self.interrupted = False
        self.start = time.monotonic()

    def predict(self) -> None:
        """Predict videos one by one and the images between them in batches, until Ctrl-C."""
        try:
            for is_video, group in groupby(self.sources, key=lambda source: source.video):
                if is_video:
                    for source in group:
                        self._predict_video(source)
                else:
                    self._predict_images(list(group))
        except KeyboardInterrupt:
            terminal.say(f"interrupted; predicted so far: {self.counted()}, of {_count(self.sources)}")
            self.interrupted = True

    def _predict_images(self, sources: Sequence[Source]) -> None:
        from rtdetr_cli.images.decode import ImageError
        from rtdetr_cli.infer.stream import predict_images

        events = predict_images(sources, self.backend, self.selection, batch=self.batch, draw_to=self.draw_to)
        with closing(events), _progress(len(sources), "images", show=len(sources) > 1) as advance:
            for event in events:
                if isinstance(event, ImageError):
                    self._add_error(event)
                else:
                    self._add(event, print_line=True)
                advance()

    def _predict_video(self, source: Source) -> None:
        from rtdetr_cli.images.decode import ImageError
        from rtdetr_cli.infer.stream import predict_video
        from rtdetr_cli.infer.video import Video

        try:
            video = Video(source.path)
        except ImageError as error:
            self._add_error(error)
            return
        frames, detections, start = 0, 0, time.monotonic()
        with video:
            events = predict_video(source, video, self.backend, self.selection, batch=self.batch, draw_to=self.draw_to)
            progress = _progress(video.frames, source.path.name, lines=self.as_json)
            with closing(events), progress as advance:
                for event in events:
                    frames += 1
                    detections += len(event.detections)
                    self._add(event, print_line=self.as_json)
                    advance()
        if not self.as_json:
            rate = frames / max(time.monotonic() - start, 1e-9)
            width, height = video.size_wh
            size = f"{height}x{width} px"
            amounts = f"{counted(frames, 'frame')}  {counted(detections, 'detection')}"
            terminal.out(printable(f"{source.path}  {size}  {amounts}  {rate:.1f} frames/s"))
        if video.truncated:
            self.truncated += 1
            terminal.warn(f"{source.path} is truncated: it ends after {frames} of {video.frames} frames")

    def _add(self, event: Predicted, *, print_line: bool) -> None:
        from rtdetr_cli.infer.selection import overlaps
        from rtdetr_cli.infer.write import image_document

        source, detections = str(event.source), event.detections
        self.images += 1
        self.frames += event.frame is not None
        self.classes.update(detections.class_names)
        self.overlaps += overlaps(detections)
        if not len(detections):
            self.empty.append(source if event.frame is None else f"{source} frame {event.frame}")
        if event.best_score is not None:
            self.best_score = max(event.best_score, self.best_score or 0.0)
        if self.results is not None:
            self.results.add(event.source, detections, frame=event.frame)
        if print_line and self.as_json:
            terminal.emit_json(image_document(source, detections, frame=event.frame))
        elif print_line:
            width, height = detections.size_wh
            size = f"{height}x{width} px"
            terminal.out(printable(f"{source}  {size}  {detections.summary()}  {1000 * event.seconds:.0f} ms"))

    def _add_error(self, error: RtdetrError) -> None:
        self.errors.append(error)
        if len(self.sources) > 1:  # the error of a single source ends the command
            terminal.complain(error.message)

    def counted(self) -> str:
        """Return the number of images and frames in words."""
        numbers = ((self.images - self.frames, "image"), (self.frames, "frame"))
        return " and ".join(counted(n, noun) for n, noun in numbers if n) or "no image"

    def report(self, model: Path, folder: Path | None, written: Sequence[str]) -> None:
        """Print the summary of several images, what was written, and a hint where one helps."""
        if self.images > 1:
            terminal.say(printable(self.summary()))
        if folder is not None and self.images:
            from rtdetr_cli.images.decode import IMAGE_SUFFIXES

            copies = [f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES]
            drawn_only = written == ["annotated copies"] and not self.frames
            if drawn_only and len(copies) == 1:
                terminal.say(f"annotated image {copies[0]}")
            elif drawn_only:
                terminal.say(f"annotated images in {folder}")
            else:
                terminal.say(f"results in {folder}: {', '.join(written)}")
        if self.interrupted:
            raise typer.Exit(130)
        if hint := self.hint(model):
            terminal.give_hint(hint)

    def summary(self) -> str:
        """Return the number of images, seconds and objects of each class, and the images without detections."""
        from rtdetr_cli.infer.detections import count_classes

        seconds = time.monotonic() - self.start
        text = f"{self.counted()} in {seconds:.1f} s: {counted(self.classes.total(), 'object')}"
        if self.classes:
            text += f" ({count_classes(self.classes)})"
        if self.empty and self.classes:
            text += f"; {len(self.empty)} without detections: {abbreviate(self.empty, 3)}"
        return text

    def hint(self, model: Path) -> str:
        """Explain a poor result: nothing detected, or several boxes on one object; empty if there is none."""
        if not self.images:
            return ""
        total, best = self.classes.total(), self.best_score
        if total:
            if self.overlaps < max(MIN_OVERLAPS, MIN_OVERLAP_SHARE * total):
                return ""
            return (
                f"{self.overlaps} of {total} boxes overlap one with a higher score (IoU above 0.7), so some objects "
                "have several boxes: raise --conf, or name the classes you need with --classes"
            )
        if best is None or best < LOW_SCORE:
            score = "there was no score at all" if best is None else f"the best score is {best:.3f}"
            return (
                f"nothing was detected, and {score}; check that the model fits these images and was trained long enough"
            )
        hint = f"nothing was detected; the best score is {best:.3f}: --conf {math.floor(100 * best) / 100:.2f} shows it"
        if model.suffix == ".safetensors" and self.backend.header.thresholds is None:
            hint += ", and rtdetr eval --calibrate f1 finds thresholds for this model"
        return hint

    def raise_errors(self) -> None:
        """Raise an error that sums up unreadable sources and truncated videos, if there are any."""
        errors, truncated = self.errors, self.truncated
        if errors and len(self.sources) == 1:
            raise errors[0]
        are = "is" if truncated == 1 else "are"
        if errors:
            rest = "; the others were processed" if len(errors) < len(self.sources) else ""
            if truncated:
                rest = f", and {truncated} {are} truncated"
            raise RtdetrError(
                f"{len(errors)} of {_count(self.sources)} could not be read{rest}",
                hint="see the errors above",
                code="images-unreadable",
            )
        if truncated:
            raise RtdetrError(
                f"{truncated} of {_count([source for source in self.sources if source.video])} {are} truncated",
                hint="the frames up to the end of the file were processed; copy or download the file again",
                code="video-cut-off",
            )


@contextmanager
def _progress(total: int | None, what: str, *, show: bool = True, lines: bool = True) -> Iterator[Callable[[], None]]:
    """Show progress, unless the result's lines appear on the same terminal."""
    if not show or (lines and terminal.is_terminal(sys.stdout)):
        yield lambda: None
        return
    with terminal.progress(total, what) as bar:
        yield bar.advance


def _count(sources: Sequence[Source]) -> str:
    videos = sum(source.video for source in sources)
    images = len(sources) - videos
    return " and ".join(counted(n, noun) for n, noun in ((images, "image"), (videos, "video")) if n)
