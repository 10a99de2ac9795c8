"""Images for tests: textures, orientations, and files that Pillow cannot write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def paint(seed: int, size: tuple[int, int]) -> Image.Image:
    """Return a textured image, different for every seed; `size` is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def exif_of(orientation: int) -> bytes:
    """Return EXIF data that state an orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def save_with_orientation(path: Path, orientation: int) -> None:
    """Let an image file state an orientation; its pixels stay as they are stored."""
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif_of(orientation))


def png(width: int, height: int, depth: int, colour: int, raw: bytes) -> bytes:
    """Return a PNG of any header, of kinds too that Pillow cannot save."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
