"""Decide which images are left out of the copy, and plan the names and EXIF orientations of the others."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from rtdetr_cli.checks.doctor import Report, examine
from rtdetr_cli.checks.files import is_sideways, measure_image
from rtdetr_cli.checks.images import labels_are_upright
from rtdetr_cli.checks.repair.plan import BROKEN_FILE, Plan, files_of_one_image
from rtdetr_cli.images.decode import EXIF_SIDEWAYS, EXIF_TAG, EXIF_TRANSPOSES, FORMATS, SUFFIXES

_UNUSABLE = (
    *("image-missing", "image-empty", "image-unreadable", "image-truncated"),
    *("image-bomb", "image-samples", "image-outside"),
)
_BOX_MISSING = "the image is truncated, and a box lies in the missing part"
_OF_MANY = frozenset({"image-size-undeclared", "box-no-area"})
"""Findings that stand for several images, but name only the first."""

Tag = tuple[int, bytes]
"""Offset in the file and new bytes of an EXIF orientation."""


def reset_orientations(report: Report) -> tuple[Report, dict[Path, Tag]]:
    """Find the images whose orientation must be reset, and check the dataset as it is afterwards.

    Returns:
        The new report (the same one if there is no such image), and path -> the edit of the image file.
    """
    raw = report.raw
    entries: dict[Path, list[tuple[str, int]]] = defaultdict(list)
    for name, split in raw.splits.items():
        for image in range(len(split)):
            entries[split.path(image)].append((name, image))
    swapped = report.images_with("image-exif-swapped")
    reset: dict[Path, Tag] = {}
    for path in {raw.splits[name].path(image): None for name, image in swapped}:
        # If another entry declares the upright size, there is no orientation that suits both.
        if swapped.keys() >= set(entries[path]) and (tag := upright_tag(path)) is not None:
            reset[path] = tag
    if not reset:
        return report, {}
    known = {
        path: replace(info, size_wh=info.size_wh[::-1], orientation=1) if path in reset else info
        for path, info in report.image_info.items()
    }
    again = examine(raw.source, images=raw.images, imgsz=report.imgsz, decode=report.decoded, known=known)
    return again, reset


def upright_tag(path: Path) -> Tag | None:
    """Return the edit that makes an image's EXIF orientation 1, or None where that could damage the file."""
    data = path.read_bytes()
    try:
        with Image.open(path, formats=FORMATS) as image:
            exif = image.info.get("exif") if image.format in ("JPEG", "MPO", "WEBP") else None
    except Exception:  # EXIF is untrusted binary data
        return None
    if not isinstance(exif, bytes) or data.count(exif) != 1:
        return None
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    order = {b"II": "<", b"MM": ">"}.get(exif[start : start + 2])
    if order is None or len(exif) < start + 8:
        return None
    (first,) = struct.unpack_from(f"{order}I", exif, start + 4)
    position = start + first
    if position + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(f"{order}H", exif, position)
    for entry in range(position + 2, min(position + 2 + 12 * count, len(exif) - 11), 12):
        if struct.unpack_from(f"{order}H", exif, entry)[0] == EXIF_TAG:
            return data.index(exif) + entry, struct.pack(f"{order}HHIHH", EXIF_TAG, 3, 1, 1, 0)
    return None


# ---- images that are left out


def choose_left_out(plan: Plan, before: Report, reset: Mapping[Path, Tag]) -> None:
    """Leave out images that cannot be used or whose boxes cannot be placed; mark their findings as dealt with.

    `before` is the report with the orientations as they are in the original, `reset` has those that are reset.
    """
    raw = plan.report.raw
    label_files = files_of_one_image(raw)
    broken_files = {f.file: f.message for f in raw.findings if f.code in BROKEN_FILE and f.file in label_files}

    def leave_out(report: Report, *codes: str) -> None:
        for (name, image), finding in report.images_with(*codes).items():
            if finding.code != "image-exif-swapped" or raw.splits[name].path(image) not in reset:
                plan.left_out.setdefault((name, image), (finding.code, finding.message))

    leave_out(plan.report, *_UNUSABLE, *(() if plan.allow_outside else ("image-elsewhere",)))
    _keep_truncated(plan)
    if not plan.keep_unlabelled:
        leave_out(plan.report, "label-missing")
    leave_out(before, "image-exif-swapped")
    if labels_are_upright(before.raw, before.image_info):
        plan.assumed = [f for f in before.findings if f.code == "image-exif-ambiguous"]
    else:
        leave_out(before, "image-exif-ambiguous")
    for name, split in raw.splits.items():
        for image in np.flatnonzero(~split.usable).tolist():
            plan.left_out.setdefault((name, image), ("image-unreadable", "cannot be used"))
        for image in range(len(split)) if broken_files else ():
            if split.label_file(image) in broken_files:
                plan.left_out.setdefault((name, image), ("file-malformed", broken_files[split.label_file(image)]))
    if raw.format != "yolo":  # its boxes are fractions of the image, whatever its size
        _leave_out_unknown_frames(plan)
    _leave_out_shared_ids(plan)
    for i, finding in plan.findings():
        gone = finding.spot.member in plan.left_out and finding.code not in _OF_MANY
        if gone or finding.file in broken_files:
            plan.repaired.add(i)
    for code in ("image-exif-swapped", "image-exif-ambiguous"):
        plan.repaired_before[code] = len(before.images_with(code)) - len(plan.report.images_with(code))
    plan.repaired_before["image-exif-ambiguous"] -= len(plan.assumed)


