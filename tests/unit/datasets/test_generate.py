"""The generated dataset: reproducible, with tight boxes, and as varied as documented."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.generate import NAMES, SMALLEST_PX, generate_dataset, generate_image


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def test_both_splits_load_without_warnings(tmp_path: Path) -> None:
    folder = generate_dataset(tmp_path / "new" / "folder", train=40, val=10, imgsz=96, seed=1)
    splits = load_splits(folder)
    assert (len(splits.train), len(splits.val), splits.split_made) == (40, 10, False)
    assert tuple(c.name for c in splits.categories) == NAMES
    assert len(NAMES) >= 4
    assert {f.severity for f in splits.findings} <= {"info"}


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    made = [
        digest(generate_dataset(tmp_path / str(number), train=4, val=2, imgsz=96, seed=seed))
        for number, seed in enumerate((7, 7, 8))
    ]
    assert made[0] == made[1] != made[2]


def test_a_larger_dataset_starts_with_the_same_images_and_splits_share_none(tmp_path: Path) -> None:
    few = generate_dataset(tmp_path / "few", train=3, val=3, imgsz=96)
    many = generate_dataset(tmp_path / "many", train=5, val=3, imgsz=96)
    for name in ("train-00002.jpg", "val-00002.jpg"):
        assert (few / "images" / name).read_bytes() == (many / "images" / name).read_bytes()
    hashes = [hashlib.sha256(p.read_bytes()).digest() for p in (many / "images").iterdir()]
    assert len(set(hashes)) == 8


def test_sizes_counts_and_overlaps() -> None:
    sides, per_image, labels = [], [], []
    overlaps = cut = 0
    for seed in range(300):
        image, boxes, own = generate_image(np.random.default_rng(seed), (192, 192))
        assert image.shape == (192, 192, 3)
        assert image.dtype == np.uint8
        assert ((boxes >= 0) & (boxes <= 192)).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 2).all()
        sides += (boxes[:, 2:] - boxes[:, :2]).max(1).tolist()
        per_image.append(len(boxes))
        labels += own.tolist()
        cut += int(((boxes == 0) | (boxes == 192)).any(1).sum())
        low, high = np.maximum(boxes[:, None, :2], boxes[:, :2]), np.minimum(boxes[:, None, 2:], boxes[:, 2:])
        common = np.clip(high - low, 0, None).prod(2)
        overlaps += int((common[np.triu_indices(len(boxes), 1)] > 0).sum())
    assert SMALLEST_PX <= min(sides) < 20
    assert 90 < max(sides) <= 96.001
    assert 0.05 < np.mean(np.array(per_image) == 0) < 0.2
    assert max(per_image) >= 6
    assert overlaps > 30
    assert cut > 20
    counts = np.bincount(labels, minlength=len(NAMES))
    assert counts.min() > 0.7 * counts.mean()


def test_boxes_are_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a plain background, without shadow or noise, the changed pixels are the object."""
    from rtdetr_cli.datasets import generate

    background = np.full((192, 192, 3), 128, np.float32)
    worst = 0.0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        label = seed % len(NAMES)
        outline = generate._outline(rng, label, float(rng.uniform(20, 90))) + rng.uniform(0, 192, 2)
        if (outline.max(0) < 12).any() or (outline.min(0) > 180).any():
            continue
        box = generate._box(outline, (192, 192))
        canvas = background.copy()
        monkeypatch.setattr(generate.cv2, "GaussianBlur", lambda mask, *_: np.zeros_like(mask))
        monkeypatch.setattr(generate, "_color", lambda rng, **_: np.full(3, 255, np.float32))
        generate._paint(rng, canvas, outline, hole=NAMES[label] == "ring")
        monkeypatch.undo()
        rows, columns = np.nonzero(np.abs(canvas - background).max(2) > 25)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        worst = max(worst, np.abs(seen - box).max())
    assert worst < 2.5


def test_rectangular_images_and_an_empty_split(tmp_path: Path) -> None:
    folder = generate_dataset(tmp_path, train=2, val=0, imgsz=(64, 128))
    assert not (folder / "val.json").exists()
    document = json.loads((folder / "train.json").read_text())
    assert {(i["width"], i["height"]) for i in document["images"]} == {(128, 64)}
    with Image.open(folder / document["images"][0]["file_name"]) as image:
        assert image.size == (128, 64)


def test_too_small_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too small"):
        generate_dataset(tmp_path, imgsz=60)


def test_color_does_not_reveal_the_class() -> None:
    """The mean color of every class is the same within chance."""
    means: dict[int, list[float]] = {label: [] for label in range(len(NAMES))}
    for seed in range(300):
        image, boxes, labels = generate_image(np.random.default_rng(seed), (96, 96))
        for (x0, y0, x1, y1), label in zip(boxes.astype(int), labels, strict=True):
            if NAMES[label] != "ring":  # its middle shows the background
                means[int(label)].append(float(image[y0 : y1 + 1, x0 : x1 + 1].mean()))
    averages = [np.mean(m) for m in means.values() if m]
    assert max(averages) - min(averages) < 15
