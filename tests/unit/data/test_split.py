"""New splits do not leak, are spread by class, and depend on the seed and the data alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.data.doctor import examine
from rtdetr_cli.data.read import to_splits
from rtdetr_cli.data.records import Dataset
from rtdetr_cli.data.split import Resplit, place_clusters, resplit, same_sequence
from rtdetr_cli.errors import DataError


def split(folder: Path, shares: tuple[float, ...], seed: int = 0) -> Resplit:
    report = examine(folder)
    splits = to_splits(report.raw)
    parts = {d.split: d for d in (splits.train, splits.val, splits.test) if d is not None}
    return resplit(report, parts, shares, seed=seed)


def names(dataset: Dataset) -> set[str]:
    return {Path(f).name for f in dataset.file_names}


def test_every_picture_lands_once(coco: Any) -> None:
    made = split(coco.write(), (0.5, 0.25, 0.25))
    assert list(made.parts) == ["train", "val", "test"]
    assert {n: len(d) for n, d in made.parts.items()} == {"train": 4, "val": 2, "test": 2}
    together = [f for d in made.parts.values() for f in names(d)]
    assert len(together) == len(set(together)) == 8
    assert sum(len(d.labels) for d in made.parts.values()) == 48


def test_look_alikes_stay_on_one_side(coco: Any) -> None:
    folder = coco.folder
    # Each picture of val becomes a copy of one of train: the same bytes, or compressed again at half the size.
    for i in range(4):
        source, target = folder / f"images/train_{i}.jpg", folder / f"images/val_{i}.jpg"
        if i % 2:
            shutil.copy(source, target)
        else:
            with Image.open(source) as image:
                image.save(target, quality=50)
    coco.write()
    for seed in range(5):
        made = split(folder, (0.5, 0.5), seed)
        assert made.clusters == 4
        for part in made.parts.values():
            stems = {name.split("_")[1] for name in names(part)}
            assert len(part) == 2 * len(stems)


def test_seed_decides_and_repeats(coco: Any) -> None:
    folder = coco.write()
    sides = [names(split(folder, (0.5, 0.5), seed).parts["val"]) for seed in range(6)]
    assert sides[0] == names(split(folder, (0.5, 0.5), 0).parts["val"])
    assert any(side != sides[0] for side in sides)


def test_sequences_are_told_by_name() -> None:
    cameras = [f"cam{c}_{i:04d}.jpg" for c in range(5) for i in range(3)]
    assert sorted(same_sequence(cameras)) == [[3 * c, 3 * c + 1, 3 * c + 2] for c in range(5)]
    numbered = [f"IMG_{i:04d}.jpg" for i in range(20)]
    assert same_sequence(numbered) == []
    copies = ["a_jpg.rf.0f3.jpg", "b_jpg.rf.77a.jpg", "a_jpg.rf.9c1.jpg"]
    assert same_sequence(copies) == [[0, 2]]
    assert same_sequence(["one/001.jpg", "two/001.jpg"]) == []


def test_rare_class_is_in_both_splits() -> None:
    random = np.random.default_rng(0)
    counts = np.zeros((200, 4), np.int64)
    counts[:, 0] = random.integers(1, 9, 200)
    counts[random.permutation(200)[:20], 1] = 1
    counts[random.permutation(200)[:5], 2] = 3
    counts[:, -1] = 1
    sides = np.asarray(place_clusters([[i] for i in range(200)], counts, (0.8, 0.2), 0))
    val = counts[sides == 1].sum(axis=0)
    assert val[-1] == pytest.approx(40, abs=2)
    assert val[1] == 4
    assert val[2] == 3
    assert val[0] / counts[:, 0].sum() == pytest.approx(0.2, abs=0.03)


def test_bccd(bccd: Path) -> None:
    made = split(bccd, (0.7, 0.2, 0.1))
    assert [len(d) for d in made.parts.values()] == pytest.approx([255, 73, 36], abs=4)
    assert sum(len(d) for d in made.parts.values()) == 364
    side = {name: n for n, d in made.parts.items() for name in names(d)}
    assert side["BloodImage_00037.jpg"] == side["BloodImage_00038.jpg"]
    whole = sum(np.bincount(d.labels, minlength=3) for d in made.parts.values())
    for share, part in zip((0.7, 0.2, 0.1), made.parts.values(), strict=True):
        np.testing.assert_allclose(np.bincount(part.labels, minlength=3) / whole, share, atol=0.02)


def test_pictures_that_are_all_one_scene_cannot_be_split(coco: Any) -> None:
    for path in (coco.folder / "images").iterdir():
        if path != coco.picture:
            shutil.copy(coco.picture, path)
    with pytest.raises(DataError, match="form only 1 group") as refused:
        split(coco.write(), (0.5, 0.5))
    assert refused.value.code == "split-impossible"
