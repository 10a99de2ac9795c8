"""Detections as documents and files: JSON lines, COCO results, YOLO labels, annotated images and videos."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import RtdetrError
from rtdetr_cli.infer.detections import Detections, category_id
from rtdetr_cli.infer.sources import Source

SCHEMA_VERSION = 1
# Pixels to a hundredth and scores to five digits: finer than any two runtimes agree.
_PIXEL_DIGITS, _SCORE_DIGITS = 2, 5
_SAVED_AS = {".jpg": ".jpg", ".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".png": ".png", ".webp": ".webp"}


def image_document(image: str, found: Detections, *, frame: int | None = None) -> dict[str, Any]:
    """Return the document of one image, as in `rtdetr predict --json`; a frame of a video has its number."""
    document: dict[str, Any] = {"image": image, "width": found.size_wh[0], "height": found.size_wh[1]}
    if frame is not None:
        document["frame"] = frame
    document["detections"] = [
        {
            "label": name,
            "category_id": category_id(found.category_ids, label),
            "score": round(score, _SCORE_DIGITS),
            "box_xyxy": [round(value, _PIXEL_DIGITS) for value in box],
        }
        for name, label, score, box in zip(
            found.class_names,
            found.labels.tolist(),
            found.scores.tolist(),
            found.boxes_xyxy_px.tolist(),
            strict=True,
        )
    ]
    return document


def json_line(document: Mapping[str, Any]) -> str:
    """Return a document as one line of JSON with the schema's version."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file name may hold bytes that are no text


def coco_rows(image_id: int | str, found: Detections) -> list[dict[str, Any]]:
    """Return one image's rows of a COCO results file."""
    return [
        {
            "image_id": image_id,
            "category_id": category_id(found.category_ids, label),
            "bbox": [round(v, _PIXEL_DIGITS) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, _SCORE_DIGITS),
        }
        for label, score, (x1, y1, x2, y2) in zip(
            found.labels.tolist(), found.scores.tolist(), found.boxes_xyxy_px.tolist(), strict=True
        )
    ]


def yolo_lines(found: Detections) -> str:
    """Return one image's YOLO label file: label, centre, width and height as fractions of the image."""
    width, height = found.size_wh
    lines = []
    for label, (x1, y1, x2, y2) in zip(found.labels.tolist(), found.boxes_xyxy_px.tolist(), strict=True):
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values)]) + "\n")
    return "".join(lines)


def summary(found: Detections) -> str:
    """Say what is in an image in a few words: `3 person, 1 car`, most frequent first."""
    counts: dict[str, int] = {}
    for name in found.class_names:
        counts[name] = counts.get(name, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{number} {name}" for name, number in ranked) or "nothing found"


def saved_name(source: Source) -> str:
    """Return the relative path of an annotated copy: JPEG, PNG and WebP keep their kind, other images become PNG."""
    suffix = ".mp4" if source.video else _SAVED_AS.get(source.path.suffix.lower(), ".png")
    return str(source.name) + suffix


def save_image(image: NDArray[np.uint8], path: Path) -> None:
    """Write an annotated image, whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    # Thin coloured lines and small letters suffer from JPEG's usual halving of colour.
    options: dict[str, Any] = {".jpg": {"quality": 92, "subsampling": 0}, ".webp": {"quality": 90}}.get(path.suffix, {})
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix]
    with Aside(path) as aside:
        Image.fromarray(image).save(aside, format=kind, **options)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")


class Aside:
    """A path to write to, renamed to the real one when all went well and removed when not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(f".{path.stem}.part{path.suffix}")

    def __enter__(self) -> Path:
        return self.aside

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            os.replace(self.aside, self.path)
        else:
            self.aside.unlink(missing_ok=True)


class VideoFile:
    """A video written frame by frame, under its real name once it is whole."""

    def __init__(self, path: Path, *, size_wh: tuple[int, int], rate: float) -> None:
        """Start a file.

        Args:
            path: the `.mp4` to write.
            size_wh: width and height of every frame in pixels.
            rate: frames a second.

        Raises:
            RtdetrError: OpenCV cannot write it.
        """
        import cv2

        path.parent.mkdir(parents=True, exist_ok=True)
        self._guard = Aside(path)
        self._writer = cv2.VideoWriter(str(self._guard.aside), cv2.VideoWriter.fourcc(*"mp4v"), rate, size_wh)
        if not self._writer.isOpened():
            self._guard.aside.unlink(missing_ok=True)
            raise RtdetrError(f"{path} cannot be written as a video", code="video-write")

    def add(self, frame: NDArray[np.uint8]) -> None:
        """Add one (H, W, 3) RGB frame."""
        self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._writer.release()
        self._guard.__exit__(kind, *rest)


def new_folder(parent: Path, stem: str) -> Path:
    """Make and return the first of `stem-01`, `stem-02`, ... that does not exist."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{stem}-{number:02d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


class Results:
    """The result files of a prediction, fed image by image: `predictions.jsonl`, `predictions.json`, `labels/`.

    JSON lines are written as they come, so that a long run that is stopped leaves what it had; the COCO file is one
    document and written whole at the end.
    """

    def __init__(
        self,
        folder: Path,
        *,
        names: Sequence[str],
        lines: bool = False,
        coco: bool = False,
        txt: bool = False,
        image_ids: Mapping[str, int | str] | None = None,
    ) -> None:
        """Say what is wanted.

        Args:
            folder: exists.
            names: class names in label order, for `labels/classes.txt`.
            lines: write `predictions.jsonl`.
            coco: write `predictions.json`.
            txt: write `labels/NAME.txt`.
            image_ids: COCO ids by the name of a source; the name itself for others.
        """
        self.folder, self.names, self.txt = folder, tuple(names), txt
        self.image_ids = dict(image_ids or {})
        self._lines = (folder / "predictions.jsonl").open("w", encoding="utf-8") if lines else None
        self._rows: list[dict[str, Any]] | None = [] if coco else None

    def add(self, source: Source, found: Detections, *, frame: int | None = None) -> None:
        """Take one image, or one frame of a video."""
        name = str(source.name) if frame is None else f"{source.name}_{frame:06d}"
        if self._lines is not None:
            self._lines.write(json_line(image_document(str(source.path), found, frame=frame)) + "\n")
        if self._rows is not None:
            self._rows.extend(coco_rows(self.image_ids.get(name, name), found))
        if self.txt:
            write_text(self.folder / "labels" / f"{name}.txt", yolo_lines(found))

    def close(self) -> None:
        """Finish the files."""
        if self._lines is not None:
            self._lines.close()
        if self._rows is not None:
            write_text(self.folder / "predictions.json", json.dumps(self._rows))
        if self.txt and self.names:
            write_text(self.folder / "labels" / "classes.txt", "".join(f"{name}\n" for name in self.names))


def coco_image_ids(sources: Sequence[Source], by_file: Mapping[str, int] | None = None) -> dict[str, int | str]:
    """Return the COCO image id of each source by its name.

    From a dataset by file name where it is known; else the number that COCO's file names are; else the name.
    """
    ids: dict[str, int | str] = {}
    for source in sources:
        stem = source.path.stem
        ids[str(source.name)] = int(stem) if stem.isascii() and stem.isdecimal() else str(source.name)
    if len(set(ids.values())) < len(ids):  # 7.jpg and 007.jpg, or the same number in two folders
        ids = {name: name for name in ids}
    for source in sources:
        if by_file and source.path.name in by_file:
            ids[str(source.name)] = by_file[source.path.name]
    return ids
