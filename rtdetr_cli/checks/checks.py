"""What can be told about a dataset from its labels, folder listings and image headers, without decoding anything.

This is what training runs; `examine` in `doctor.py` adds what needs the pixels.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.findings import Spot
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.images.decode import ImageError, image_size
from rtdetr_cli.text import counted

EDGE_PX = 0.5
"""A box may reach over the edge by this much before it is said: less is rounding."""

SMALLEST_PX = 1e-3
"""Sides below this are zero."""

DUPLICATE_IOU = 0.9
EXTREME_ASPECT = 20.0
FEW_BOXES = 10
IMBALANCE = 100.0
WHOLE_IMAGE = 0.99
CROWDED_PARTNERS = 64
"""With how many of its neighbours a box is compared at most: an image of a hundred thousand equal boxes must end."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Listings:
    """Folder listings, each read once: whether an image exists costs no system call of its own."""

    def __init__(self, roots: tuple[Path, ...]) -> None:
        self.roots = [os.path.realpath(r) for r in roots]
        self._folders: dict[str, tuple[dict[str, str], dict[str, list[str]], bool]] = {}

    def contains(self, path: str) -> bool:
        """Tell whether a path, links followed, lies in one of the roots."""
        real = os.path.realpath(path)
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self.roots)

    def folder(self, folder: str) -> tuple[dict[str, str], dict[str, list[str]], bool]:
        """Return name -> `file`, `link` or `other`, lower-case name -> names, and whether the folder lies inside."""
        known = self._folders.get(folder)
        if known is None:
            names: dict[str, str] = {}
            lower: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        plain = entry.is_file(follow_symlinks=False)
                        names[entry.name] = "file" if plain else "link" if entry.is_symlink() else "other"
                        lower.setdefault(entry.name.lower(), []).append(entry.name)
            except (OSError, ValueError):
                pass
            known = self._folders[folder] = (names, lower, self.contains(folder))
        return known


def check_files(dataset: RawDataset) -> None:
    """Check that every image is there, inside the dataset's folder and not empty; mend names of another case."""
    listings = Listings(dataset.roots)
    for split in dataset.splits.values():
        root = str(split.root)
        for image, name in enumerate(split.file_names):
            folder, _, base = name.rpartition("/")
            if folder or name in (".", ".."):
                where = os.path.join(root, folder or name) if name[:1] != "/" else folder or "/"
            else:
                where = root
            names, lower, inside = listings.folder(where)
            code = ""
            if not inside or base in ("", ".", ".."):
                code, said = "image-outside", f"{name} lies outside the dataset's folder"
                if inside:
                    code, said = "image-missing", f"{name} is a folder, not an image"
            elif base in names:
                path = os.path.join(where, base)
                if names[base] == "link" and not listings.contains(path):
                    code, said = "image-outside", f"{name} is a link that leaves the dataset's folder"
                elif names[base] == "link" and not os.path.exists(path):
                    code, said = "image-missing", f"{name} is a link to nothing"
                elif names[base] != "file" and not os.path.isfile(path):  # reading a pipe would wait for ever
                    what = "a folder, not an image" if os.path.isdir(path) else "no file"
                    code, said = "image-unreadable", f"{name} is {what}"
            else:
                others = lower.get(base.lower(), [])
                if len(others) == 1:
                    split.said_names[image] = name
                    split.file_names[image] = f"{folder}/{others[0]}" if folder else others[0]
                    dataset.findings.add(
                        "image-name-case",
                        f"{name} is called {others[0]} on disk",
                        **image_place(dataset, split, image),
                    )
                else:
                    code, said = "image-missing", f"{name} is not in {dataset.show(Path(where))}"
                    if len(others) > 1:
                        said += f", which has {' and '.join(others)}"
            if code:
                split.usable[image] = False
                dataset.findings.add(code, said, **image_place(dataset, split, image))
            elif not base.isascii() and _not_utf8(split.file_names[image]):
                dataset.findings.add(
                    "image-name-encoding",
                    f"{name} is not a name in UTF-8",
                    **image_place(dataset, split, image),
                )


