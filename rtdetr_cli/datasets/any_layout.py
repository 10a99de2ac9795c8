"""Read the label files of a surveyed folder wherever they lie, or say what is there instead."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rtdetr_cli.datasets.coco import read_coco
from rtdetr_cli.datasets.coco_files import ROBOFLOW_FILE, choose_coco_files
from rtdetr_cli.datasets.csv_boxes import read_csv
from rtdetr_cli.datasets.data_yaml import DataYaml
from rtdetr_cli.datasets.image_paths import index_images, split_of, split_of_parts
from rtdetr_cli.datasets.label_text import CLASS_LISTS
from rtdetr_cli.datasets.labelme import read_labelme
from rtdetr_cli.datasets.layouts import DATA_YAMLS, Layout, label_kinds, pair_files, read_list
from rtdetr_cli.datasets.raw import RawDataset, new_dataset
from rtdetr_cli.datasets.survey import Survey, edges, other_format, survey
from rtdetr_cli.datasets.voc import read_voc
from rtdetr_cli.datasets.yolo import read_yolo, read_yolo_files
from rtdetr_cli.errors import DataError
from rtdetr_cli.text import abbreviate, counted, printable, whole_number

_TITLES = {
    "voc": "Pascal VOC",
    "yolo": "YOLO",
    "yaml": "YOLO",
    "labelme": "Labelme",
    "coco": "COCO",
    "csv": "CSV",
}
_NEAREST = {
    "xml": "the XML files have no <annotation> element as in Pascal VOC",
    "json": "no JSON file has the images and annotations of COCO, or the shapes of Labelme",
    "csv": "no CSV file has columns such as filename,class,xmin,ymin,xmax,ymax",
    "txt": "the text files have no lines `class cx cy w h` as in YOLO",
}
"""Why files of each suffix are not labels."""

_MAX_CLASSES = 10_000
_PAIR = re.compile(r"^\s*(\w+)\s*=\s*(.*?)\s*$", re.MULTILINE)


def read_any_layout(source: Path, found: Survey, images: Path | None, kinds: dict[str, list[Path]]) -> RawDataset:
    """Read the one dataset in a surveyed folder; `kinds` has the label files of each format.

    Raises:
        DataError: there are no labels, no images, or labels of several formats.
    """
    kinds = dict(kinds)
    holds_labels = any(path.parent == source for paths in kinds.values() for path in paths)
    if not {"coco", "yaml"} & kinds.keys() and holds_labels and images is None and not found.holds_images():
        around = survey(source.resolve().parent)  # the folder of the labels was given
        if around.holds_images():
            found, kinds = around, label_kinds(survey(source.resolve()).folders)
    if "yaml" in kinds:
        kinds.pop("yolo", None)
    if len(kinds) > 1:
        kinds.pop("csv", None)  # often a list of what is in the other files
    if not kinds:
        raise _no_labels(source, found)
    if len(kinds) > 1:
        firsts = {_TITLES[kind]: paths[0].relative_to(found.root) for kind, paths in kinds.items()}
        evidence = " and ".join(f"{title} ({path})" for title, path in firsts.items())
        raise DataError(
            f"{source} contains labels in several formats: {evidence}",
            hint=f"pass the folder or file of the one you want, such as {_container(next(iter(kinds.values())))}",
            code="format-ambiguous",
        )
    ((kind, files),) = kinds.items()
    image_survey = survey(images) if images is not None else found
    if kind not in ("coco", "yaml") and not image_survey.holds_images():
        raise DataError(
            f"{source} has {_TITLES[kind]} labels but no images: found {found.describe()}",
            hint="pass the folder of the images with --images",
            code="images-missing",
        )
    raw = new_dataset("yolo" if kind == "yaml" else kind, source, found.root, images)
    _READERS[kind](raw, found, image_survey, files)
    if kind in ("voc", "yolo", "labelme") and not raw.splits:
        raise DataError(
            f"{source} has {counted(len(files), _TITLES[kind] + ' label file')}, and no image has the name of one: "
            f"found {found.describe()}",
            hint="pass the folder of the images with --images",
            code="images-missing",
        )
    return raw


def _container(files: list[Path]) -> Path:
    if len(files) == 1:
        return files[0]
    folder = files[0].parent
    return folder.parent if folder.name in ("Annotations", "labels") else folder


def _no_labels(source: Path, found: Survey) -> DataError:
    """Return the error that says what was found and what is closest to it."""
    message = f"{source} does not contain a supported dataset: found {found.describe()}"
    hint = "pass the folder with the images and labels"
    other, archives = other_format(found), found.files("zip")
    nearest = next((suffix for suffix in _NEAREST if found.files(suffix)), "")
    if other is not None:
        name, hint = other
        message = f"{source} looks like {name}, which is not read: found {found.describe()}"
    elif archives:
        hint = f"pass the zip file: {archives[0]}"
    elif nearest:
        message += f"; {_NEAREST[nearest]}"
        hint = "export the labels as COCO or YOLO"
        if nearest == "csv":
            table = found.files("csv")[0]
            header = edges(table).decode("utf-8-sig", "replace").split("\n", 1)[0].strip()
            message += f": {table.name} has {printable(header)[:80]}"
    elif found.holds_images():
        message += ", but no label files"
        hint = "put a YOLO text file or a Pascal VOC XML file next to each image, or pass the folder that has both"
    return DataError(message, hint=hint, code="format-unknown")


def read_csv_file(source: Path, images: Path | None) -> RawDataset:
    """Read a CSV file, and those of the other splits beside it."""
    found = survey(source.parent)
    raw = new_dataset("csv", source, source.parent, images)
    files = label_kinds(found.folders[:1]).get("csv", [])
    _read_csv(raw, found, survey(images) if images is not None else found, [source, *files])
    return raw


# ---- one reader per format


def _read_pairs(raw: RawDataset, found: Survey, images: Survey, files: list[Path]) -> None:
    layout = pair_files(found, images, files, {})
    _note_lists(raw, layout)
    (read_voc if raw.format == "voc" else read_labelme)(raw, layout)
    for path in layout.orphans:
        raw.findings.add("label-orphan", "has no image", file=raw.show(path))


def _note_lists(raw: RawDataset, layout: Layout) -> None:
    for path in layout.lists:
        raw.label_paths[raw.show(path)] = path
    _report_unlisted(raw, layout.unlisted, layout.lists, "image with labels", "images with labels")


def _report_unlisted(
    raw: RawDataset, images: Sequence[str], lists: Sequence[Path], noun: str = "image", plural: str = ""
) -> None:
    """Report images that no list names; the lists may be the tables of boxes."""
    if images:
        subject = f"{counted(len(images), noun, plural)} {'is' if len(images) == 1 else 'are'}"
        names = " and ".join(path.name for path in lists)
        message = f"{subject} not in {names}, and not used: {abbreviate(images, 3)}"
        raw.findings.add("image-unlisted", message, file=raw.show(lists[0]))


def _read_csv(raw: RawDataset, found: Survey, images: Survey, files: list[Path]) -> None:
    by_split: dict[str, Path] = {}
    for path in dict.fromkeys(files):
        split = split_of(path.stem) or split_of_parts(path.parent.relative_to(found.root).parts)
        if split is None and len(files) > 1 and path != raw.source:
            name = path.relative_to(found.root)
            raise DataError(
                f"{raw.source} has {len(files)} CSV files with boxes, and {name} names no split",
                hint=f"pass one of them, such as {files[0]}",
                code="format-ambiguous",
            )
        by_split.setdefault(split or "train", path)
    read_csv(raw, by_split, index_images(images), images.root)
    listed = {name for split in raw.splits.values() for name in split.file_names}
    homes = {name.rpartition("/")[0] for name in listed}
    folders = [folder for folder in images.folders if "/".join(folder.parts) in homes]
    paths = ("/".join((*folder.parts, name)) for folder in folders for name in folder.images)
    _report_unlisted(raw, [path for path in paths if path not in listed], list(by_split.values()))


def _read_coco(raw: RawDataset, found: Survey, images: Survey, files: list[Path]) -> None:
    usual = ([p for p in files if p.parent == home] for home in (found.root, found.root / "annotations"))
    chosen = next(filter(None, (choose_coco_files(group, found.root) for group in (*usual, files) if group)), {})
    if not chosen:
        names = ", ".join(str(path.relative_to(found.root)) for path in files[:3])
        raise DataError(
            f"{raw.source} has {len(files)} COCO files, and their names don't say which is train: {names}",
            hint=f"pass the one you want, such as {files[0]}",
            code="format-ambiguous",
        )
    if any(path.name == ROBOFLOW_FILE for path in chosen.values()):
        raw.format = "roboflow"
    read_coco(raw, chosen)


def _read_yaml(raw: RawDataset, found: Survey, images: Survey, files: list[Path]) -> None:
    files = [path for path in files if path.parent == found.root] or files
    files = [path for path in files if path.name in DATA_YAMLS][:1] or files
    if len(files) > 1:
        names = ", ".join(str(path.relative_to(found.root)) for path in files[:3])
        raise DataError(
            f"{raw.source} has several YAML files of datasets: {names}",
            hint=f"pass the one you want, such as {files[0]}",
            code="format-ambiguous",
        )
    read_yolo(raw, files[0])


def _read_yolo(raw: RawDataset, found: Survey, images: Survey, files: list[Path]) -> None:
    """Read YOLO labels without a `data.yaml`: class names come from a list, or from `obj.data`."""
    names_file, lists = _darknet(raw, found)
    layout = pair_files(found, images, files, lists)
    classes: dict[int, str] = {}
    if names_file is not None:
        shown, text = raw.read_label(names_file)
        text = (text or "").strip()
        names = [line.strip() for line in text.split("\n")]
        classes = {number: name or f"class{number}" for number, name in enumerate(names)} if text else {}
    if not classes:
        shown = str(raw.source)
        classes = {number: f"class{number}" for number in range(_highest_class(layout) + 1)}
        raw.findings.add(
            "category-unnamed",
            f"has no list of class names, so the {counted(len(classes), 'class')} in the labels "
            f"{'is' if len(classes) == 1 else 'are'} called class0, class1 and so on",
            file=shown,
        )
    _note_lists(raw, layout)
    config = DataYaml(layout.root, classes, {number: number for number in classes}, {}, None, file=shown)
    listed = {split: [layout.root / name for name in names] for split, names in layout.splits.items()}
    labels = {layout.root / image: path for image, path in layout.labels.items()}
    read_yolo_files(raw, config, listed, labels, shown)


def _darknet(raw: RawDataset, found: Survey) -> tuple[Path | None, dict[str, Path]]:
    """Return the list of class names and the lists of images, which `obj.data` names if there is one."""
    texts = {path.name: path for path in found.files("txt", "names", "labels")}
    lists, named = {}, None
    for path in found.files("data"):
        raw.label_paths[raw.show(path)] = path
        settings = dict(_PAIR.findall(edges(path).decode("utf-8", "replace")))
        for key, split in (("train", "train"), ("valid", "val"), ("test", "test")):
            if (target := texts.get(_base_name(settings.get(key, "")))) is not None:
                lists[split] = target
        named = texts.get(_base_name(settings.get("names", "")))
    candidates = [*(texts[name] for name in CLASS_LISTS if name in texts), *found.files("names")]
    return named or next(iter(candidates), None), lists


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _highest_class(layout: Layout) -> int:
    highest = 0
    for path in layout.labels.values():
        for line in read_list(path):
            highest = max(highest, whole_number(line.split()[0], digits=5) or 0)
    return min(highest, _MAX_CLASSES)


_READERS = {
    "voc": _read_pairs,
    "yolo": _read_yolo,
    "yaml": _read_yaml,
    "labelme": _read_pairs,
    "coco": _read_coco,
    "csv": _read_csv,
}
