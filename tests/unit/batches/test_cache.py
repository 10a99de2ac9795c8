"""Shared memory and the image cache: pixels come back bit for bit, and the budget is respected."""

from __future__ import annotations

import copy
import gc
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli import machine
from rtdetr_cli.batches.cache import ImageCache, SharedBlock
from rtdetr_cli.images.decode import ImageError, open_image


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (61, 83, 3), np.uint8)).resize((333, 245)).save(path)
    return path


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_block_is_shared_with_a_child_that_inherits_it(on_disk: bool, tmp_path: Path) -> None:
    block = SharedBlock(100_000, folder=tmp_path if on_disk else None)
    assert list(tmp_path.iterdir()) == [], "the file has no name, so it cannot be left behind"
    assert block.reserve(0, 100_000)
    a = block.array(np.int64, (100,), 800)
    child = os.fork()
    if not child:
        a[:] = np.arange(100)
        os._exit(0)
    os.waitpid(child, 0)
    assert a.tolist() == list(range(100))


def test_views_keep_a_block_alive_and_its_descriptor_is_closed() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    view = SharedBlock(4096).array(np.uint8, (10,))
    view[:] = 7
    gc.collect()
    assert view.tolist() == [7] * 10
    del view
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_reserve_returns_false_on_a_full_disk(tmp_path: Path) -> None:
    block = SharedBlock(1 << 20, folder=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        assert block.reserve(0, 4096)
        assert not block.reserve(1 << 20, 1 << 20), "the file may not grow"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert block.reserve(4096, 1 << 19)


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_images_come_back_bit_for_bit(jpeg: Path, kind: str, divisor: int) -> None:
    cache = ImageCache(3, kind=kind, regions=1, budget=10_000_000)
    with cache.opened(1, jpeg) as first:
        fresh = first.decode(divisor)
        assert first.size_wh == (333, 245)
        assert first.stored is not None
    with cache.opened(1, jpeg) as second:
        assert second.decode(divisor).tobytes() == fresh.tobytes()
        assert second.stored is not None, "nobody has published the first"
    cache.publish(first.stored)
    jpeg.unlink()
    with cache.opened(1, jpeg) as third:
        assert third.size_wh == (333, 245)
        assert third.divisor((30, 40)) == 8
        image = third.decode(divisor)
        assert third.stored is None
    assert image.size == fresh.size
    assert image.tobytes() == fresh.tobytes()
    other = 8 if divisor == 1 else 1
    with cache.opened(1, jpeg) as fourth, pytest.raises(ImageError, match="does not exist"):
        fourth.decode(other)


def test_each_scale_is_a_separate_entry(jpeg: Path) -> None:
    cache = ImageCache(1, kind="ram", regions=1, budget=10_000_000)
    for divisor in (4, 1, 2):
        with cache.opened(0, jpeg) as image:
            image.decode(divisor)
            assert image.stored is not None
            cache.publish(image.stored)
    for divisor in (1, 2, 4):
        expected = open_image(jpeg, reduce_to=(245 // divisor, 333 // divisor))
        with cache.opened(0, jpeg) as image:
            assert image.decode(divisor).tobytes() == expected.tobytes()


def test_a_png_is_never_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300)).save(tmp_path / "a.png")
    cache = ImageCache(1, kind="ram", regions=1, budget=1_000_000)
    for _ in range(2):
        with cache.opened(0, tmp_path / "a.png") as image:
            assert image.divisor((10, 10)) == 1
            image.decode(1)
            if image.stored is not None:
                cache.publish(image.stored)


def test_the_budget_covers_all_regions_together(jpeg: Path) -> None:
    size = 333 * 245 * 3
    cache = ImageCache(9, kind="ram", regions=2, budget=5 * size)
    stored = 0
    for region in (0, 1):
        worker = copy.copy(cache)
        worker.region = region
        for image in range(4):
            with worker.opened(4 * region + image, jpeg) as given:
                given.decode(1)
            if given.stored is not None:
                cache.publish(given.stored)
                stored += 1
    assert stored == 4, "two in each half"
    expected = open_image(jpeg).tobytes()
    for image in (0, 1, 4, 5):
        with cache.opened(image, jpeg) as given:
            assert given.decode(1).tobytes() == expected, "the regions do not overlap"


def test_the_default_budget_is_half_of_the_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for kind, folder in (("ram", None), ("disk", tmp_path)):
        free = machine.free_bytes(folder)
        cache = ImageCache(2, kind=kind, regions=3, largest=1000)
        assert 0.3 * free < cache.budget < 0.7 * free


def test_the_memory_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\nactive_file 5\n")
    assert machine.free_bytes(None) == 500_000, "what was read from files is given up"
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_bytes(None) > 10_000_000
