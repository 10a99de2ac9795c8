"""Read and write Pascal VOC: one XML file per image, and lists of names for the splits.

Coordinates are read as they are written, as edges in pixels. Some tools count pixels from 1 and some from 0, and the
file doesn't say which; the difference is at most one pixel.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, ParseError, SubElement, TreeBuilder, indent, tostring

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from rtdetr_cli.datasets.findings import Findings
from rtdetr_cli.datasets.ids_file import BoxFacts, IdsFile, image_facts, read_ids, write_ids
from rtdetr_cli.datasets.image_names import copy_image, image_names
from rtdetr_cli.datasets.json_text import line_of, lines_of
from rtdetr_cli.datasets.label_text import is_valid_name
from rtdetr_cli.datasets.layouts import Layout
from rtdetr_cli.datasets.raw import RawBox, RawDataset, Rows
from rtdetr_cli.datasets.records import Category, Dataset, Spot
from rtdetr_cli.datasets.survey import is_image
from rtdetr_cli.text import counted, whole_number

CLASS_LISTS = ("classes.txt", "labels.txt", "class_names.txt")
SIDES = ("xmin", "ymin", "xmax", "ymax")
_OBJECT = re.compile(r"<object[\s>/]")
_COLUMN = re.compile(r"(.*\S)\s+-?[01]")
_MAX_DEPTH = 64
_MAX_TAGS = 4_000_000


@dataclass(slots=True)
class _LabelFile:
    """The label file of one image: its path for people, its text, and its root; all empty if there is no such file.

    `image` has no suffix if there is no such image.
    """

    image: str
    file: str = ""
    text: str = ""
    root: Element | None = None


def read_voc(dataset: RawDataset, layout: Layout) -> None:
    """Read every split's XML files into `dataset`; classes come from a class list, or are sorted by name."""
    files: dict[str, list[_LabelFile]] = {}
    for split, images in layout.splits.items():
        files[split] = [_LabelFile(image) for image in images]
        for label in files[split]:
            if (path := layout.labels.get(label.image)) is not None:
                label.file, text = dataset.read_label(path)
                if text is not None:
                    label.text, label.root = text, _parse(text, label.file, dataset.findings)
    names = _used_classes(files)
    listed = _class_list(dataset)
    ids = read_ids(dataset, dataset.folder)
    dataset.oddities.report(dataset.findings)
    if ids.categories and set(names) <= {name for _, name in ids.categories}:
        dataset.categories = tuple(Category(i, name) for i, name in sorted(ids.categories))
    else:
        classes = names if listed is None else listed
        dataset.categories = tuple(Category(i, name) for i, name in enumerate(classes, 1))
    for split, labels in files.items():
        _SplitReader(dataset, split, _move_to_folder(labels, layout.root), ids).read(labels)


def _move_to_folder(labels: list[_LabelFile], root: Path) -> Path:
    """Name the images relative to their folder if they share one, and return the folder that their names start from."""
    folders = {label.image.rpartition("/")[0] for label in labels if is_image(label.image)}
    if len(folders) != 1:
        return root
    (folder,) = folders
    for label in labels:
        label.image = label.image.removeprefix(f"{folder}/")
    return root / folder


def listed_name(line: str, known: Container[str]) -> str:
    """Return the name in a line of a list.

    Args:
        line: may end in the suffix of an image, or in a second column (1, 0, -1: whether a class is present).
        known: possible names, with spaces in them.
    """
    name = line.strip()
    column = _COLUMN.fullmatch(name) if name not in known else None
    name = column[1] if column else name
    stem = name[: len(name) - len(Path(name).suffix)]
    return stem if name not in known and is_image(name) and stem in known else name


def _parse(text: str, file: str, findings: Findings) -> Element | None:
    code, line = "file-malformed", 0
    try:
        root: Element | None = ElementTree.fromstring(text) if text.count("<") <= _MAX_TAGS else None
        if root is None:
            code, message = "file-bounds", "has more than four million tags"
        elif _too_deep(root):
            code, message = "file-bounds", "is nested too deeply"
        elif root.tag != "annotation":
            message, line = f"contains <{root.tag}> instead of <annotation>", 1
        else:
            return root
    except ParseError as error:
        message, line = f"is not valid XML: {str(error).split(':')[0]}", error.position[0]
    except DefusedXmlException as error:
        message = f"contains XML that is not allowed ({type(error).__name__})"
    except (ValueError, RecursionError, LookupError) as error:
        message, line = f"is not valid XML: {error}", 1
    findings.add(code, message, file=file, line=line)
    return None


