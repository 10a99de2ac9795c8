"""A val split for a dataset that has none: held out from train, as a function of the data alone."""

from __future__ import annotations

import os
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.checks.clusters import assign_clusters, class_counts, related_images
from rtdetr_cli.checks.duplicates import equal_groups
from rtdetr_cli.datasets.fingerprint import image_digests
from rtdetr_cli.datasets.raw import RawDataset, RawSplit
from rtdetr_cli.text import counted

VAL_FRACTION = 0.2
"""Fraction of train that training holds out by default if there is no val split."""

FEW_VAL_IMAGES = 10
"""With fewer images in a drawn val split a single object changes the metrics visibly."""


def draw_val(
    raw: RawDataset,
    fraction: float,
    *,
    val_images: Collection[str] | None = None,
    legacy_seed: int | None = None,
    read_files: bool = True,
) -> None:
    """Take a val split from train if the dataset has none; report what was done.

    Args:
        raw: gets the split and the finding.
        fraction: of the train images.
        val_images: file names of the split that a run has drawn before.
        legacy_seed: of a run of version 0.1, which drew by its seed and did not keep the split.
        read_files: False doesn't look for copies of one image, which reads the files.
    """
    if "val" in raw.splits or not len(raw.splits.get("train", ())):
        return
    train = raw.splits["train"]
    val: NDArray[np.bool_] | None = None
    if val_images:
        known = frozenset(val_images)
        val = np.asarray([name in known for name in train.file_names], np.bool_)
    elif legacy_seed is not None:
        if len(raw.splits) > 1:  # version 0.1 chose the best epoch by the test split
            return
        val = _draw_by_seed(train, fraction, legacy_seed)
    if val is None or val.all() or not val.any():
        val = choose_val(raw, fraction, read_files=read_files)
    report_drawn(raw, val)
    if val is not None:
        others = {name: split for name, split in raw.splits.items() if name != "train"}
        raw.splits = {"train": train.select_images(~val, "train"), "val": train.select_images(val, "val"), **others}
        raw.split_made = True


def choose_val(raw: RawDataset, fraction: float, *, read_files: bool = True) -> NDArray[np.bool_] | None:
    """Return which images of train to hold out, or None if they cannot be divided.

    The choice depends on the dataset alone, so that the metrics of two runs can be compared. Copies of one image and
    frames of one sequence stay on one side; nearly identical images are not looked for, because that would decode all.
    """
    train = raw.splits["train"]
    boxes = np.bincount(train.box_images, minlength=len(train))
    counts = class_counts(train.labels, boxes, len(raw.categories))
    clusters = related_images(train.file_names, counts, _identical_files(train) if read_files else [])
    if len(clusters) < 2:
        return None
    val = np.zeros(len(train), np.bool_)
    assigned = assign_clusters(clusters, counts, (1 - fraction, fraction), seed=0)
    for cluster, split in zip(clusters, assigned, strict=True):
        val[cluster] = split == 1
    return val


def report_drawn(raw: RawDataset, val: NDArray[np.bool_] | None) -> None:
    """Report the val split that is taken from train; None for none."""
    images = counted(len(raw.splits["train"]), "train image")
    if val is None:
        message, severity = f"there is no val split, and {images} cannot be divided into train and val", "warning"
    else:
        message, severity = f"there is no val split: {int(val.sum()):,} of {images} are held out for it", "info"
        message += ", too few for reliable metrics" if val.sum() < FEW_VAL_IMAGES else ""
    raw.findings.add("split-made", message, file=raw.main_file(), severity=severity)


def _draw_by_seed(train: RawSplit, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Draw the images that version 0.1 drew."""
    count = min(len(train) - 1, max(1, round(fraction * len(train))))
    drawn = np.zeros(len(train), np.bool_)
    order = np.argsort(np.asarray(train.file_names, object), kind="stable")
    drawn[order[np.random.default_rng(seed).permutation(len(train))[:count]]] = True
    return drawn


def _identical_files(split: RawSplit) -> list[list[int]]:
    """Return groups of images with the same content; only files of the same length are read."""
    lengths = [0] * len(split)
    for image in np.flatnonzero(split.usable).tolist():
        try:
            lengths[image] = os.stat(split.path(image)).st_size
        except OSError:  # `check_files` reports it
            continue
    candidates = [image for group in equal_groups(lengths) for image in group]
    paths = [str(split.path(image)) for image in candidates]
    digests = image_digests(paths, max_read=len(paths)).tolist()
    return [[candidates[i] for i in group] for group in equal_groups(digests)]
