"""`rtdetr predict`: images and videos in; names, boxes and annotated copies out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rtdetr_cli.errors import ModelError, RtdetrError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.infer.backend import Backend
    from rtdetr_cli.infer.job import Predicted
    from rtdetr_cli.infer.selection import Selection
    from rtdetr_cli.infer.sources import Source
    from rtdetr_cli.infer.write import Results

FIRST_MODEL = "rtdetrv2_r18vd_120e_coco_rerun_48.1.pth"  # what predicts where nothing has been trained yet
FAINT = 0.05  # a best score below which no threshold helps

Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="Image, folder, 'pattern', video, or - for a list on stdin."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", "-w", help="Any model file or run folder. Default: the newest finished run's best."),
]


def predict(
    sources: Sources,
    weights: Weights = None,
    conf: Annotated[
        str, typer.Option("--conf", help="Least score; auto: the thresholds stored in the model, else 0.5.")
    ] = "auto",
    classes: Annotated[
        list[str] | None, typer.Option("--classes", help="Only these classes: names, parted by commas.")
    ] = None,
    max_det: Annotated[int, typer.Option("--max-det", help="Most detections in an image.")] = 100,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Images in one run of the network.")] = 1,
    imgsz: Annotated[str | None, typer.Option("--imgsz", help="Input size: 640, or height first 480x640.")] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Use only this many decoder layers.")] = None,
    queries: Annotated[int | None, typer.Option("--queries", help="Use only this many queries.")] = None,
    sampling: Annotated[
        str | None, typer.Option("--sampling", help="bilinear or discrete, for a published file that cannot say.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, or a GPU such as 0.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of the runtime.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Dataset that names a foreign model's classes and numbers the images."),
    ] = None,
    save: Annotated[bool, typer.Option("--save/--no-save", help="Write annotated images and videos.")] = True,
    save_json: Annotated[bool, typer.Option("--save-json", help="Write predictions.jsonl, one line an image.")] = False,
    save_coco: Annotated[bool, typer.Option("--save-coco", help="Write predictions.json, COCO results.")] = False,
    save_txt: Annotated[bool, typer.Option("--save-txt", help="Write labels/NAME.txt, YOLO labels.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write. Default: runs/predict-NN.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document an image on stdout.")] = False,
) -> None:
    """Find objects in images and videos, and write annotated copies.

    An image that cannot be read, or a video that is cut off, does not stop the rest; the exit code is then 1.
    """
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.select import parse_size

    # What can be refused without opening anything is refused first.
    size = parse_size(imgsz) if imgsz else None
    counts = {"max-det": max_det, "batch": batch, "threads": threads, "layers": layers, "queries": queries}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} must be at least 1")
    if sampling not in (None, "bilinear", "discrete"):
        raise UsageError(f"--sampling {sampling} is neither bilinear nor discrete")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, not a folder")
    from rtdetr_cli.infer.selection import parse_conf, select_by
    from rtdetr_cli.infer.sources import find_sources

    parse_conf(conf)
    found = find_sources(sources, sys.stdin)
    model = _model(weights)
    dataset = _Dataset(data) if data is not None else None

    from rtdetr_cli.infer.backend import name_classes, open_backend
    from rtdetr_cli.infer.write import Results, coco_image_ids

    backend = open_backend(
        model, device=device, imgsz=size, layers=layers, queries=queries, sampling=sampling, threads=threads
    )
    if dataset is not None and not backend.header.names:
        name_classes(backend, dataset.names, dataset.category_ids)
    selection = select_by(backend.header, conf=conf, classes=classes, max_det=max_det)

    folder = _folder(out, found if save else []) if save or save_json or save_coco or save_txt else None
    height, width = backend.imgsz
    terminal.say(f"model {model}  {backend.kind} {height}x{width}  {_count(found)}  conf {selection.said}")
    _check_thresholds(model, backend, conf)
    results = None
    tally = _Tally()
    if folder is not None:
        ids = coco_image_ids(found, dataset.image_ids if dataset is not None else None)
        results = Results(
            folder, names=backend.header.names, lines=save_json, coco=save_coco, txt=save_txt, image_ids=ids
        )
    try:
        failed = _predict_all(
            found, backend, selection, results, tally, batch=batch, draw_to=folder if save else None, as_json=as_json
        )
    finally:
        if results is not None:
            results.close()
        if folder is not None and out is None and not any(folder.iterdir()):
            folder.rmdir()  # nothing could be read: leave no empty folder behind
    if folder is not None and len(failed) < len(found):
        terminal.say(f"results in {folder}")
    if tally.empty:
        terminal.say(terminal.paint("hint:", "36") + " " + tally.hint(model, backend))
    if failed and len(found) == 1:
        raise failed[0]
    early = "ends before its time" if tally.cut_off == 1 else "end before their time"
    if failed:
        rest = (
            f", and {tally.cut_off} {early}"
            if tally.cut_off
            else ", the rest are done"
            if len(failed) < len(found)
            else ""
        )
        raise RtdetrError(
            f"{len(failed)} of {_count(found)} could not be read{rest}",
            hint="each is named above",
            code="images-unreadable",
        )
    if tally.cut_off:
        raise RtdetrError(
            f"{tally.cut_off} of {_count([source for source in found if source.video])} {early}",
            hint="what is there is done; copy or fetch the rest again",
            code="video-cut-off",
        )


class _Tally:
    """What all came to: whether anything was found, the best score that was seen, and videos that are cut off."""

    def __init__(self) -> None:
        self.images = self.detections = self.cut_off = 0
        self.best: float | None = None

    def add(self, event: Predicted) -> None:
        self.images += 1
        self.detections += len(event.found)
        if event.best is not None:
            self.best = max(event.best, self.best or 0.0)

    @property
    def empty(self) -> bool:
        """True when images were read and nothing was found in any."""
        return self.images > 0 and not self.detections

    def hint(self, model: Path, backend: Backend) -> str:
        """Say how close it was, and what to do."""
        if self.best is None or self.best < FAINT:
            seen = "no score at all was seen" if self.best is None else f"the best score seen is {self.best:.3f}"
            return f"nothing was found, and {seen}: is it a model for such images, trained for long enough?"
        lower = math.floor(100 * self.best) / 100
        told = f"nothing was found; the best score seen is {self.best:.3f}: --conf {lower:.2f} shows it"
        if model.suffix == ".safetensors" and backend.header.thresholds is None:
            told += ", and rtdetr eval --calibrate f1 finds thresholds that fit the model"
        return told


def _check_thresholds(model: Path, backend: Backend, conf: str) -> None:
    """Warn when the stored thresholds are used at another size, layers or queries than they were found at."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.infer.selection import used_elsewhere

    elsewhere = used_elsewhere(backend.header, backend.imgsz) if conf == "auto" else None
    if elsewhere is None:
        return
    said, flags = elsewhere
    again = f": rtdetr eval {model} {flags} --calibrate f1" if model.suffix == ".safetensors" else ""
    terminal.warn(said + again)