def _too_deep(root: Element) -> bool:
    level = [root]
    for _ in range(_MAX_DEPTH):
        level = [child for element in level for child in element]
        if not level:
            return False
    return True


def _class_list(dataset: RawDataset) -> list[str] | None:
    """Return the classes of a class list in the dataset's folder, if there is one."""
    for file in CLASS_LISTS:
        path = dataset.folder / file
        if path.is_file():
            _, text = dataset.read_label(path)
            names = [line.strip() for line in (text or "").splitlines() if line.strip()]
            if names:
                return list(dict.fromkeys(names))
    return None


def _used_classes(files: dict[str, list[_LabelFile]]) -> list[str]:
    names = {
        _text(element, "name")
        for entries in files.values()
        for label in entries
        if label.root is not None
        for element in label.root.iterfind("object")
    }
    return sorted(name for name in names if is_valid_name(name))


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _integer(element: Element, path: str) -> int:
    return whole_number(_text(element, path)) or 0


class _SplitReader(Rows):
    """Reads the images and boxes of one split."""

    def __init__(self, dataset: RawDataset, split: str, root: Path, ids: IdsFile) -> None:
        super().__init__(dataset, split)
        self.root, self.ids, self.findings = root, ids, dataset.findings
        self.labels = {category.name: label for label, category in enumerate(dataset.categories)}
        self.folders: dict[tuple[str, str], list[tuple[str, int]]] = {}
        self.difficult: list[str] = []

    def read(self, labels: list[_LabelFile]) -> None:
        """Read all images, and add the split to the dataset."""
        for position, label in enumerate(labels):
            self._image(position, label)
        self.finish(self.root)
        for (folder, actual), places in self.folders.items():
            others = len(places) - 1
            more = f" (and {others:,} more)" if others else ""
            message = f"has <folder>{folder}</folder>{more}, but images are read from {actual}"
            self.findings.add("voc-folder", message, file=places[0][0], spot=Spot(self.split, places[0][1]))
        if self.difficult:
            verb = "is" if len(self.difficult) == 1 else "are"
            message = f"{counted(len(self.difficult), 'object')} of {self.split} {verb} marked difficult"
            self.findings.add("box-difficult", message, file=self.difficult[0])

    def _image(self, position: int, label: _LabelFile) -> None:
        file_name, root = label.image, label.root
        stem = file_name.removesuffix(PurePosixPath(file_name).suffix) if is_image(file_name) else file_name
        declared = _text(root, "filename") if root is not None else ""
        if stem == file_name:
            usable = Path(declared).stem == Path(stem).name and is_valid_name(declared)
            file_name = declared if usable else f"{stem}.jpg"
        elif declared and declared.replace("\\", "/").rpartition("/")[2] != Path(file_name).name:
            message = f"has <filename>{declared}</filename>, but its image is {file_name}"
            line, spot = line_of(label.text, label.text.find("<filename")), Spot(self.split, position)
            self.findings.add("voc-filename", message, file=label.file, line=line, spot=spot)
        size = (0, 0)
        if root is not None:
            size = (_integer(root, "size/width"), _integer(root, "size/height"))
            folder = _text(root, "folder")
            actual = (self.root / file_name).parent.name
            if folder and folder.replace("\\", "/").rstrip("/").rpartition("/")[2] != actual:
                self.folders.setdefault((folder, actual), []).append((label.file, position))
        image_id, facts = self.ids.image(self.split, stem)
        image = self.add_image(file_name, label_file=label.file, size_wh=size, image_id=image_id)
        if not label.file:
            file = self.dataset.show(self.root / file_name)
            self.report("label-missing", f"{file_name} has no XML file", image, file=file)
        objects = root.findall("object") if root is not None else []
        lines = lines_of(label.text, array("q", (match.start() for match in _OBJECT.finditer(label.text)))).tolist()
        for entry, element in enumerate(objects):
            line = lines[entry] if len(lines) == len(objects) else 0
            box_facts = facts[entry] if len(facts) == len(objects) else BoxFacts()
            self._object(image, element, entry, line, box_facts)
            if _text(element, "difficult") == "1":
                self.difficult.append(label.file)

    def _object(self, image: int, element: Element, entry: int, line: int, facts: BoxFacts) -> None:
        def report(code: str, message: str) -> None:
            self.report(code, f"object {entry + 1} {message}", image, entry=entry, line=line)

        bounds = element.find("bndbox")
        if bounds is None:
            report("box-count", "has no <bndbox>")
            return
        corners = []
        for side in SIDES:
            elements = bounds.findall(side)
            if len(elements) != 1:
                report("box-count", f"has {len(elements)} <{side}> in its box")
                return
            text = (elements[0].text or "").strip()
            try:
                corners.append(float(text))
            except ValueError:
                report("box-not-number", f"has {text[:40]!r} as its <{side}>")
                return
        name = _text(element, "name")
        label = self.labels.get(name)
        if label is None:
            report(
                "category-unknown",
                f"has the class {name[:60]!r}, which is not in the class list" if name else "has no <name>",
            )
            return
        width, height = self.sizes_wh[image]
        area = facts.area_fraction * width * height if width and height else math.nan
        box = (corners[0], corners[1], corners[2], corners[3])
        self.boxes.append(RawBox(image, box, label, line, entry, area, facts.crowd, facts.annotation_id))


