"""Read Pascal VOC: one XML file an image, and lists of names for the splits.

Coordinates are taken as they are written, as edges in pixels. Some tools count pixels from 1, some from 0, and
nothing in the file says which; the difference is at most one pixel.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from rtdetr_cli.datasets.coco import sound_name
from rtdetr_cli.datasets.findings import Findings, Spot
from rtdetr_cli.datasets.kept import Kept, KeptBox, read_kept
from rtdetr_cli.datasets.label_text import Oddities, read_text
from rtdetr_cli.datasets.raw import RawDataset, Rows
from rtdetr_cli.datasets.records import Category
from rtdetr_cli.images.decode import IMAGE_SUFFIXES
from rtdetr_cli.text import counted

_OBJECT = re.compile(r"<object[\s>/]")
_COLUMN = re.compile(r"(.*\S)\s+-?[01]")
_MAX_DEPTH = 64
_NOTHING = KeptBox()
CLASS_LISTS = ("classes.txt", "labels.txt", "class_names.txt")


@dataclass(slots=True)
class VocSplit:
    """One split on disk: its list (or None), and for each image the XML file and what the image may be called.

    Attributes:
        names: names without suffix, in order.
        xml_folder: where `<name>.xml` lies.
        images_folder: where the images lie.
    """

    list_file: Path | None
    names: list[str]
    xml_folder: Path
    images_folder: Path


def read_voc(dataset: RawDataset, splits: dict[str, VocSplit]) -> None:
    """Read every split's XML files into `dataset`; classes are those of a class list, or sorted by name."""
    oddities = Oddities()
    parsed: dict[str, list[tuple[str, str, Element | None, str]]] = {}
    for split, on_disk in splits.items():
        listing = _listing(on_disk.xml_folder)
        entries: list[tuple[str, str, Element | None, str]] = []
        for name in on_disk.names:
            path = on_disk.xml_folder / f"{name}.xml"
            shown = dataset.show(path)
            dataset.label_paths[shown] = path
            if listing is not None and f"{Path(name).name}.xml" not in listing and not path.is_file():
                entries.append((name, "", None, ""))
                continue
            text = read_text(path, shown, dataset.findings, oddities)
            root = _parse(text, shown, dataset.findings) if text is not None else None
            # A file that cannot be read is not the same as none: its image has been named in an error already.
            entries.append((name, shown, root, text or ""))
        parsed[split] = entries
    listed = _class_list(dataset, oddities)
    classes = listed if listed is not None else _classes(parsed)
    kept = read_kept(dataset, dataset.folder, oddities)
    oddities.report(dataset.findings)
    if kept.categories and set(_classes(parsed)) <= {name for _, name in kept.categories}:
        dataset.categories = tuple(Category(i, name) for i, name in sorted(kept.categories))
    else:
        dataset.categories = tuple(Category(i, name) for i, name in enumerate(classes, 1))
    labels = {category.name: label for label, category in enumerate(dataset.categories)}
    first = 1
    for split, on_disk in splits.items():
        rows = _split(dataset, split, on_disk, parsed[split], labels, kept, first)
        dataset.splits[split] = rows.split(split, on_disk.images_folder)
        first += len(on_disk.names)
    _orphans(dataset, splits)


def _orphans(dataset: RawDataset, splits: dict[str, VocSplit]) -> None:
    """Say which XML files belong to no split and to no image."""
    listed: dict[Path, set[str]] = {}
    stems: dict[Path, set[str]] = {}
    for on_disk in splits.values():
        listed.setdefault(on_disk.xml_folder, set()).update(on_disk.names)
        images = _listing(on_disk.images_folder) or set()
        stems.setdefault(on_disk.xml_folder, set()).update(Path(p).stem for p in images if is_image(p))
    for folder, names in listed.items():
        for file in sorted(_listing(folder) or ()):
            stem = file[:-4]
            if file.endswith(".xml") and stem not in names and stem not in stems[folder]:
                dataset.findings.add("label-orphan", "has no image", file=dataset.show(folder / file))


