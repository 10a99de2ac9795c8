"""Check the splits and the classes of a dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rtdetr_cli.datasets.raw import RawDataset
from rtdetr_cli.datasets.records import Spot
from rtdetr_cli.text import counted

FEW_BOXES = 10
IMBALANCE = 100.0
MAX_NAME_LENGTH = 200
"""Longer class names are not compared letter by letter."""


def check_structure(dataset: RawDataset, *, for_training: bool = False) -> None:
    """Check that the splits exist and are not empty, and check the classes over all of them.

    Args:
        dataset: gets the findings.
        for_training: makes a train split without objects an error, and reports that there is no train split; a split
            for evaluation may have no objects.
    """
    findings = dataset.findings
    file = dataset.main_file()
    for name, split in dataset.splits.items():
        if not len(split):
            findings.add("split-empty", f"the split {name} has no images", file=file, spot=Spot(name))
        elif for_training and name == "train" and split.crowd.all():
            content = "only crowd boxes" if len(split.crowd) else "no boxes"
            message = f"the split {name} has {content}, so there is nothing to learn"
            findings.add("split-no-objects", message, file=file, spot=Spot(name), severity="error")
        elif not len(split.box_images):
            findings.add("split-no-objects", f"the split {name} has no boxes", file=file, spot=Spot(name))
        boxes = np.bincount(split.box_images, minlength=len(split))
        for image in np.flatnonzero((boxes == 0) & split.usable & (split.image_labels >= 0)).tolist():
            dataset.report_image(split, image, "image-no-objects", f"{split.file_names[image]} has no objects")
    if not dataset.splits and not dataset.has_errors():
        findings.add("split-missing", "no split was found", file=file)
    if dataset.splits and not dataset.categories and not any(f.code.startswith("category-") for f in findings):
        findings.add("category-none", "defines no classes", file=file)
    if dataset.splits and dataset.categories:
        _check_classes(dataset, file)
        _check_names([c.name for c in dataset.categories], dataset, file)
    if for_training and dataset.splits and "train" not in dataset.splits and not dataset.has_errors():
        findings.add("split-missing", f"there is no train split, only {' and '.join(dataset.splits)}", file=file)


def _check_classes(dataset: RawDataset, file: str) -> None:
    findings, categories = dataset.findings, dataset.categories
    count = len(categories)
    boxes = {name: np.bincount(split.labels[~split.crowd], minlength=count) for name, split in dataset.splits.items()}
    total = np.sum(list(boxes.values()), axis=0)
    train = boxes.get("train")
    for label, category in enumerate(categories):
        subject = f"class {category.name!r}"
        if not total[label]:
            findings.add("category-unused", f"{subject} (id {category.id}) has no boxes", file=file)
        elif train is not None and not train[label]:
            splits = ", ".join(name for name, n in boxes.items() if n[label])
            findings.add("category-only-val", f"{subject} has boxes in {splits} but none in train", file=file)
        elif train is not None and train[label] < FEW_BOXES:
            findings.add("category-few", f"{subject} has {counted(int(train[label]), 'box')} in train", file=file)
    ids = sorted(c.id for c in categories)
    if ids not in (list(range(count)), list(range(1, count + 1))):
        mapped = f"{counted(count, 'class')} with ids from {ids[0]} to {ids[-1]}; they are mapped to 0 to {count - 1}"
        findings.add("category-gaps", f"has {mapped}", file=file)
    present = np.flatnonzero(total)
    if len(present) > 1:
        most, least = int(total.argmax()), int(present[total[present].argmin()])
        if total[most] > IMBALANCE * total[least]:
            findings.add(
                "category-imbalance",
                f"class {categories[most].name!r} has {counted(int(total[most]), 'box')} "
                f"and {categories[least].name!r} {total[least]:,}",
                file=file,
            )


def _check_names(names: Sequence[str], dataset: RawDataset, file: str) -> None:
    """Report names that are equal, or differ only in case, spaces or one letter."""
    exact: dict[str, list[int]] = defaultdict(list)
    for label, name in enumerate(names):
        exact[name].append(label)
    for name, labels in exact.items():
        if len(labels) > 1:
            ids = " and ".join(str(dataset.categories[label].id) for label in labels)
            dataset.findings.add("category-duplicate-name", f"the ids {ids} are both named {name!r}", file=file)
    for a, b in _similar_names(list(exact)):
        dataset.findings.add("category-similar-names", f"the classes {a!r} and {b!r} have similar names", file=file)


def _similar_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of different names that are equal but for case, punctuation, spaces or one letter.

    Two words differ by at most one letter if one equals the other with a letter removed, or if both are equal once
    the letter at the same index is removed. Digits are never ignored: `bolt1` and `bolt2` are different classes.
    """
    by_word: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_word["".join(c for c in name.casefold() if c.isalnum()) or name].append(name)
    pairs = {(group[0], other) for group in by_word.values() for other in group[1:]}
    with_gap: dict[tuple[str, int], list[str]] = defaultdict(list)
    for word in by_word:
        if len(word) > MAX_NAME_LENGTH:
            continue
        for index, letter in enumerate(word):
            if letter.isdigit():
                continue
            shorter = word[:index] + word[index + 1 :]
            if shorter in by_word and len(shorter) >= 3:
                pairs.add((by_word[shorter][0], by_word[word][0]))
            if len(word) >= 5:
                with_gap[shorter, index].append(word)
    for words in with_gap.values():
        pairs.update((by_word[words[0]][0], by_word[word][0]) for word in words[1:])
    return sorted(pairs)
