"""The input size of the network: `640`, or height first `480x640`."""

from __future__ import annotations

from rtdetr_cli.text import whole_number

STRIDE = 32
"""Stride of the coarsest feature map; both sides of the input are multiples of it."""
LARGEST = 4096


def parse_image_size(value: object) -> tuple[int, int]:
    """Read `640`, `"480x640"` or `[480, 640]` as (height, width) in pixels.

    Raises:
        ValueError: the value is not a size, or a side is not a multiple of 32 from 32 to 4096.
    """
    sides: object = value
    if isinstance(value, str):
        sides = [whole_number(p.strip()) for p in value.lower().split("x")]
    elif isinstance(value, int) and not isinstance(value, bool):
        sides = [value]
    if not isinstance(sides, list | tuple) or len(sides) not in (1, 2) or not all(type(s) is int for s in sides):
        raise ValueError(f"{value!r} is not a size; write 640, or height first 480x640")
    for side in sides:
        if side % STRIDE or not STRIDE <= side <= LARGEST:
            below = min(max(STRIDE, side // STRIDE * STRIDE), LARGEST)
            nearest = sorted({below, min(below + STRIDE, LARGEST)})
            raise ValueError(
                f"{side} is not a multiple of {STRIDE} from {STRIDE} to {LARGEST}; "
                f"the nearest sizes are {' and '.join(map(str, nearest))}"
            )
    return sides[0], sides[-1]
