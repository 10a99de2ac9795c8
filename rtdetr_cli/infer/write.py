"""Detections as documents and files: JSON lines, COCO results, YOLO labels, annotated images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.files import atomic_write
from rtdetr_cli.infer.detections import Detections, category_id
from rtdetr_cli.infer.sources import Source

SCHEMA_VERSION = 1
# Two runtimes do not agree to more digits than these.
_PIXEL_DIGITS, _SCORE_DIGITS = 2, 5
_SAVED_AS = {".jpg": ".jpg", ".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".png": ".png", ".webp": ".webp"}
# JPEG's usual chroma subsampling blurs thin coloured lines and small letters.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    ".jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
    ".png": {"format": "PNG"},
    ".webp": {"format": "WEBP", "quality": 90},
}


def image_document(image: str, detections: Detections, *, frame: int | None = None) -> dict[str, Any]:
    """Return the document of one image, or of one frame of a video, as in `rtdetr predict --json`."""
    width, height = detections.size_wh
    document: dict[str, Any] = {"image": image, "width": width, "height": height}
    if frame is not None:
        document["frame"] = frame
    document["detections"] = [
        {
            "label": name,
            "category_id": category_id(detections.category_ids, label),
            "score": round(score, _SCORE_DIGITS),
            "box_xyxy": [round(value, _PIXEL_DIGITS) for value in box],
        }
        for name, label, score, box in zip(
            detections.class_names,
            detections.labels.tolist(),
            detections.scores.tolist(),
            detections.boxes_xyxy_px.tolist(),
            strict=True,
        )
    ]
    return document


def json_line(document: Mapping[str, Any]) -> str:
    """Return a document as one line of JSON with the schema's version."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **document}, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace").decode("utf-8")  # a file name can hold bytes that are not UTF-8


def coco_rows(image_id: int | str, detections: Detections) -> list[dict[str, Any]]:
    """Return one image's rows of a COCO results file."""
    return [
        {
            "image_id": image_id,
            "category_id": category_id(detections.category_ids, label),
            "bbox": [round(v, _PIXEL_DIGITS) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, _SCORE_DIGITS),
        }
        for label, score, (x1, y1, x2, y2) in zip(
            detections.labels.tolist(), detections.scores.tolist(), detections.boxes_xyxy_px.tolist(), strict=True
        )
    ]


def yolo_lines(detections: Detections) -> str:
    """Return one image's YOLO label file: label, centre, width and height as fractions of the image."""
    width, height = detections.size_wh
    lines = []
    for label, (x1, y1, x2, y2) in zip(detections.labels.tolist(), detections.boxes_xyxy_px.tolist(), strict=True):
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(label), *(f"{value:.6f}" for value in values)]) + "\n")
    return "".join(lines)


def summary(detections: Detections) -> str:
    """Return the number of objects of each class, most frequent first: `3 person, 1 car`."""
    counts = Counter(detections.class_names)
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "no detections"


def saved_name(source: Source) -> str:
    """Return the relative path of an annotated copy: JPEG, PNG and WebP keep their format, others become PNG."""
    suffix = ".mp4" if source.video else _SAVED_AS.get(source.path.suffix.lower(), ".png")
    return str(source.name) + suffix


def save_image(image: NDArray[np.uint8], path: Path) -> None:
    """Write an annotated image."""
    from PIL import Image

    with atomic_write(path) as temporary:
        Image.fromarray(image).save(temporary, **_SAVE_OPTIONS[path.suffix])


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def new_folder(parent: Path, stem: str) -> Path:
    """Create and return the first of `stem-01`, `stem-02`, ... that does not exist."""
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
    """The result files of a prediction: `predictions.jsonl`, `predictions.json` and `labels/`.

    JSON lines are written one by one, so an interrupted run keeps them; the COCO file is written at the end.
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
        """Open the files.

        Args:
            folder: an existing folder.
            names: class names in label order, for `labels/classes.txt`.
            lines: write `predictions.jsonl`.
            coco: write `predictions.json`.
            txt: write `labels/NAME.txt`.
            image_ids: COCO image ids by the name of the source; the default id is the name.
        """
        self.folder, self.names, self.txt = folder, tuple(names), txt
        self.image_ids = dict(image_ids or {})
        self._lines = (folder / "predictions.jsonl").open("w", encoding="utf-8") if lines else None
        self._rows: list[dict[str, Any]] | None = [] if coco else None

    def add(self, source: Source, detections: Detections, *, frame: int | None = None) -> None:
        """Add one image, or one frame of a video."""
        name = str(source.name) if frame is None else f"{source.name}_{frame:06d}"
        if self._lines is not None:
            self._lines.write(json_line(image_document(str(source.path), detections, frame=frame)) + "\n")
        if self._rows is not None:
            self._rows.extend(coco_rows(self.image_ids.get(name, name), detections))
        if self.txt:
            _write_text(self.folder / "labels" / f"{name}.txt", yolo_lines(detections))

    def close(self) -> None:
        """Finish the files."""
        if self._lines is not None:
            self._lines.close()
        if self._rows is not None:
            _write_text(self.folder / "predictions.json", json.dumps(self._rows))
        if self.txt and self.names:
            _write_text(self.folder / "labels" / "classes.txt", "".join(f"{name}\n" for name in self.names))


def coco_image_ids(sources: Sequence[Source], by_file: Mapping[str, int] | None = None) -> dict[str, int | str]:
    """Return the COCO image id of each source by its name.

    It is the id of the dataset's image of that file name; else the number that the file name is, as in COCO; else the
    name.
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
