"""Detections as documents and files: JSON lines, COCO results, YOLO labels, annotated images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rtdetr_cli.files import write_text
from rtdetr_cli.infer.detections import Detections, category_id, class_name
from rtdetr_cli.infer.sources import Source
from rtdetr_cli.text import json_text, printable, whole_number

SCHEMA_VERSION = 1
RESULT_FILES = ("predictions.jsonl", "predictions.json", "labels")
MARKER = ".rtdetr-predict"
"""An empty file in a folder of results: what is in the folder may be replaced by new results."""

# Two runtimes do not agree to more digits than these.
_PIXEL_DIGITS, _SCORE_DIGITS = 2, 5
_SAVED_AS = {".jpg": ".jpg", ".jpeg": ".jpg", ".jpe": ".jpg", ".jfif": ".jpg", ".png": ".png", ".webp": ".webp"}


def image_document(image: str, detections: Detections, *, frame: int | None = None) -> dict[str, Any]:
    """Return the document of one image, or of one frame of a video, as in `rtdetr predict --json`."""
    width, height = detections.size_wh
    document: dict[str, Any] = {"image": image, "width": width, "height": height}
    if frame is not None:
        document["frame"] = frame
    document["detections"] = [
        {
            "label": class_name(detections.names, label),
            "category_id": category_id(detections.category_ids, label),
            "score": round(score, _SCORE_DIGITS),
            "box_xyxy": [round(value, _PIXEL_DIGITS) for value in box],
        }
        for label, score, box in _rows(detections)
    ]
    return document


def json_line(document: Mapping[str, Any]) -> str:
    """Return a document as one line of JSON with the schema's version."""
    return json_text({"schema_version": SCHEMA_VERSION, **document})


def coco_rows(image_id: int | str, detections: Detections) -> list[dict[str, Any]]:
    """Return one image's rows of a COCO results file."""
    return [
        {
            "image_id": image_id,
            "category_id": category_id(detections.category_ids, label),
            "bbox": [round(v, _PIXEL_DIGITS) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, _SCORE_DIGITS),
        }
        for label, score, (x1, y1, x2, y2) in _rows(detections)
    ]


def yolo_lines(detections: Detections, *, scores: bool = False) -> str:
    """Return one image's YOLO label file: label, center, width and height as fractions of the image, then the score."""
    width, height = detections.size_wh
    lines = []
    for label, score, (x1, y1, x2, y2) in _rows(detections):
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        fields = [str(label), *(f"{value:.6f}" for value in (*values, score)[: 5 if scores else 4])]
        lines.append(" ".join(fields) + "\n")
    return "".join(lines)


def _rows(detections: Detections) -> Iterator[tuple[int, float, list[float]]]:
    """Yield label, score and box of each row."""
    columns = (detections.labels, detections.scores, detections.boxes_xyxy_px)
    return zip(*(column.tolist() for column in columns), strict=True)


def saved_name(source: Source) -> str:
    """Return the relative path of an annotated copy: JPEG, PNG and WebP keep their format, others become PNG."""
    suffix = ".mp4" if source.video else _SAVED_AS.get(source.path.suffix.lower(), ".png")
    return str(source.name) + suffix


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
        scores: bool = False,
        image_ids: Mapping[str, int | str] | None = None,
    ) -> None:
        """Open the files in an existing folder; `scores` is for those of `txt`.

        `names` are class names in label order, `image_ids` COCO image ids by the name of the source; the default id is
        that name.
        """
        self.folder, self.names, self.txt, self.scores = folder, tuple(names), txt, scores
        self.image_ids = dict(image_ids or {})
        if lines:
            (folder / "predictions.jsonl").unlink(missing_ok=True)  # which may be a link to a file elsewhere
        self._lines = (folder / "predictions.jsonl").open("x", encoding="utf-8") if lines else None
        self._rows: list[dict[str, Any]] | None = [] if coco else None

    def add(self, source: Source, detections: Detections, *, frame: int | None = None) -> None:
        """Add one image, or one frame of a video."""
        name = str(source.name) if frame is None else f"{source.name}_{frame:06d}"
        if self._lines is not None:
            self._lines.write(json_line(image_document(str(source), detections, frame=frame)) + "\n")
        if self._rows is not None:
            self._rows.extend(coco_rows(self.image_ids.get(name, name), detections))
        if self.txt:
            write_text(self.folder / "labels" / f"{name}.txt", yolo_lines(detections, scores=self.scores))

    def close(self) -> None:
        """Finish the files."""
        if self._lines is not None:
            self._lines.close()
        if self._rows is not None:
            write_text(self.folder / "predictions.json", json.dumps(self._rows))
        if self.txt and self.names:
            write_text(self.folder / "labels" / "classes.txt", "".join(f"{printable(name)}\n" for name in self.names))


def coco_image_ids(sources: Sequence[Source], by_file: Mapping[str, int] | None = None) -> dict[str, int | str]:
    """Return the COCO image id of each source by its name.

    It is the id of the dataset's image of that file name; else the number that the file name is, as in COCO; else the
    name.
    """
    ids: dict[str, int | str] = {}
    for source in sources:
        number = whole_number(source.path.stem)
        ids[str(source.name)] = str(source.name) if number is None else number
    if len(set(ids.values())) < len(ids):  # 7.jpg and 007.jpg, or the same number in two folders
        ids = {name: name for name in ids}
    known = by_file or {}
    return ids | {str(source.name): known[source.path.name] for source in sources if source.path.name in known}
