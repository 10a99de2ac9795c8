"""Training batches: the same bits for any number of workers and ranks; the cache; errors; worker processes."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rtdetr_cli.batches.examples import ExampleLoader
from rtdetr_cli.batches.loader import Batch, TrainLoader
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, RtdetrError
from rtdetr_cli.images.augment import LIGHT, NONE, RECIPE, load_augmentation

IMAGES = 21


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = generate_dataset(tmp_path_factory.mktemp("loader"), train=IMAGES, val=2, imgsz=(96, 128), seed=3)
    train = load_splits(folder).train
    assert train is not None
    return train


def loader(dataset: Dataset, **how: Any) -> TrainLoader:
    loading = {"workers": 0} | {key: how.pop(key) for key in ("workers", "cache", "cache_budget") if key in how}
    given = {"imgsz": (64, 96), "batch_size": 4, "seed": 5, "augmentation": RECIPE} | how
    return TrainLoader(ExampleLoader(dataset=dataset, **given), **loading)


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and a.image_indices == b.image_indices
        and a.replaced == b.replaced
        and all(torch.equal(x, y) for x, y in zip(a.boxes_cxcywh, b.boxes_cxcywh, strict=True))
        and all(torch.equal(x, y) for x, y in zip(a.labels, b.labels, strict=True))
    )


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def test_shapes_of_a_batch(dataset: Dataset) -> None:
    with loader(dataset, workers=1) as it:
        assert len(it) == 6
        batches = list(it.epoch(0))
    assert len(batches) == 6
    for batch in batches:
        assert batch.images.shape == (4, 3, 64, 96)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert len(batch.boxes_cxcywh) == len(batch.labels) == len(batch.image_indices) == 4
        assert batch.replaced == ()
        for boxes, labels in zip(batch.boxes_cxcywh, batch.labels, strict=True):
            assert boxes.dtype == torch.float32
            assert labels.dtype == torch.int64
            assert boxes.shape == (len(labels), 4)
            assert ((boxes >= 0) & (boxes <= 1)).all()
    drawn = [i for batch in batches for i in batch.image_indices]
    assert sorted(drawn[:IMAGES]) == list(range(IMAGES)), "every image once"
    assert drawn[IMAGES:] == drawn[: len(drawn) - IMAGES], "and the last batch filled from the start"


def test_without_augmentation_images_and_boxes_are_those_of_the_dataset(dataset: Dataset) -> None:
    for batch in loader(dataset, augmentation=NONE).epoch(0):
        for image, boxes, labels, index in zip(
            batch.images, batch.boxes_cxcywh, batch.labels, batch.image_indices, strict=True
        ):
            with Image.open(dataset.path(index)) as file:
                expected = np.array(file.resize((96, 64), Image.Resampling.BILINEAR))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
            truth = dataset.annotations(index)
            assert labels.tolist() == truth.labels.tolist()
            x0, y0, x1, y1 = truth.boxes_xyxy_px.T / np.array([[128], [96], [128], [96]])
            np.testing.assert_allclose(boxes, np.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], 1), atol=1e-6)


def test_strong_operations_can_be_switched_off(dataset: Dataset) -> None:
    strong, weak = (list(loader(dataset, strong_until=until).epoch(0)) for until in (1, 0))
    whole = sum(len(dataset.annotations(i).labels) for batch in weak for i in batch.image_indices)
    assert sum(len(labels) for batch in weak for labels in batch.labels) == whole
    assert sum(len(labels) for batch in strong for labels in batch.labels) < whole, "crops lose some boxes"


def test_a_batch_depends_only_on_seed_epoch_and_index(dataset: Dataset) -> None:
    reference = {epoch: list(loader(dataset, strong_until=2).epoch(epoch)) for epoch in (0, 1, 2)}
    assert not all_same(reference[0], reference[1])
    assert not all_same(reference[0], list(loader(dataset, seed=6).epoch(0)))
    for workers in (1, 2, 4):
        with loader(dataset, strong_until=2, workers=workers) as it:
            for epoch in (1, 0, 2, 0):  # in another order, by the same processes
                assert all_same(list(it.epoch(epoch)), reference[epoch]), (workers, epoch)


def test_the_global_random_state_is_neither_used_nor_changed(dataset: Dataset) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = list(loader(dataset).epoch(0))
    after = (torch.rand(1).item(), np.random.random())
    torch.manual_seed(1)
    np.random.seed(1)
    assert after == (torch.rand(1).item(), np.random.random())
    assert all_same(first, list(loader(dataset).epoch(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_be_resumed_in_the_middle(dataset: Dataset, workers: int) -> None:
    with loader(dataset, workers=workers) as it:
        whole = list(it.epoch(3))
        assert all_same(list(it.epoch(3, start=4)), whole[4:])
        assert list(it.epoch(3, start=6)) == []


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_together_load_the_batch_of_one_process(dataset: Dataset, world: int) -> None:
    one = list(loader(dataset, batch_size=2 * world).epoch(1))
    ranks = [list(loader(dataset, batch_size=2, rank=rank, world_size=world).epoch(1)) for rank in range(world)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
        assert whole.image_indices == tuple(i for part in parts for i in part.image_indices)
        assert all(
            torch.equal(a, b)
            for a, b in zip(whole.boxes_cxcywh, [b for part in parts for b in part.boxes_cxcywh], strict=True)
        )


@pytest.mark.parametrize(("images", "batch", "world"), [(1, 4, 1), (3, 16, 2), (21, 21, 1), (5, 2, 2)])
def test_every_batch_is_full_however_small_the_dataset(dataset: Dataset, images: int, batch: int, world: int) -> None:
    few = dataset.subset(range(images))
    it = loader(few, batch_size=batch, world_size=world)
    batches = list(it.epoch(0))
    assert len(batches) == len(it) == -(-images // (batch * world))
    assert all(len(b.labels) == batch for b in batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_the_cache_changes_no_bit(dataset: Dataset, cache: str, workers: int) -> None:
    reference = [list(loader(dataset).epoch(epoch)) for epoch in range(3)]
    with loader(dataset, cache=cache, workers=workers) as it:
        for epoch in range(3):
            assert all_same(list(it.epoch(epoch)), reference[epoch])
    tight = 5 * 96 * 128 * 3
    with loader(dataset, cache=cache, workers=workers, cache_budget=tight) as it:
        for epoch in range(2):
            assert all_same(list(it.epoch(epoch)), reference[epoch])


def test_a_cached_image_is_not_read_again(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.root, tmp_path / "copy")
    copy = replace(dataset, root=tmp_path / "copy")
    with loader(copy, cache="ram", workers=1, augmentation=LIGHT) as it:
        first = [list(it.epoch(epoch)) for epoch in range(2)]
        shutil.rmtree(tmp_path / "copy")
        assert all_same(list(it.epoch(1)), first[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_custom_transforms_are_reproducible(dataset: Dataset, workers: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "transform: {__class_fullname__: Compose, p: 1.0, transforms: "
        "[{__class_fullname__: HorizontalFlip, p: 0.5}, {__class_fullname__: RandomBrightnessContrast, p: 1.0}]}"
    )
    own = load_augmentation(str(path))
    few = dataset.subset(range(6))
    reference = list(loader(few, augmentation=own).epoch(0))
    with loader(few, augmentation=own, workers=workers) as it:
        assert all_same(list(it.epoch(0)), reference)
    assert not same(reference[0], next(loader(few, augmentation=own).epoch(1)))


def damaged(dataset: Dataset, folder: Path, bad: dict[int, bytes | None]) -> Dataset:
    shutil.copytree(dataset.root, folder)
    copy = replace(dataset, root=folder)
    for index, content in bad.items():
        if content is None:
            copy.path(index).unlink()
        else:
            copy.path(index).write_bytes(content)
    return copy


def test_an_unreadable_image_is_reported_and_replaced(dataset: Dataset, tmp_path: Path) -> None:
    half = dataset.path(7).read_bytes()[:900]
    broken = damaged(dataset, tmp_path / "d", {3: None, 7: half, 9: b""})
    reference = list(loader(dataset).epoch(0))
    found: list[list[Batch]] = []
    for workers in (0, 2):
        with loader(broken, workers=workers) as it:
            found.append(list(it.epoch(0)))
    assert all_same(*found)
    replaced = dict(bad for batch in found[0] for bad in batch.replaced)
    assert set(replaced) == {3, 7, 9}
    assert "does not exist" in replaced[3]
    assert "truncated" in replaced[7]
    assert "empty" in replaced[9]
    assert all(broken.file_names[index] in reason for index, reason in replaced.items())
    for got, expected in zip(found[0], reference, strict=True):
        assert not set(got.image_indices) & {3, 7, 9}
        for row, index in enumerate(expected.image_indices):
            if index not in (3, 7, 9):
                assert torch.equal(got.images[row], expected.images[row]), "the others are what they were"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_if_no_image_can_be_read(dataset: Dataset, tmp_path: Path, workers: int) -> None:
    gone = damaged(dataset, tmp_path / "d", dict.fromkeys(range(IMAGES)))
    with loader(gone, workers=workers) as it, pytest.raises(DataError, match="in a row could not be read") as error:
        next(iter(it.epoch(0)))
    assert error.value.hint


def test_a_killed_worker_is_reported(dataset: Dataset) -> None:
    others = set(psutil.Process().children())
    with loader(dataset, workers=2) as it:
        next(iter(it.epoch(0)))
        for child in set(psutil.Process().children()) - others:
            child.send_signal(signal.SIGKILL)
        time.sleep(0.2)  # an exception here would be one in the middle of a step, or of saving
        with pytest.raises(RtdetrError, match="was killed") as caught:
            list(it.epoch(1))
        assert caught.value.code == "loader-killed"
        with pytest.raises(RtdetrError, match="was killed"):  # and again, not a hang
            list(it.epoch(2))


def test_a_crash_in_a_worker_is_raised_with_its_traceback(dataset: Dataset) -> None:
    odd = replace(RECIPE, photometric=replace(RECIPE.photometric, p="always"))  # type: ignore[arg-type]
    with loader(dataset, workers=1, augmentation=odd) as it, pytest.raises(TypeError, match="Original Traceback"):
        list(it.epoch(0))


@pytest.mark.slow
def test_workers_that_are_spawned_load_the_same_batches(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = list(loader(dataset).epoch(0))
    monkeypatch.setattr(sys, "platform", "darwin")  # no fork there
    with loader(dataset, workers=2, cache="ram") as it:
        assert all_same(list(it.epoch(0)), reference)
        assert all_same(list(it.epoch(0)), reference)


def test_a_dataset_without_images_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="no images"):
        loader(dataset.subset([]))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_larger_than_memory_is_refused(dataset: Dataset, workers: int) -> None:
    # The system grants it at first, and then kills whatever runs.
    before = psutil.virtual_memory().available
    with pytest.raises(RtdetrError, match="not enough memory for a batch of 10000000 images") as caught:
        loader(dataset, batch_size=10_000_000, workers=workers)
    assert caught.value.code == "no-memory"
    assert abs(psutil.virtual_memory().available - before) < 2**31


def test_closing_leaves_no_process_or_descriptor(dataset: Dataset) -> None:
    gc.collect()  # what earlier tests left to it
    before = (descriptors(), len(psutil.Process().children()))
    for how in ({"workers": 2}, {"workers": 1, "cache": "disk"}, {"workers": 0, "cache": "ram"}):
        it = loader(dataset, **how)
        next(iter(it.epoch(0)))
        it.close()
        del it
    unclosed = loader(dataset, workers=1)
    next(iter(unclosed.epoch(0)))
    del unclosed
    gc.collect()
    assert (descriptors(), len(psutil.Process().children())) == before


def test_an_abandoned_epoch_does_not_affect_the_next(dataset: Dataset) -> None:
    reference = list(loader(dataset).epoch(1))
    with loader(dataset, workers=2) as it:
        left = it.epoch(0)
        next(left)
        assert all_same(list(it.epoch(1)), reference)
        with pytest.raises(RuntimeError, match="another epoch was begun"):
            next(left)


def test_batches_do_not_change_while_others_are_loaded(dataset: Dataset) -> None:
    with loader(dataset, workers=2) as it:
        kept = list(it.epoch(0))
        copies = [batch.images.clone() for batch in kept]
        list(it.epoch(1))
        assert all(torch.equal(a.images, b) for a, b in zip(kept, copies, strict=True))


# Without a __main__ guard: the workers must not run the program again.
PROGRAM = """
import os, sys, psutil
from pathlib import Path
from rtdetr_cli.images.augment import NONE
from rtdetr_cli.batches.examples import ExampleLoader
from rtdetr_cli.batches.loader import TrainLoader
from rtdetr_cli.checks.load import load_splits
train = load_splits(Path(sys.argv[1])).train
it = TrainLoader(ExampleLoader(dataset=train, imgsz=(64, 64), batch_size=4, seed=0, augmentation=NONE), workers=2)
batch = next(iter(it.epoch(0)))
"""


def run_program(dataset: Dataset, folder: Path, rest: str) -> subprocess.CompletedProcess[str]:
    """Run a program that loads a batch with two workers, followed by the lines `rest`."""
    program = folder / "parent.py"
    program.write_text(PROGRAM + rest)
    command = [sys.executable, "-W", "error", program, dataset.root]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_workers_exit_with_their_parent(dataset: Dataset, tmp_path: Path) -> None:
    rest = "print(*[c.pid for c in psutil.Process().children()], flush=True)\nos.kill(os.getpid(), 9)\n"
    done = run_program(dataset, tmp_path, rest)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    for _ in range(200):
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process outlived its parent")


def test_a_program_that_exits_without_closing_prints_nothing(dataset: Dataset, tmp_path: Path) -> None:
    done = run_program(dataset, tmp_path, "print(len(batch.labels))\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


@pytest.mark.slow
def test_memory_does_not_grow_over_epochs(dataset: Dataset) -> None:
    def private(processes: list[psutil.Process]) -> int:
        return sum(p.memory_full_info().uss for p in processes)

    with loader(dataset, workers=2, imgsz=(320, 320), cache="ram") as it:
        for epoch in range(20):
            list(it.epoch(epoch))
        children = psutil.Process().children()
        ours = psutil.Process()
        before = private(children), private([ours])
        for epoch in range(20, 220):
            for _ in it.epoch(epoch):
                pass
        after = private(children), private([ours])
    assert after[0] - before[0] < 20 << 20
    assert after[1] - before[1] < 20 << 20