# ---- writing


def write_voc(parts: dict[str, Dataset], to: Path) -> Path:
    """Write every split as images, label files and a list; return what to train on."""
    used: set[str] = set()
    lists = to / "ImageSets" / "Main"
    for folder in (to / "Annotations", to / "JPEGImages", lists):
        folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, dict[str, Any]] = {}
    dataset = next(iter(parts.values()))
    for split, dataset in parts.items():
        facts[split] = {}
        for index, name in enumerate(image_names(dataset, flat=True, stems=True, used=used)):
            stem = name[: len(name) - len(PurePosixPath(name).suffix)]
            copy_image(dataset, index, to / "JPEGImages" / name)
            rows = dataset.annotations(index)
            boxes = [
                (dataset.categories[label].name, corners)
                for corners, label in zip(rows.boxes_xyxy_px.tolist(), rows.labels.tolist(), strict=True)
            ]
            root = label_xml(name, dataset.sizes_wh[index].tolist(), boxes, folder="JPEGImages")
            (to / "Annotations" / f"{stem}.xml").write_text(format_xml(root), "utf-8")
            facts[split][stem] = image_facts(dataset, index)
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in facts[split]), "utf-8")
    write_ids(to, facts, categories=[[c.id, c.name] for c in dataset.categories])
    return to


def label_xml(
    file_name: str, size_wh: Sequence[int], boxes: Sequence[tuple[str, Sequence[float]]], *, folder: str = ""
) -> Element:
    """Return the label file of an image; `boxes` are class names with corners, all in pixels."""
    root = Element("annotation")
    if folder:
        _add(root, folder=folder)
    _add(root, filename=file_name)
    _add(SubElement(root, "size"), width=str(size_wh[0]), height=str(size_wh[1]), depth="3")
    _add(root, segmented="0")
    for name, corners in boxes:
        element = SubElement(root, "object")
        _add(element, name=name, pose="Unspecified", truncated="0", difficult="0")
        values = {side: f"{value:.10g}" for side, value in zip(SIDES, corners, strict=True)}
        _add(SubElement(element, "bndbox"), **values)
    return root


def _add(parent: Element, **texts: str) -> None:
    for tag, text in texts.items():
        SubElement(parent, tag).text = text


def format_xml(root: Element, *, declaration: bool = False) -> str:
    """Return XML with one element per line."""
    indent(root, "\t")
    head = '<?xml version="1.0" encoding="utf-8"?>\n' if declaration else ""
    return head + tostring(root, "unicode").rstrip() + "\n"


def parse_keeping_comments(text: str) -> Element:
    """Parse a label file that was read before, with its comments."""
    parser = ElementTree.XMLParser(target=TreeBuilder(insert_comments=True, insert_pis=True))
    parser.feed(text)
    root: Element = parser.close()
    return root