def listed_name(line: str, known: Container[str]) -> str:
    """Return the name that a line of a list holds.

    Args:
        line: may end in a second column (1, 0, -1: is a class present?), which the lists of one class have.
        known: names as they may be, with spaces in them.
    """
    whole = line.strip()
    column = _COLUMN.fullmatch(whole) if whole not in known else None
    return column[1] if column else whole


def is_image(name: str) -> bool:
    """Tell by its suffix whether a file counts as an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _listing(folder: Path) -> set[str] | None:
    try:
        return {entry.name for entry in folder.iterdir()}
    except OSError:
        return None


def _parse(text: str, shown: str, findings: Findings) -> Element | None:
    if text.count("<") > 4_000_000:
        findings.add("file-bounds", "has more than four million marks", file=shown)
        return None
    try:
        root: Element = ElementTree.fromstring(text)
    except ParseError as error:
        findings.add(
            "file-malformed", f"is no valid XML: {str(error).split(':')[0]}", file=shown, line=error.position[0]
        )
        return None
    except DefusedXmlException as error:
        findings.add("file-malformed", f"holds XML that a label file must not ({type(error).__name__})", file=shown)
        return None
    except (ValueError, RecursionError, LookupError) as error:
        findings.add("file-malformed", f"is no valid XML: {error}", file=shown, line=1)
        return None
    if _too_deep(root):
        findings.add("file-bounds", "is nested too deeply", file=shown)
        return None
    if root.tag != "annotation":
        findings.add("file-malformed", f"holds <{root.tag}> in place of <annotation>", file=shown, line=1)
        return None
    return root


def _too_deep(root: Element) -> bool:
    level = [root]
    for _ in range(_MAX_DEPTH):
        level = [child for element in level for child in element]
        if not level:
            return False
    return True


def _class_list(dataset: RawDataset, oddities: Oddities) -> list[str] | None:
    """Return the classes of a class list beside the data, where there is one."""
    for file in CLASS_LISTS:
        path = dataset.folder / file
        if path.is_file():
            text = read_text(path, dataset.show(path), dataset.findings, oddities)
            names = [line.strip() for line in (text or "").splitlines() if line.strip()]
            dataset.label_paths[dataset.show(path)] = path
            if names:
                return list(dict.fromkeys(names))
    return None


def _classes(parsed: dict[str, list[tuple[str, str, Element | None, str]]]) -> list[str]:
    found = {
        _text(element, "name")
        for entries in parsed.values()
        for _, _, root, _ in entries
        if root is not None
        for element in root.iterfind("object")
    }
    return sorted(name for name in found if sound_name(name))


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _integer(element: Element, path: str) -> int | None:
    text = _text(element, path)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _split(
    dataset: RawDataset,
    split: str,
    on_disk: VocSplit,
    entries: list[tuple[str, str, Element | None, str]],
    labels: dict[str, int],
    kept: Kept,
    first_id: int,
) -> Rows:
    findings = dataset.findings
    rows = Rows()
    on_folder = _listing(on_disk.images_folder) or set()
    stems: dict[str, str] = {}
    for file in sorted(on_folder):
        suffix = Path(file).suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            stems.setdefault(file[: -len(suffix)], file)
    folders: dict[str, list[tuple[str, int]]] = {}
    difficult: list[str] = []
    for position, (name, shown, root, text) in enumerate(entries):
        declared = _text(root, "filename") if root is not None else ""
        file_name = stems.get(name)
        if file_name is None:
            file_name = declared if Path(declared).stem == Path(name).name and sound_name(declared) else f"{name}.jpg"
        elif declared and declared != file_name and Path(declared).name != file_name:
            findings.add(
                "voc-filename",
                f"says <filename>{declared}</filename>, but its image is {file_name}",
                file=shown,
                line=_line(text, "<filename"),
                spot=Spot(split, position),
            )
        size = (0, 0)
        identifier, facts = kept.image(split, name)
        if root is not None:
            size = (_integer(root, "size/width") or 0, _integer(root, "size/height") or 0)
            if not (0 < size[0] < 1 << 31 and 0 < size[1] < 1 << 31):
                size = (0, 0)
            folder = _text(root, "folder")
            if folder and Path(folder).name != on_disk.images_folder.name:
                folders.setdefault(folder, []).append((shown, position))
        elif not shown:
            findings.add(
                "label-missing",
                f"{file_name} has no XML file ({dataset.show(on_disk.xml_folder / name)}.xml)",
                file=dataset.show(on_disk.images_folder / file_name),
                image_id=first_id + position,
                spot=Spot(split, position),
            )
        image = rows.add_image(
            file_name,
            image_id=first_id + position if identifier is None else identifier,
            size_wh=size,
            label_file=shown,
        )
        if root is None:
            continue
        lines = _object_lines(text)
        objects = root.findall("object")
        if len(lines) != len(objects):
            lines = [0] * len(objects)
        for entry, element in enumerate(objects):
            own = facts[entry] if len(facts) == len(objects) else _NOTHING
            spot = Spot(split, image, entry)
            _object(findings, rows, image, element, entry, lines[entry], labels, own, spot, shown)
            if _text(element, "difficult") == "1":
                difficult.append(shown)
    if len(set(rows.image_ids)) != len(rows.image_ids):
        rows.image_ids = list(range(first_id, first_id + len(rows.image_ids)))
    for folder, files in folders.items():
        others = len(files) - 1
        more = f", and {others:,} more do" if others > 1 else ", and one more does" if others else ""
        findings.add(
            "voc-folder",
            f"says <folder>{folder}</folder>{more}; images are taken from {on_disk.images_folder.name}",
            file=files[0][0],
            spot=Spot(split, files[0][1]),
        )
    if difficult:
        verb = "is" if len(difficult) == 1 else "are"
        said = f"{counted(len(difficult), 'object')} of {split} {verb} marked difficult"
        findings.add("box-difficult", said, file=difficult[0])
    return rows


def _object(
    findings: Findings,
    rows: Rows,
    image: int,
    element: Element,
    entry: int,
    line: int,
    labels: dict[str, int],
    kept: KeptBox,
    spot: Spot,
    shown: str,
) -> None:
    where: dict[str, Any] = {"file": shown, "line": line, "image_id": rows.image_ids[image], "spot": spot}
    name = _text(element, "name")
    label = labels.get(name)
    box = element.find("bndbox")
    if box is None:
        findings.add("box-count", f"object {entry + 1} has no <bndbox>", **where)
        return
    corners = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        elements = box.findall(side)
        if len(elements) != 1:
            findings.add("box-count", f"object {entry + 1} has {len(elements)} <{side}> in its box", **where)
            return
        written = (elements[0].text or "").strip()
        try:
            corners.append(float(written))
        except ValueError:
            findings.add("box-not-number", f"object {entry + 1} has {written[:40]!r} as its <{side}>", **where)
            return
    if label is None:
        findings.add(
            "category-unknown",
            f"object {entry + 1} is a {name[:60]!r}, which is not in the class list"
            if name
            else f"object {entry + 1} has no <name>",
            **where,
        )
        return
    width, height = rows.sizes_wh[image]
    rows.add_box(
        image,
        (corners[0], corners[1], corners[2], corners[3]),
        label,
        line=line,
        entry=entry,
        area=kept.area_share * width * height if width and height else float("nan"),
        crowd=kept.crowd,
        annotation_id=kept.annotation_id,
    )


def _line(text: str, mark: str) -> int:
    position = text.find(mark)
    return text.count("\n", 0, position) + 1 if position >= 0 else 0


def _object_lines(text: str) -> list[int]:
    lines, line, last = [], 1, 0
    for match in _OBJECT.finditer(text):
        line += text.count("\n", last, match.start())
        last = match.start()
        lines.append(line)
    return lines
