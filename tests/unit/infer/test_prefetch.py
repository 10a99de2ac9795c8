"""Reading ahead: order, bounds and errors."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

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
    results = list(prefetch(paths, (32, 64)))
    assert [f.position for f in results] == [0, 1, 2, 3]
    assert [f.size_wh for f in results] == [(40, 30), None, (64, 64), (10, 90)]
    assert results[1].image is None
    assert "bad.png" in str(results[1].error)
    for entry, red in zip((results[0], results[2], results[3]), (0, 50, 100), strict=True):
        assert entry.error is None
        assert entry.image.shape == (32, 64, 3)
        assert (entry.image[..., 0] == red).all()


def test_endless_items_are_read_as_far_as_needed() -> None:
    started = []

    def note(number: int) -> int:
        started.append(number)
        return number * 2

    results = read_ahead(note, itertools.count(), threads=2, ahead=5)
    assert [next(results) for _ in range(10)] == list(range(0, 20, 2))
    assert len(started) <= 10 + 5
    results.close()  # type: ignore[attr-defined]
    done = len(started)
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]
    assert len(started) == done


def test_works_in_parallel() -> None:
    meeting = threading.Barrier(3, timeout=20)  # breaks unless three work at the same time
    assert len(list(read_ahead(lambda _: meeting.wait(), range(6), threads=3))) == 6


def test_error_is_raised_when_its_result_is_due() -> None:
    def work(number: int) -> int:
        if number == 2:
            raise ValueError("two")
        return number

    results = read_ahead(work, range(5), threads=2)
    assert next(results) == 0
    assert next(results) == 1
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_no_items() -> None:
    assert list(read_ahead(str, [])) == []
