"""Find pictures that are the same, or nearly so: frames of a video, copies that were resized or compressed again.

Each picture is reduced to 32x32 grey values. The signs of its 63 lowest cosine frequencies make a hash; pictures
whose hashes differ in a few bits are compared by the grey values themselves, brightness and contrast set aside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

THUMB = 32
"""Side of the grey thumbnails."""

_HASH_SIDE = 8
_MAX_BITS = 8
_MAX_DIFFERENCE = 0.2
"""Copies compressed or resized again stay below 0.1, unrelated pictures of one microscope lie above 0.59."""
_FLAT = 2.0
_BRUTE = 4096
_BANDS = 8
_BUCKET = 3000


def near_groups(thumbs: NDArray[np.uint8]) -> list[list[int]]:
    """Return groups of pictures that look nearly the same, each in ascending order.

    Args:
        thumbs: (N, 32, 32) uint8, grey.

    Returns:
        groups of at least two positions; a chain of small steps ends in one group.
    """
    if len(thumbs) < 2:
        return []
    hashes = hash_thumbs(thumbs)
    values = thumbs.reshape(len(thumbs), -1).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1)
    textured = spread >= _FLAT
    values /= np.maximum(spread, 1e-6)[:, None]
    # Flat pictures (all black, all white) have no structure that could be compared: they are never alike.
    usable = np.flatnonzero(textured)
    joined = Joined(len(thumbs))
    for first, second in _candidates(hashes[usable]):
        a, b = usable[first], usable[second]
        for start in range(0, len(a), 65536):
            part = slice(start, start + 65536)
            # Half the mean squared difference of standardised pictures is one minus their correlation.
            difference = np.sqrt(np.mean((values[a[part]] - values[b[part]]) ** 2, axis=1) / 2)
            near = difference <= _MAX_DIFFERENCE
            for one, two in zip(a[part][near].tolist(), b[part][near].tolist(), strict=True):
                joined.join(one, two)
    return joined.groups()


def hash_thumbs(thumbs: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return (N,) 64-bit hashes: signs of the lowest cosine frequencies against their median."""
    positions = np.arange(THUMB)
    frequencies = np.arange(_HASH_SIDE)
    basis = np.cos(np.pi / THUMB * np.outer(frequencies, positions + 0.5)).astype(np.float32)
    hashes = np.empty(len(thumbs), np.uint64)
    weights = np.uint64(1) << np.arange(64, dtype=np.uint64)
    for start in range(0, len(thumbs), 4096):
        spectrum = basis @ thumbs[start : start + 4096].astype(np.float32) @ basis.T
        flat = spectrum.reshape(len(spectrum), 64)
        flat[:, 0] = 0  # brightness
        bits = flat > np.median(flat, axis=1, keepdims=True)
        hashes[start : start + 4096] = (bits * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def _candidates(hashes: NDArray[np.uint64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return pairs whose hashes differ in few bits: all of them for small sets, nearly all for large ones."""
    count = len(hashes)
    pairs = []
    if count <= _BRUTE:
        for start in range(0, count, 512):
            rows = hashes[start : start + 512, None] ^ hashes[None, start:]
            first, second = np.nonzero(_count_bits(rows) <= _MAX_BITS)
            later = second > first
            pairs.append((first[later] + start, second[later] + start))
        return pairs
    # Eight wrong bits can touch all eight bytes, seven cannot: one byte is equal.
    for band in range(_BANDS):
        byte = (hashes >> np.uint64(8 * band)).astype(np.uint8)
        order = np.lexsort((hashes, byte))
        for bucket in np.split(order, np.flatnonzero(np.diff(byte[order])) + 1):
            for start in range(0, len(bucket), _BUCKET):
                part = bucket[start : start + _BUCKET]
                bits = _count_bits(hashes[part][:, None] ^ hashes[part][None])
                first, second = np.nonzero(np.triu(bits <= _MAX_BITS, 1))
                pairs.append((part[first], part[second]))
    return pairs


def _count_bits(values: NDArray[np.uint64]) -> NDArray[np.uint8]:
    if hasattr(np, "bitwise_count"):  # since numpy 2
        counted: NDArray[np.uint8] = np.bitwise_count(values)
    else:
        each = np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, 8), axis=-1)
        counted = each.sum(axis=-1, dtype=np.uint8)
    return counted


class Joined:
    """Joins positions into groups (union-find)."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def root(self, position: int) -> int:
        """Return the group that a position belongs to."""
        while self.parent[position] != position:
            self.parent[position] = self.parent[self.parent[position]]
            position = self.parent[position]
        return position

    def join(self, a: int, b: int) -> None:
        """Put two positions into one group, named after its first."""
        a, b = self.root(a), self.root(b)
        self.parent[max(a, b)] = min(a, b)

    def groups(self) -> list[list[int]]:
        """Return the groups of at least two."""
        members: dict[int, list[int]] = defaultdict(list)
        for position in range(len(self.parent)):
            members[self.root(position)].append(position)
        return [group for group in members.values() if len(group) > 1]


def exact_groups(digests: Sequence[bytes]) -> list[list[int]]:
    """Return groups of positions with the same digest; an empty digest is like no other."""
    members: dict[bytes, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        if digest:
            members[digest].append(position)
    return [group for group in members.values() if len(group) > 1]
