"""Detect changes of a dataset: one hash over its labels, and a small one for each image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.datasets.records import Dataset

BLOCK_BYTES = 4096
"""An image's hash covers its length and three blocks of this size: at the beginning, in the middle and at the end.

Reading whole images would take minutes for a large dataset, and modification times change when it is copied.
Compressed images of the same length that agree in all three blocks are the same in practice; a BMP that was edited
elsewhere is missed.
"""

MAX_READ = 20_000
"""Of more images than this, only every second, third, ... is opened, and of the others only the length counts: a disk
that has to seek takes 10 ms per image. With cached files 5,000 images take 0.2 s and 100,000 take 1.3 s.
"""


def fingerprint(datasets: Mapping[str, Dataset]) -> str:
    """Return sha256 over categories, file names, image ids, sizes, boxes, areas and classes of every split.

    Annotation ids are left out, because neither training nor evaluation depends on them.
    """
    digest = hashlib.sha256()
    for name in ("train", "val", "test"):
        dataset = datasets.get(name)
        if dataset is None:
            continue
        digest.update(json.dumps([name, [(c.id, c.name) for c in dataset.categories]]).encode())
        for file_name in dataset.file_names:
            digest.update(file_name.encode("utf-8", "surrogateescape") + b"\0")
        boxes = (dataset.offsets, dataset.labels, dataset.boxes_xyxy_px, dataset.areas, dataset.crowd)
        for values in (dataset.image_ids, dataset.sizes_wh, *boxes):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def image_digests(paths: Sequence[str], *, max_read: int = MAX_READ) -> NDArray[np.uint64]:
    """Return a hash of each image's content, whatever its path and modification time.

    Args:
        paths: N images.
        max_read: images that are opened; of the others only the length counts.

    Returns:
        (N,) uint64; images that cannot be read have the same hash as a missing one.
    """
    step = -(-len(paths) // max(1, max_read)) or 1
    found = b"".join(_digest(path, opened=index % step == 0) for index, path in enumerate(paths))
    return np.frombuffer(found, "<u8").astype(np.uint64)


def _digest(path: str, *, opened: bool) -> bytes:
    try:
        if not opened:
            return _sum(os.stat(path).st_size, b"")
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            starts = range(0, size, BLOCK_BYTES) if size <= 3 * BLOCK_BYTES else (0, size // 2, size - BLOCK_BYTES)
            blocks = []
            for start in starts:
                file.seek(start)
                blocks.append(file.read(BLOCK_BYTES))
            return _sum(size, b"".join(blocks))
    except OSError:
        return _sum(-1, b"")


def _sum(size: int, content: bytes) -> bytes:
    return hashlib.blake2b(size.to_bytes(8, "little", signed=True) + content, digest_size=8).digest()
