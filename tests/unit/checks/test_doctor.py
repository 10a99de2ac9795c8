"""What `examine` returns, with threads and processes; near duplicates; line numbers of large files."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks import duplicates, images
from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.duplicates import THUMBNAIL, members_by_label, merge_groups, near_groups
from rtdetr_cli.checks.images import inspect_image
from rtdetr_cli.checks.repair import repair
from rtdetr_cli.datasets.json_text import lines_of


def test_processes_and_threads_give_the_same_report(coco: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (coco.folder / "images/train_1.jpg").write_bytes(b"nothing")
    folder = coco.write()
    threads = examine(folder)
    monkeypatch.setattr(images, "cpu_count", lambda: 2)
    monkeypatch.setattr(images, "_MAX_THREADS", 1)
    monkeypatch.setattr(images, "_MIN_IMAGES_PER_PROCESS", 1)
    processes = examine(folder, processes=True)
    assert threads.to_json() == processes.to_json()
    assert threads.image_info == processes.image_info


def test_progress_counts_every_image(coco: Any) -> None:
    calls: list[int] = []

    @contextmanager
    def progress(total: int, what: str) -> Iterator[Any]:
        calls.append(total)
        yield SimpleNamespace(advance=lambda: calls.append(1))

    examine(coco.write(), progress=progress)
    assert calls == [8, *[1] * 8]


def test_report_is_plain_json(coco: Any) -> None:
    coco.box["bbox"] = [float("nan"), 1, 1, 1]
    document = examine(coco.write()).to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["counts"]["error"] == 1
    assert document["dataset"]["per_class"][0] == {"id": 1, "name": "nut", "boxes": {"train": 12, "val": 12}}


def test_most_severe_code_comes_first(coco: Any) -> None:
    coco.train["annotations"][0]["iscrowd"] = 1
    coco.train["annotations"][1]["bbox"] = [0, 0, 0, 0]
    coco.train["annotations"][2]["bbox"] = [0, 0, -1, 1]
    assert list(examine(coco.write()).by_code()) == ["box-inverted", "box-zero-size", "box-crowd"]


def test_codes_of_one_severity_are_sorted_by_what_they_cost(coco: Any) -> None:
    for annotation in coco.train["annotations"][:3]:
        annotation["bbox"] = [0, 0, 0, 0]
    coco.val["images"][0]["file_name"] = "train_3.jpg"
    coco.train["images"][0]["width"] = 95
    codes = list(examine(coco.write(), decode=True).by_code())
    assert codes.index("image-size") < codes.index("image-leak") < codes.index("box-zero-size")


@pytest.mark.parametrize("change", ["half size", "JPEG again", "brighter", "PNG"])
def test_changed_copies_are_near_duplicates(bccd: Path, tmp_path: Path, change: str) -> None:
    thumbnails = []
    paths = sorted((bccd / "JPEGImages").iterdir())[:40]
    for path in paths:
        with Image.open(path) as image:
            copy = {
                "half size": lambda im: im.resize((320, 240), Image.Resampling.BICUBIC),
                "JPEG again": lambda im: im.resize((600, 450)),
                "brighter": lambda im: im.point(lambda v: min(255, int(1.1 * v + 9))),
                "PNG": lambda im: im.copy(),
            }[change](image)
        changed = tmp_path / f"{path.stem}{'.jpg' if change == 'JPEG again' else '.png'}"
        copy.save(changed)
        thumbnails += [inspect_image(path).thumbnail, inspect_image(changed).thumbnail]
    groups = near_groups(np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL, THUMBNAIL))
    pairs = {frozenset(group) for group in groups}
    # 37 and 38 show the same field of view, so they form one group with their copies.
    names = [p.stem for p in paths]
    twins = {names.index(n) for n in ("BloodImage_00037", "BloodImage_00038") if n in names}
    others = [i for i in range(len(paths)) if i not in twins]
    assert all(frozenset((2 * i, 2 * i + 1)) in pairs for i in others)
    assert len(pairs) == len(others) + bool(twins)


def test_plain_images_are_never_near_duplicates() -> None:
    assert near_groups(np.full((50, THUMBNAIL, THUMBNAIL), 7, np.uint8)) == []
    assert near_groups(np.zeros((0, THUMBNAIL, THUMBNAIL), np.uint8)) == []


def test_near_groups_equal_those_of_all_pairwise_correlations(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    side = (THUMBNAIL, THUMBNAIL)
    coarse = random.integers(0, 256, (300, 4, 4), np.uint8)
    originals = np.stack([np.asarray(Image.fromarray(c).resize(side, 3)) for c in coarse])
    noisy = np.clip(originals[:80].astype(int) + random.integers(-6, 7, (80, *side)), 0, 255).astype(np.uint8)
    thumbnails = np.concatenate([originals, noisy])
    assert near_groups(thumbnails) == [[i, 300 + i] for i in range(80)]
    monkeypatch.setattr(duplicates, "_ROWS_PER_BLOCK", 37)
    monkeypatch.setattr(duplicates, "MAX_DIFFERENCE", 0.6)
    correlation = np.corrcoef(thumbnails.reshape(len(thumbnails), -1).astype(float))
    pairs = np.argwhere(np.triu(1 - correlation <= 0.36, 1)).tolist()
    expected = [group for group in members_by_label(merge_groups(len(thumbnails), pairs)) if len(group) > 1]
    assert near_groups(thumbnails) == expected


def test_lines_of_positions() -> None:
    for text in ("a\nbc\n\nd", "ä\nbc\n\nd", "abcd"):
        starts = array("q", [m.start() for m in re.finditer(r"\w+", text)])
        assert lines_of(text, starts).tolist() == [text.count("\n", 0, s) + 1 for s in starts]
    assert lines_of("", array("q")).tolist() == []


def test_many_equal_boxes_take_bounded_time(coco: Any) -> None:
    base = coco.box
    coco.train["annotations"] += [{**base, "id": 10_000 + i} for i in range(20_000)]
    report = examine(coco.write(indent=None), decode=False)
    assert len(report.by_code()["box-duplicate"]) == 20_000


@pytest.mark.parametrize("where", ["images elsewhere", "annotations folder", "YOLO path"])
def test_repair_of_datasets_in_several_places(coco: Any, yolo: Any, tmp_path: Path, where: str) -> None:
    images = None
    if where == "YOLO path":
        yolo.labels["train/train_0"] += "0 0.5 0.5 0 0\n"
        yolo.yaml = "path: ../nuts-yolo\n" + yolo.yaml
        source = yolo.write() / "data.yaml"
        moved = tmp_path / "configs/nuts.yaml"
        moved.parent.mkdir()
        source.rename(moved)
        source = moved
    else:
        coco.box["bbox"] = [1, 1, 0, 0]
        folder = coco.write()
        if where == "images elsewhere":
            images = tmp_path / "kept"
            (folder / "images").rename(images)
            source = folder
        else:
            (folder / "annotations").mkdir()
            for name in ("train.json", "val.json"):
                (folder / name).rename(folder / "annotations" / name)
            source = folder / "annotations/train.json"
    report = examine(source, images=images)
    done = repair(report, tmp_path / "out")
    again = examine(done.data)
    assert "box-zero-size" not in {f.code for f in again.findings}
    assert again.counts()["error"] == 0
    assert sum(len(s) for s in again.raw.splits.values()) == sum(len(s) for s in report.raw.splits.values())
    changes = json.loads(done.changes_file.read_text())["changes"]
    assert len(changes) == 1 + (where == "YOLO path")