class _Dataset:
    """What a dataset knows that a foreign model or a file name does not."""

    def __init__(self, data: Path) -> None:
        from rtdetr_cli.checks.load import load_splits

        splits = load_splits(data)
        self.names = [category.name for category in splits.categories]
        self.category_ids = [category.id for category in splits.categories]
        self.image_ids: dict[str, int] = {}
        for split in (splits.train, splits.val, splits.test):
            if split is not None:
                names = (Path(file).name for file in split.file_names)
                self.image_ids.update(zip(names, split.image_ids.tolist(), strict=True))


def _model(weights: Path | None) -> Path:
    """Return the model file that is meant; with none named and no run finished, the published one."""
    from rtdetr_cli.cli import select, terminal
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

    terminal.say(f"no finished run lies under runs/: taking the published r18 COCO weights ({FIRST_MODEL})")
    return hub.fetch(FIRST_MODEL, progress=terminal.transfer)


def _folder(out: Path | None, drawn: Sequence[Source]) -> Path:
    """Make the folder of the results; refuse one in which an annotated copy would replace its original."""
    from rtdetr_cli.infer.write import new_folder, saved_name

    if out is None:
        return new_folder(Path("runs"), "predict")
    for source in drawn:
        copy = out / saved_name(source)
        if copy.exists() and source.path.exists() and copy.samefile(source.path):
            raise UsageError(
                f"--out {out} holds {source.path}, which its annotated copy would replace",
                hint="choose another folder, or --no-save",
                code="out-is-source",
            )
    out.mkdir(parents=True, exist_ok=True)
    return out