def _not_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def image_place(
    dataset: RawDataset, split: RawSplit, image: int, *, other: tuple[str, int] | None = None
) -> dict[str, Any]:
    """Return where an image's entry lies, as the arguments of `Findings.add`."""
    file = split.label_file(image)
    return {
        "file": file or dataset.show(split.path(image)),
        "line": int(split.image_lines[image]) if file else 0,
        "image_id": int(split.image_ids[image]),
        "spot": replace(split.image_spot(image), other=other),
    }


def measure_images(dataset: RawDataset, *, threads: int | None = None, all_images: bool = True) -> None:
    """Read sizes from the images' headers and use them; say where the labels declare another.

    Args:
        dataset: gets the sizes and the findings.
        threads: how many headers are read at once.
        all_images: False reads only those whose size the labels do not say.
    """
    for split in dataset.splits.values():
        wanted = np.flatnonzero(split.usable if all_images else split.usable & ~split.declared)
        paths = [split.path(int(i)) for i in wanted]

        def measure(path: Path) -> tuple[int, int] | ImageError:
            try:
                return image_size(path)
            except ImageError as error:
                return error

        with ThreadPoolExecutor(threads or min(16, (os.cpu_count() or 1) + 4)) as pool:
            for image, size in zip(wanted.tolist(), pool.map(measure, paths, chunksize=64), strict=True):
                if isinstance(size, ImageError):
                    report_fault(dataset, split, image, size)
                else:
                    report_size(dataset, split, image, size)
        report_undeclared(dataset, split)


def report_undeclared(dataset: RawDataset, split: RawSplit) -> None:
    """Say once for a split that labels lack the images' sizes; YOLO labels never have them."""
    if split.shares:
        return
    undeclared = np.flatnonzero(split.usable & ~split.declared)
    if len(undeclared):
        first = int(undeclared[0])
        more = f" and {len(undeclared) - 1} more have" if len(undeclared) > 1 else " has"
        dataset.findings.add(
            "image-size-undeclared",
            f"{split.file_names[first]}{more} no size in the labels",
            **image_place(dataset, split, first),
        )


def report_fault(dataset: RawDataset, split: RawSplit, image: int, error: ImageError) -> None:
    """Add what is wrong with an image that cannot be used."""
    split.usable[image] = False
    message = error.message.replace(str(split.path(image)), split.file_names[image])
    dataset.findings.add(error.code, message, **image_place(dataset, split, image))


def report_size(
    dataset: RawDataset, split: RawSplit, image: int, size: tuple[int, int], *, turned: bool | None = None
) -> None:
    """Take an image's own upright size; say so where another was declared.

    Args:
        dataset: gets the finding.
        split: gets the size.
        image: position in the split.
        size: width and height.
        turned: whether EXIF turns it by 90 degrees; None looks it up if it matters.
    """
    if split.declared[image]:
        declared = tuple(split.sizes_wh[image].tolist())
        if declared != size:
            name = split.file_names[image]
            if declared == size[::-1] and (_turned(split.path(image)) if turned is None else turned):
                code, said = (
                    "image-exif-swapped",
                    f"{name} is {size[0]}x{size[1]} upright, but the labels declare it unturned as "
                    f"{declared[0]}x{declared[1]}",
                )
            else:
                code, said = (
                    "image-size",
                    f"{name} is {size[0]}x{size[1]}, but the labels declare {declared[0]}x{declared[1]}",
                )
            dataset.findings.add(code, said, **image_place(dataset, split, image))
    split.sizes_wh[image] = size