def _keep_truncated(plan: Plan) -> None:
    """Keep the truncated images that the report describes, unless a box lies in the missing part for the most part."""
    for name, split in plan.report.raw.splits.items():
        for image in range(len(split)):
            info = plan.report.image_info.get(split.path(image))
            if info is None or info.missing is None:
                continue
            centers = split.boxes_xyxy_px[split.rows(image)][:, 1::2].mean(axis=1)
            # The missing rows are the last ones of the stored image, which may be elsewhere in the upright one.
            first_missing = 0 if info.orientation in EXIF_TRANSPOSES else (1 - info.missing) * info.size_wh[1]
            if info.missing and (centers > first_missing).any():
                plan.left_out[name, image] = ("image-truncated", _BOX_MISSING)
            else:
                del plan.left_out[name, image]
                plan.completed.add(split.path(image))


def _leave_out_unknown_frames(plan: Plan) -> None:
    """Leave out images if it is unknown what their boxes refer to: clipping could damage correct boxes.

    That is the case if boxes reach over the border of an image whose size is not the declared one (it may have been
    resized after it was annotated), or if the declared size fits neither the stored nor the upright image.
    """
    resized = plan.report.images_with("image-size").keys()
    outside = plan.report.images_with("box-outside", "box-partly-outside").keys()
    for name, image in sorted(resized | outside):
        split = plan.report.raw.splits[name]
        path = split.path(image)
        if (name, image) in plan.left_out:
            continue
        if (name, image) in resized:
            unknown = (name, image) in outside or _sideways(plan, path)
        elif split.declared[image]:
            unknown = not plan.report.decoded and measure_image(path) != tuple(split.sizes_wh[image].tolist())
        else:
            unknown = _sideways(plan, path)
        if unknown:
            why = "the labels don't declare the image's size, and its boxes may refer to another size or orientation"
            plan.left_out[name, image] = ("image-size", why)


def _sideways(plan: Plan, path: Path) -> bool:
    """Return whether an image is rotated by 90 degrees in the copy."""
    if plan.report.image_info:
        return plan.report.image_info[path].orientation in EXIF_SIDEWAYS
    return is_sideways(path, unknown=True)


def _leave_out_shared_ids(plan: Plan) -> None:
    """Leave out the images that share their id with one that is left out: the boxes may belong to either."""
    for name, split in plan.report.raw.splits.items():
        ids = {int(split.image_ids[image]) for split_name, image in plan.left_out if split_name == name}
        if ids and len(np.unique(split.image_ids)) < len(split):
            for image in np.flatnonzero(np.isin(split.image_ids, list(ids))).tolist():
                reason = ("image-id-duplicate", "shares its id with an image that is left out")
                plan.left_out.setdefault((name, image), reason)


# ---- images that are copied


def plan_images(plan: Plan, reset: Mapping[Path, Tag]) -> None:
    """Plan the name and the orientation of each copied image."""
    raw = plan.report.raw
    positions: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for i, finding in plan.findings():
        if finding.spot.image >= 0 and finding.code.startswith("image-"):
            positions[finding.spot.member].setdefault(finding.code, i)
    copied: dict[Path, tuple[str, set[str]]] = {}  # new suffix and repaired codes
    for name, split in raw.splits.items():
        for image, file_name in enumerate(split.file_names):
            if (name, image) in plan.left_out:
                continue
            path, codes = split.path(image), positions[name, image]
            if path not in copied:
                copied[path] = _plan_image(plan, name, image, set(codes), reset.get(path))
            suffix, repaired = copied[path]
            plan.repaired.update(i for code, i in codes.items() if code in repaired)
            if suffix:
                plan.renamed[name, image] = str(Path(file_name).with_suffix(suffix))
    for (name, image), (code, why) in plan.left_out.items():
        path = raw.splits[name].path(image)
        if path not in copied:
            plan.leave_out(path, code, why, boxes=plan.count_boxes(name, image))


def _plan_image(plan: Plan, name: str, image: int, codes: set[str], tag: Tag | None) -> tuple[str, set[str]]:
    """Plan the copy of one image; return its new suffix (or none) and the codes that this repairs."""
    raw = plan.report.raw
    split = raw.splits[name]
    path = split.path(image)
    target, suffix, repaired = plan.destination(path), "", set()
    if "image-name-case" in codes and raw.format == "yolo":
        wanted = plan.destination(split.root / split.label_names[image])
        plan.rename(target, wanted, "image-name-case")
        target = wanted
        repaired.add("image-name-case")
    if "image-extension" in codes:
        usual = SUFFIXES[plan.report.image_info[path].format][0]
        wanted = str(Path(target).with_suffix(usual))
        if wanted not in plan.files and not path.with_suffix(usual).exists():
            plan.rename(target, wanted, "image-extension")
            target, suffix = wanted, usual
            repaired.add("image-extension")
    if path in plan.completed:
        why = f"{plan.report.image_info[path].missing:.0%} of its rows are missing"
        plan.record("complete", "image-truncated", target, why)
        repaired.add("image-truncated")
    code, why = "image-exif-swapped", "the labels refer to the image as it is stored"
    if tag is None and "image-exif-invalid" in codes:
        code, why = "image-exif-invalid", "the orientation is not one of 1 to 8"
        tag = upright_tag(path)
    if tag is not None:
        plan.orientations[target] = tag
        plan.record("orientation", code, target, why, new=1)
        repaired.add(code)
    plan.files[target] = path
    return suffix, repaired
