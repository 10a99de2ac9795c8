"""Find images that are the same, or nearly so: frames of a video, copies that were resized or compressed again.

Each image is reduced to 32x32 grey values, brightness and contrast set aside. Two of them are compared by their
lowest cosine frequencies first: what is far apart there is far apart as a whole, so nothing near is missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

THUMB = 32
"""Side of the grey thumbnails."""

MAX_DIFFERENCE = 0.2
"""Root of one minus the correlation. Copies compressed or resized again stay below 0.1; unrelated images of one
microscope lie above 0.59."""

_FREQUENCIES = 8
_FLAT = 2.0
_ROWS = 256
_PAIRS = 8192


def near_groups(thumbs: NDArray[np.uint8]) -> list[list[int]]:
    """Return groups of images that look nearly the same, each in ascending order.

    Args:
        thumbs: (N, 32, 32) uint8, grey.

    Returns:
        groups of at least two positions; a chain of small steps ends in one group.
    """
    values = thumbs.reshape(len(thumbs), THUMB * THUMB).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    spread = values.std(axis=1)
    # Flat images (all black, all white) have no structure that could be compared: they are never alike.
    usable = np.flatnonzero(spread >= _FLAT)
    values = values[usable] / spread[usable, None]
    # Half the squared distance of standardised images, over their pixels, is one minus their correlation.
    limit = 2 * MAX_DIFFERENCE**2 * THUMB * THUMB
    group = np.arange(len(usable))
    for first, second in _candidates(values, limit):
        # Of a thousand frames of one scene, half a million pairs are near; a thousand of them tell all.
        apart = group[first] != group[second]
        first, second = first[apart], second[apart]
        near = np.square(values[first] - values[second]).sum(axis=1) <= limit
        for one, two in zip(first[near].tolist(), second[near].tolist(), strict=True):
            a, b = group[one], group[two]
            if a != b:
                group[group == max(a, b)] = min(a, b)
    order = np.argsort(group, kind="stable")
    bounds = np.flatnonzero(np.diff(group[order])) + 1
    return [usable[part].tolist() for part in np.split(order, bounds) if len(part) > 1]


def _candidates(values: NDArray[np.float32], limit: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield pairs whose lowest frequencies are no further apart than the squared distance `limit`."""
    positions, frequencies = np.arange(THUMB), np.arange(_FREQUENCIES)
    basis = np.cos(np.pi / THUMB * np.outer(frequencies, positions + 0.5)) * np.sqrt(2 / THUMB)
    basis[0] /= np.sqrt(2)
    basis = basis.astype(np.float32)
    low = (basis @ values.reshape(len(values), THUMB, THUMB) @ basis.T).reshape(len(values), _FREQUENCIES**2)
    # |a - b|^2 <= limit as one product: a b - |a|^2 / 2 - |b|^2 / 2 >= -limit / 2.
    half = np.square(low).sum(axis=1, keepdims=True) / 2
    one = np.ones_like(half)
    left, right = np.concatenate([low, one, -half], axis=1), np.concatenate([low, -half, one], axis=1).T.copy()
    for start in range(0, len(low), _ROWS):
        near = left[start : start + _ROWS] @ right[:, start:] >= -limit / 2 - 1e-2
        first, second = np.divmod(np.flatnonzero(near), near.shape[1])
        later = second > first
        first, second = first[later] + start, second[later] + start
        for part in range(0, len(first), _PAIRS):
            yield first[part : part + _PAIRS], second[part : part + _PAIRS]


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

    def join_all(self, positions: Sequence[int]) -> None:
        """Put positions into one group."""
        for position in positions[1:]:
            self.join(positions[0], position)

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
