"""New splits do not leak, are balanced by class, and depend only on the data and the seed."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.clusters import Sequences, assign_clusters, cut_into_blocks, sequences
from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.duplicates import members_by_label, merge_groups
from rtdetr_cli.checks.split import Resplit, resplit
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.datasets.splits import to_splits
from rtdetr_cli.errors import DataError
from tests.images import paint
from tests.unit.datasets.test_read import parts


def split(folder: Path, fractions: tuple[float, ...], seed: int = 0) -> Resplit:
    report = examine(folder)
    return resplit(report, parts(to_splits(report.raw)), fractions, seed=seed)


def names(dataset: Dataset) -> set[str]:
    return {Path(f).name for f in dataset.file_names}


def test_every_image_is_in_one_split(coco: Any) -> None:
    made = split(coco.write(), (0.5, 0.25, 0.25))
    assert list(made.parts) == ["train", "val", "test"]
    assert {n: len(d) for n, d in made.parts.items()} == {"train": 4, "val": 2, "test": 2}
    together = [f for d in made.parts.values() for f in names(d)]
    assert len(together) == len(set(together)) == 8
    assert sum(len(d.labels) for d in made.parts.values()) == 48


def test_near_duplicates_stay_in_one_split(coco: Any) -> None:
    folder = coco.folder
    # Each image of val becomes a copy of one of train: the same bytes, or compressed again at half the size.
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


def test_the_seed_determines_the_splits(coco: Any) -> None:
    folder = coco.write()
    sides = [names(split(folder, (0.5, 0.5), seed).parts["val"]) for seed in range(6)]
    assert sides[0] == names(split(folder, (0.5, 0.5), 0).parts["val"])
    assert any(side != sides[0] for side in sides)


def _sequences(names: list[str]) -> Sequences:
    return sequences(names, np.ones((len(names), 1), np.int64))


def groups(names: list[str]) -> list[list[int]]:
    return sorted(sorted(group) for group in _sequences(names).groups)


def test_sequences_are_recognized_by_name() -> None:
    cameras = [f"cam{c}_{i:04d}.jpg" for c in range(5) for i in range(3)]
    by_camera = [[3 * c, 3 * c + 1, 3 * c + 2] for c in range(5)]
    assert groups(cameras) == by_camera
    assert groups([name.replace(".jpg", "_x.jpg") for name in cameras]) == by_camera
    assert groups([name.replace(".jpg", "_640x480.jpg") for name in cameras]) == by_camera
    assert groups([name.replace(".jpg", f"_jpg.rf.{i:03x}f.jpg") for i, name in enumerate(cameras)]) == by_camera
    assert groups([f"{i * 7919:08x}-{name}" for i, name in enumerate(cameras)]) == by_camera
    assert groups([f"clip{c}/{i:06d}.jpg" for c in range(5) for i in range(3)]) == by_camera
    assert _sequences([f"IMG_{i:04d}.jpg" for i in range(20)]) == ([], [])
    assert groups(["a_jpg.rf.0f3.jpg", "b_jpg.rf.77a.jpg", "a_jpg.rf.9c1.jpg"]) == [[0, 2]]
    assert groups(["one/001.jpg", "two/001.jpg"]) == []


def test_folders_of_the_old_splits_do_not_divide_a_sequence() -> None:
    names = [
        f"{s}/cam{c}_{2 * i + k}.jpg" for c in range(5) for k, s in enumerate(("train2017", "valid")) for i in (0, 1)
    ]
    assert groups(names) == [[4 * c + k for k in range(4)] for c in range(5)]


def test_large_sequences_are_cut_into_blocks_of_consecutive_frames() -> None:
    names = [f"cam{c}_{i:04d}_x.jpg" for c in (1, 2) for i in range(200)]
    found = _sequences(names)
    assert found.groups == []
    assert [(len(run), block) for run, block in found.runs] == [(200, 20), (200, 20)]
    made = cut_into_blocks(found.runs, np.arange(400))
    assert sorted(i for block in made for i in block) == list(range(400))
    assert [block == list(range(block[0], block[0] + 20)) for block in made] == [True] * 20


def test_runs_end_where_the_numbers_pause_and_random_numbers_form_none() -> None:
    strided = [f"frame_{10 * i}.jpg" for i in (*range(50), *range(200, 250))]
    assert [len(run) for run, _ in _sequences(strided).runs] == [50, 50]
    random = np.random.default_rng(0).choice(581_929, 5000, replace=False)
    assert _sequences([f"{n:012d}.jpg" for n in random]) == ([], [])


def test_near_duplicates_do_not_merge_blocks() -> None:
    pairs = [[20 * i + 3, 20 * i + 25] for i in range(19)] + [[0, 399]]
    blocks = cut_into_blocks([(list(range(400)), 20)], merge_groups(400, pairs))
    groups = members_by_label(merge_groups(400, [*pairs, *blocks]))
    sizes = sorted(len(group) for group in groups)
    assert sum(sizes) == 400
    assert len(sizes) == len(blocks) == 20
    assert sizes[-1] <= 80


def test_a_class_that_only_one_sequence_shows_is_in_both_splits() -> None:
    names = [f"clip{c}/{i:06d}.jpg" for c in range(12) for i in range(40)]
    counts = np.zeros((480, 13), np.int64)
    counts[np.arange(480), np.repeat(np.arange(12), 40)] = 2
    counts[:, -1] = 1
    assert len(_sequences(names).groups) == 12
    found = sequences(names, counts)
    assert (len(found.groups), len(found.runs)) == (0, 12)
    clusters = cut_into_blocks(found.runs, np.arange(480))
    val = counts[
        [i for c, s in zip(clusters, assign_clusters(clusters, counts, (0.8, 0.2), 0), strict=True) if s for i in c]
    ]
    assert val.sum(axis=0).tolist() == [16] * 12 + [96]


LAYOUTS = {
    "two cameras": lambda i: f"cam{1 + i // 60}_{i % 60:04d}.jpg",
    "one camera, with a suffix": lambda i: f"cam0_{i:04d}_x.jpg",
    "a folder of frames": lambda i: f"clip/{i:06d}.jpg",
    "Roboflow": lambda i: f"cam0_{i:04d}_jpg.rf.{i * 7919:08x}.jpg",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_val_of_a_single_sequence_is_a_few_runs(tmp_path: Path, layout: str) -> None:
    images, annotations = [], []
    for i in range(120):
        name = LAYOUTS[layout](i)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paint(i, (96, 64)).save(tmp_path / name)
        images.append({"id": i, "file_name": name, "width": 96, "height": 64})
        box = {"bbox": [10, 10, 30, 30], "area": 900}
        annotations.append({"id": i, "image_id": i, "category_id": 1 + i % 2, **box})
    categories = [{"id": 1, "name": "nut"}, {"id": 2, "name": "washer"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(document))
    vals = []
    for seed in range(3):
        made = split(tmp_path / "all.json", (0.8, 0.2), seed)
        assert made.groups == made.clusters == 20
        val = sorted(made.parts["val"].image_ids.tolist())
        assert len(val) == 24
        assert sum(b - a > 1 for a, b in pairwise(val)) < 4
        vals.append(val)
    assert vals[0] != vals[1] or vals[0] != vals[2], "the seed decides"


def test_rare_class_is_in_both_splits() -> None:
    random = np.random.default_rng(0)
    counts = np.zeros((200, 4), np.int64)
    counts[:, 0] = random.integers(1, 9, 200)
    counts[random.permutation(200)[:20], 1] = 1
    counts[random.permutation(200)[:5], 2] = 3
    counts[:, -1] = 1
    sides = np.asarray(assign_clusters([[i] for i in range(200)], counts, (0.8, 0.2), 0))
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


def test_images_of_a_single_scene_cannot_be_split(coco: Any) -> None:
    for path in (coco.folder / "images").iterdir():
        if path != coco.image:
            shutil.copy(coco.image, path)
    with pytest.raises(DataError, match="form only 1 group") as refused:
        split(coco.write(), (0.5, 0.5))
    assert refused.value.code == "split-impossible"