def _turned(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def check_boxes(dataset: RawDataset, *, imgsz: tuple[int, int] = (640, 640), queries: int = 300) -> None:
    """Judge every box, and clip or drop what is safely clipped or dropped.

    Afterwards every remaining box is finite, has an area and lies inside its image, whatever was found.

    Args:
        dataset: its boxes are judged and replaced.
        imgsz: height and width of the network, which decide what is tiny.
        queries: how many objects the network can find in an image.
    """
    for split in dataset.splits.values():
        split.scale_shares()
        _check_extent(dataset, split)
        _check_meaning(dataset, split, imgsz, queries)


class _Boxes:
    """Adds findings about boxes of one split."""

    def __init__(self, dataset: RawDataset, split: RawSplit) -> None:
        self.dataset, self.split = dataset, split

    def add(self, code: str, rows: Iterable[int], say: Callable[[int], str]) -> None:
        split = self.split
        for row in rows:
            image = int(split.box_images[row])
            self.dataset.findings.add(
                code,
                f"{called(self.dataset, split, row)} {say(row)}",
                file=split.label_file(image),
                line=int(split.box_lines[row]),
                image_id=int(split.image_ids[image]),
                annotation_id=int(split.annotation_ids[row]),
                spot=split.box_spot(row),
            )


def called(dataset: RawDataset, split: RawSplit, row: int) -> str:
    """Return how a box is spoken of: by its id where the format has ids."""
    name = dataset.categories[int(split.labels[row])].name
    if dataset.format in ("coco", "roboflow"):
        return f"annotation {int(split.annotation_ids[row])} ({name})"
    return f"the box of {name}"


def _rows(mask: NDArray[np.bool_]) -> list[int]:
    found: list[int] = np.flatnonzero(mask).tolist()
    return found


def _check_extent(dataset: RawDataset, split: RawSplit) -> None:
    """Judge where each box begins and ends; clip and drop."""
    if not len(split.box_images):
        return
    boxes = split.boxes_xyxy_px
    sizes = split.sizes_wh[split.box_images].astype(np.float64)
    limit = np.where(sizes > 0, sizes, np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        sides = boxes[:, 2:] - boxes[:, :2]
        finite = np.all(np.isfinite(boxes), axis=1) & np.all(np.isfinite(sides), axis=1)
        inverted = finite & np.any(sides < -SMALLEST_PX, axis=1)
        zero = finite & ~inverted & np.any(sides < SMALLEST_PX, axis=1)
        sound = finite & ~inverted & ~zero
        low = np.minimum(np.maximum(boxes[:, :2], 0.0), limit)
        high = np.maximum(np.minimum(boxes[:, 2:], limit), 0.0)
        outside = sound & np.any(high - low < SMALLEST_PX, axis=1)
        over = np.maximum((low - boxes[:, :2]).max(axis=1), (boxes[:, 2:] - high).max(axis=1))
        partly = sound & ~outside & (over > EDGE_PX) & ~split.said_beyond

    def extent(row: int) -> str:
        return f"is {_px(sides[row, 0])} wide and {_px(sides[row, 1])} high"

    def corners(row: int) -> str:
        return f"at ({', '.join(_px(v) for v in boxes[row].tolist())})"

    def image(row: int) -> str:
        return f"its {int(sizes[row, 0])}x{int(sizes[row, 1])} image"

    found = _Boxes(dataset, split)
    found.add("box-not-finite", _rows(~finite), lambda row: f"has the corners {corners(row)[3:]}")
    found.add("box-inverted", _rows(inverted), extent)
    found.add("box-zero-size", _rows(zero), extent)
    found.add("box-outside", _rows(outside), lambda row: f"{corners(row)} lies wholly outside {image(row)}")
    found.add("box-partly-outside", _rows(partly), lambda row: f"{corners(row)} reaches over the edge of {image(row)}")
    split.boxes_xyxy_px = np.concatenate([low, high], axis=1)
    keep = sound & ~outside
    if not keep.all():
        split.keep_boxes(keep)


def _check_meaning(dataset: RawDataset, split: RawSplit, imgsz: tuple[int, int], queries: int) -> None:
    """Look at boxes that are sound, one by one and in pairs."""
    count = len(split.box_images)
    if not count:
        return
    boxes = split.boxes_xyxy_px
    sides = boxes[:, 2:] - boxes[:, :2]
    sizes = split.sizes_wh[split.box_images].astype(np.float64)
    known = sizes[:, 0] > 0
    objects = ~split.crowd
    found = _Boxes(dataset, split)
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.where(known[:, None], sides / np.maximum(sizes, 1) * np.asarray([imgsz[1], imgsz[0]]), np.inf)
    smallest = seen.min(axis=1)
    scaled = f"at {imgsz[0]}x{imgsz[1]}"

    def tiny(row: int) -> str:
        return f"is {seen[row, 0]:.1f} wide and {seen[row, 1]:.1f} high {scaled}"

    found.add("box-below-2px", _rows(objects & (smallest < 2)), tiny)
    found.add("box-below-8px", _rows(objects & (smallest >= 2) & (smallest < 8)), tiny)
    whole = known & objects & np.all(sides >= WHOLE_IMAGE * sizes, axis=1)
    found.add("box-whole-image", _rows(whole), lambda row: "covers its whole image")
    aspect = sides.max(axis=1) / sides.min(axis=1)
    found.add(
        "box-aspect",
        _rows(objects & (aspect > EXTREME_ASPECT)),
        lambda row: f"is {_px(sides[row, 0])} wide and {_px(sides[row, 1])} high",
    )
    found.add("box-crowd", _rows(split.crowd), lambda row: "is a crowd")
    _check_pairs(split, found)

    if dataset.format in ("coco", "roboflow"):
        missing = np.flatnonzero(np.isnan(split.areas))
        if len(missing):
            row = int(missing[0])
            more = f" and {len(missing) - 1:,} more have" if len(missing) > 1 else " has"
            found.add("box-no-area", [row], lambda _: f"{more[1:]} no area")
    per_image = np.bincount(split.box_images[objects], minlength=len(split))
    for image in _rows(per_image > queries):
        dataset.findings.add(
            "box-over-queries",
            f"{split.file_names[image]} has {counted(int(per_image[image]), 'box')} "
            f"for {counted(queries, 'query', 'queries')}",
            **image_place(dataset, split, image),
        )


def _check_pairs(split: RawSplit, found: _Boxes) -> None:
    """Find pairs of boxes in an image that are nearly the same.

    Boxes are sorted by their left edge. IoU above 0.9 needs left edges closer than a tenth of the width, so each box
    is compared with the few that follow it closely.
    """
    rows = np.flatnonzero(~split.crowd)
    if len(rows) < 2:
        return
    boxes, images = split.boxes_xyxy_px, split.box_images
    order = rows[np.lexsort((boxes[rows, 0], images[rows]))]
    first = np.arange(len(order) - 1)
    firsts: list[NDArray[np.int64]] = []
    seconds: list[NDArray[np.int64]] = []
    for step in range(1, CROWDED_PARTNERS + 1):
        first = first[first + step < len(order)]
        a, b = order[first], order[first + step]
        slack = (1 - DUPLICATE_IOU) * (boxes[a, 2] - boxes[a, 0])
        near = (images[a] == images[b]) & (boxes[b, 0] - boxes[a, 0] <= slack)
        first, a, b = first[near], a[near], b[near]
        if not len(first):
            break
        same = iou_of_pairs(boxes[a], boxes[b]) > DUPLICATE_IOU
        firsts.append(np.minimum(a[same], b[same]))
        seconds.append(np.maximum(a[same], b[same]))
    if not firsts:
        return
    earlier, later = np.concatenate(firsts), np.concatenate(seconds)
    alike = split.labels[earlier] == split.labels[later]
    for code, mask, how in (
        ("box-duplicate", alike, "is labelled twice"),
        ("box-two-classes", ~alike, "is also labelled"),
    ):
        partner: dict[int, int] = {}
        for a, b in sorted(zip(earlier[mask].tolist(), later[mask].tolist(), strict=True)):
            partner.setdefault(b, a)

        def say(row: int, partner: dict[int, int] = partner, how: str = how) -> str:
            other = partner[row]
            overlap = float(iou_of_pairs(boxes[[row]], boxes[[other]])[0])
            said = called(found.dataset, split, other)
            line = int(split.box_lines[other])
            return f"{how}: {said}{f' in line {line}' if line else ''} overlaps it by {overlap:.2f}"

        found.add(code, sorted(partner), say)


def iou_of_pairs(a_xyxy: NDArray[np.float64], b_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU of each row of `a_xyxy` with the same row of `b_xyxy`; boxes have an area."""
    low = np.maximum(a_xyxy[:, :2], b_xyxy[:, :2])
    high = np.minimum(a_xyxy[:, 2:], b_xyxy[:, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(a_xyxy[:, 2:] - a_xyxy[:, :2], axis=1) + np.prod(b_xyxy[:, 2:] - b_xyxy[:, :2], axis=1)
    overlap: NDArray[np.float64] = common / (areas - common)
    return overlap


def _px(value: float) -> str:
    return f"{value:.6g}"


# ---------------------------------------------------------------------------------------------------------------------
# Splits and classes


def check_structure(dataset: RawDataset, *, to_train: bool = False) -> None:
    """Check that the splits are there, not empty and not the same, and look at the classes over all of them.

    Args:
        dataset: gets the findings.
        to_train: a train split without objects is an error; one to be measured on may have none.
    """
    findings = dataset.findings
    shown = dataset.main_file()
    for name, split in dataset.splits.items():
        if not len(split):
            findings.add("split-empty", f"the split {name} has no images", file=shown, spot=Spot(name))
        elif to_train and name == "train" and split.crowd.all():
            what = "nothing but crowds" if len(split.crowd) else "no boxes"
            said = f"the split {name} has {what}, so there is nothing to learn"
            findings.add("split-no-objects", said, file=shown, spot=Spot(name), severity="error")
        elif not len(split.box_images):
            findings.add("split-no-objects", f"the split {name} has no boxes", file=shown, spot=Spot(name))
        counts = np.bincount(split.box_images, minlength=len(split))
        for image in _rows((counts == 0) & split.usable & (split.image_labels >= 0)):
            findings.add(
                "image-no-objects",
                f"{split.file_names[image]} has no objects",
                **image_place(dataset, split, image),
            )
    if not dataset.splits and not any(f.severity == "error" for f in findings):
        findings.add("split-missing", "no split was found", file=shown)
    if dataset.splits and not dataset.categories and not any(f.code.startswith("category-") for f in findings):
        findings.add("category-none", "names no class", file=shown)
    _check_classes(dataset, shown)


def check_train(dataset: RawDataset) -> None:
    """Say that nothing can be trained on: what has no train split can still be measured on."""
    splits = dataset.splits
    if splits and "train" not in splits and not any(f.severity == "error" for f in dataset.findings):
        only = " and ".join(splits)
        dataset.findings.add("split-missing", f"there is no train split, only {only}", file=dataset.main_file())


def _check_classes(dataset: RawDataset, shown: str) -> None:
    findings, categories = dataset.findings, dataset.categories
    if not categories or not dataset.splits:
        return
    count = len(categories)
    boxes = {name: np.bincount(split.labels[~split.crowd], minlength=count) for name, split in dataset.splits.items()}
    total = np.sum(list(boxes.values()), axis=0)
    train = boxes.get("train")
    for label, category in enumerate(categories):
        quoted = f"class {category.name!r}"
        if not total[label]:
            findings.add("category-unused", f"{quoted} (id {category.id}) has no box", file=shown)
        elif train is not None and not train[label]:
            where = ", ".join(name for name, n in boxes.items() if n[label])
            findings.add("category-only-val", f"{quoted} has boxes in {where} but none in train", file=shown)
        elif train is not None and train[label] < FEW_BOXES:
            findings.add(
                "category-few",
                f"{quoted} has {counted(int(train[label]), 'box')} in train",
                file=shown,
            )
    ids = sorted(c.id for c in categories)
    if ids not in (list(range(count)), list(range(1, count + 1))):
        findings.add(
            "category-gaps",
            f"has {counted(count, 'class')} with ids from {ids[0]} to {ids[-1]}; they are mapped to 0 to {count - 1}",
            file=shown,
        )
    present = np.flatnonzero(total)
    if len(present) > 1:
        most, least = int(total.argmax()), int(present[total[present].argmin()])
        if total[most] > IMBALANCE * total[least]:
            findings.add(
                "category-imbalance",
                f"class {categories[most].name!r} has {counted(int(total[most]), 'box')} "
                f"and {categories[least].name!r} {total[least]:,}",
                file=shown,
            )
    _check_names([c.name for c in categories], dataset, shown)


def _check_names(names: Sequence[str], dataset: RawDataset, shown: str) -> None:
    """Find names that are the same, or differ in case, spaces or one letter."""
    exact: dict[str, list[int]] = defaultdict(list)
    for position, name in enumerate(names):
        exact[name].append(position)
    for name, positions in exact.items():
        if len(positions) > 1:
            ids = " and ".join(str(dataset.categories[p].id) for p in positions)
            dataset.findings.add("category-duplicate-name", f"the ids {ids} are both called {name!r}", file=shown)
    plain: dict[str, list[str]] = defaultdict(list)
    for name in exact:
        plain["".join(c for c in name.casefold() if c.isalnum()) or name].append(name)
    pairs = {(group[0], other) for group in plain.values() for other in group[1:]}
    # Two words differ by at most one letter if they are equal, or one is the other without a letter, or both are
    # equal without the letter at one place.
    without: dict[tuple[str, int], list[str]] = defaultdict(list)
    for word in plain:
        if len(word) > 200:
            continue
        for place in range(len(word)):
            shorter = word[:place] + word[place + 1 :]
            if shorter in plain and len(shorter) >= 3 and not word[place].isdigit():
                pairs.add((plain[shorter][0], plain[word][0]))
            if len(word) >= 5 and not word[place].isdigit():
                without[(shorter, place)].append(word)
    for group_of in without.values():
        pairs.update((plain[group_of[0]][0], plain[word][0]) for word in group_of[1:])
    for a, b in sorted(pairs):
        dataset.findings.add(
            "category-similar-names", f"the classes {a!r} and {b!r} are called nearly the same", file=shown
        )


# ---------------------------------------------------------------------------------------------------------------------
# The same image more than once


Member = tuple[str, int]
"""Split and position of an image."""


def groups_by_path(dataset: RawDataset) -> list[list[Member]]:
    """Return the images that are listed more than once."""
    groups: dict[str, list[Member]] = defaultdict(list)
    for name, split in dataset.splits.items():
        root = str(split.root)
        for image, file_name in enumerate(split.file_names):
            groups[file_name if file_name[:1] == "/" else os.path.normpath(f"{root}/{file_name}")].append((name, image))
    return [group for group in groups.values() if len(group) > 1]


def check_equal_splits(dataset: RawDataset, groups: list[list[Member]]) -> set[frozenset[str]]:
    """Find splits that are wholly the same images; their images need not be named one by one.

    Args:
        dataset: gets the findings.
        groups: images that are the same.
    """
    shared: dict[frozenset[str], int] = defaultdict(int)
    for group in groups:
        names = sorted({name for name, _ in group})
        for position, a in enumerate(names):
            for b in names[position + 1 :]:
                shared[frozenset((a, b))] += 1
    equal = set()
    for pair, count in shared.items():
        a, b = sorted(pair, key=list(dataset.splits).index)
        if count == len(dataset.splits[a]) == len(dataset.splits[b]):
            equal.add(pair)
            dataset.findings.add(
                "split-equal",
                f"{b} holds the same {counted(count, 'image')} as {a}",
                file=dataset.main_file(),
                spot=Spot(b),
            )
    return equal


def check_copies(dataset: RawDataset, groups: list[list[Member]], equal: set[frozenset[str]]) -> None:
    """Say which images are the same, in a split or over two, and whether their boxes differ."""
    for group in groups:
        first_name, first = group[0]
        origin = dataset.splits[first_name]
        for name, image in group[1:]:
            split = dataset.splits[name]
            code = "image-duplicate" if name == first_name else "image-leak"
            said = f"{split.file_names[image]} is the same image as {origin.file_names[first]}"
            if split.path(image) == origin.path(first):
                said = f"{split.file_names[image]} is listed twice"
            if name != first_name:
                said += f", once in {first_name} and once in {name}"
            where = image_place(dataset, split, image, other=group[0])
            if frozenset((first_name, name)) not in equal:
                dataset.findings.add(code, said, **where)
            if not _same_boxes(origin, first, split, image):
                dataset.findings.add(
                    "image-other-boxes",
                    f"{split.file_names[image]} is the same image as {origin.file_names[first]} "
                    f"({first_name}), but their boxes differ",
                    **where,
                )


def _same_boxes(a: RawSplit, first: int, b: RawSplit, second: int) -> bool:
    def rows(split: RawSplit, image: int) -> NDArray[np.float64]:
        low, high = np.searchsorted(split.box_images, [image, image + 1])
        table = np.column_stack([split.labels[low:high], split.boxes_xyxy_px[low:high]])
        order = np.lexsort(table.T[::-1])
        result: NDArray[np.float64] = table[order]
        return result

    one, two = rows(a, first), rows(b, second)
    return one.shape == two.shape and bool(np.allclose(one, two, atol=EDGE_PX, rtol=0))