def _predict_all(
    sources: Sequence[Source],
    backend: Backend,
    selection: Selection,
    results: Results | None,
    tally: _Tally,
    *,
    batch: int,
    draw_to: Path | None,
    as_json: bool,
) -> list[RtdetrError]:
    """Predict everything in the order given, say each result, and return what could not be read."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.infer.job import Predicted, predict_images

    failed: list[RtdetrError] = []

    def fail(error: RtdetrError) -> None:
        failed.append(error)
        if len(sources) > 1:
            terminal.complain(error.message)

    for video, group in groupby(sources, key=lambda source: source.video):
        part = list(group)
        if video:
            for source in part:
                error = _predict_video(source, backend, selection, results, tally, batch, draw_to, as_json)
                if error is not None:
                    fail(error)
            continue
        events = predict_images(part, backend, selection, batch=batch, draw_to=draw_to)
        with closing(events), _progress(len(part), "images", wanted=len(part) > 1) as advance:
            for event in events:
                if isinstance(event, Predicted):
                    tally.add(event)
                    _say(event, results, as_json=as_json)
                else:
                    fail(event.error)
                advance()
    return failed


def _predict_video(
    source: Source,
    backend: Backend,
    selection: Selection,
    results: Results | None,
    tally: _Tally,
    batch: int,
    draw_to: Path | None,
    as_json: bool,
) -> RtdetrError | None:
    """Predict one video; return the error of one that does not open."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.images.decode import ImageError
    from rtdetr_cli.infer.job import predict_video
    from rtdetr_cli.infer.stream import Video

    try:
        video = Video(source.path)
    except ImageError as error:
        return error
    frames, found, start = 0, 0, time.monotonic()
    with video:
        events = predict_video(source, video, backend, selection, batch=batch, draw_to=draw_to)
        with closing(events), _progress(video.frames, source.path.name, wanted=True, lines=as_json) as advance:
            for event in events:
                frames += 1
                tally.add(event)
                found += len(event.found)
                if as_json:
                    _say(event, results, as_json=True)
                elif results is not None:
                    results.add(event.source, event.found, frame=event.frame)
                advance()
    if not as_json:
        rate = frames / max(time.monotonic() - start, 1e-9)
        width, height = video.size_wh
        terminal.out(f"{source.path}  {width}x{height}  {frames} frames  {found} detections  {rate:.1f} frames/s")
    if video.ends_early:
        tally.cut_off += 1
        terminal.warn(f"{source.path} ends after {frames} of {video.frames} frames")
    return None


def _say(event: Predicted, results: Results | None, *, as_json: bool) -> None:
    """Write one image's line to stdout, and its rows to the result files."""
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.infer.write import image_document, json_line, summary

    if results is not None:
        results.add(event.source, event.found, frame=event.frame)
    if as_json:
        terminal.out(json_line(image_document(str(event.source.path), event.found, frame=event.frame)))
    else:
        width, height = event.found.size_wh
        terminal.out(f"{event.source.path}  {width}x{height}  {summary(event.found)}  {1000 * event.seconds:.0f} ms")


@contextmanager
def _progress(total: int | None, what: str, *, wanted: bool, lines: bool = True) -> Iterator[Callable[[], None]]:
    """Show progress, unless the lines of the result are on the same terminal and are progress enough."""
    from rtdetr_cli.cli import terminal

    if not wanted or (lines and terminal.is_terminal(sys.stdout)):
        yield lambda: None
        return
    with terminal.progress(total, what) as bar:
        yield bar.advance


def _count(sources: Sequence[Source]) -> str:
    """Say how many images and videos there are."""
    videos = sum(source.video for source in sources)
    parts = [(len(sources) - videos, "image"), (videos, "video")]
    return " and ".join(f"{n} {word}{'s' if n != 1 else ''}" for n, word in parts if n)
