"""Reading ahead: order, bounds, errors and their place."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.infer.prefetch import prefetch, read_ahead


def test_order_and_sizes(tmp_path: Path) -> None:
    paths = []
    for number, size in enumerate([(40, 30), (64, 64), (10, 90)]):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", size, (number * 50, 0, 0)).save(path)
        paths.append(path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    paths.insert(1, tmp_path / "bad.png")
    found = list(prefetch(paths, (32, 64), threads=3))
    assert [f.position for f in found] == [0, 1, 2, 3]
    assert [f.size_wh for f in found] == [(40, 30), None, (64, 64), (10, 90)]
    assert found[1].image is None
    assert "bad.png" in str(found[1].error)
    for entry, red in zip((found[0], found[2], found[3]), (0, 50, 100), strict=True):
        assert entry.error is None
        assert entry.image is not None
        assert entry.image.shape == (32, 64, 3)
        assert (entry.image[..., 0] == red).all()


def test_orientation_is_applied_before_the_stretch(tmp_path: Path) -> None:
    lying = np.zeros((20, 40, 3), np.uint8)
    lying[:, 30:] = 255  # bright on the right
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the right side becomes the bottom
    Image.fromarray(lying).save(path, exif=exif)
    (found,) = prefetch([path], (32, 32))
    assert found.size_wh == (20, 40)
    assert found.image is not None
    assert found.image[-1].mean() > 250 > 5 > found.image[0].mean()


def test_endless_items_are_taken_as_room_allows() -> None:
    taken = []

    def note(number: int) -> int:
        taken.append(number)
        return number * 2

    results = read_ahead(note, itertools.count(), threads=2, ahead=5)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(taken) <= 10 + 5
    results.close()  # type: ignore[attr-defined]
    done = len(taken)
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
    assert len(taken) == done


def test_works_in_parallel() -> None:
    meeting = threading.Barrier(3, timeout=20)  # three must be at work at once, or it breaks
    assert len(list(read_ahead(lambda _: meeting.wait(), range(6), threads=3))) == 6


def test_error_is_raised_at_its_place() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = read_ahead(work, range(5), threads=2)
    assert next(results) == 0
    assert next(results) == 1
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_nothing() -> None:
    assert list(read_ahead(str, [])) == []
