"""The fingerprint of a dataset depends on labels and image contents, not on paths and times."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.fingerprint import BLOCK_BYTES, image_digests


def _renumbered(document: dict[str, Any]) -> None:
    ids = {image["id"]: image["id"] + 1000 for image in document["images"]}
    for image in document["images"]:
        image["id"] = ids[image["id"]]
    for annotation in document["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]


@pytest.mark.parametrize("what", ["box", "area", "image id"])
def test_the_fingerprint_depends_on_the_labels(what: str, coco: Any) -> None:
    before = load_splits(coco.write()).fingerprint
    if what == "box":
        coco.box["bbox"][0] += 1
    elif what == "area":
        coco.box["area"] = coco.box["bbox"][2] * coco.box["bbox"][3] / 3
    else:
        _renumbered(coco.documents["train"])
    assert load_splits(coco.write()).fingerprint != before


def test_the_fingerprint_ignores_annotation_ids(coco: Any) -> None:
    before = load_splits(coco.write()).fingerprint
    for annotation in coco.documents["train"]["annotations"]:
        annotation["id"] += 5000
    assert load_splits(coco.write()).fingerprint == before


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Files of many lengths, shorter and longer than the blocks that are read."""
    source = np.random.default_rng(0)
    lengths = (0, 1, BLOCK_BYTES, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 1, 100_000)
    for index, length in enumerate(lengths):
        (tmp_path / f"{index}.jpg").write_bytes(source.bytes(length))
    return [str(tmp_path / f"{index}.jpg") for index in range(len(lengths))]


def test_copies_with_other_times_have_equal_digests(files: list[str], tmp_path: Path) -> None:
    copies = []
    for path in files:
        copies.append(shutil.copyfile(path, tmp_path / ("copy-" + os.path.basename(path))))
        os.utime(copies[-1], (1, 1))
    assert image_digests([str(c) for c in copies]).tolist() == image_digests(files).tolist()
    assert len(set(image_digests(files).tolist())) == len(files)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_changed_image_of_the_same_length_is_detected(files: list[str], place: str) -> None:
    before = image_digests(files)
    for path in files[1:]:
        content = bytearray(Path(path).read_bytes())
        content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
        Path(path).write_bytes(content)
    assert (image_digests(files) != before).tolist() == [False, True, True, True, True, True]


def test_of_many_images_some_are_opened_and_all_lengths_count(files: list[str]) -> None:
    before = image_digests(files, max_read=3)
    for path in files[2:4]:
        content = bytearray(Path(path).read_bytes())
        content[0] ^= 1
        Path(path).write_bytes(content)
    Path(files[5]).write_bytes(b"shorter")
    assert (image_digests(files, max_read=3) != before).tolist() == [False, False, True, False, False, True]


def test_a_missing_image_is_detected(files: list[str]) -> None:
    before = image_digests(files)
    Path(files[0]).unlink()
    Path(files[5]).unlink()
    assert (image_digests(files) != before).tolist() == [True, False, False, False, False, True]
    assert len(image_digests([])) == 0
