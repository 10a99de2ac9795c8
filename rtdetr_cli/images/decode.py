"""Read an image as upright RGB, and resize it: the only decoder and the only resize in the project.

Everything reads images through `opened`, so that a file means the same everywhere. Pillow decodes, not OpenCV: on JPEG
both give the same bits in the same time, but OpenCV silently fills the missing part of a truncated file with gray, and
Pillow's resize is the antialiased one that the published weights were trained with. This module never imports torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL import ImageFile as PillowFile

from rtdetr_cli.documents import NotRegularError, require_regular
from rtdetr_cli.errors import DataError

MAX_PIXELS = 178_956_970
"""Larger images are refused as decompression bombs (half a gibibyte when decoded); this is Pillow's own hard limit."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
"""Supported formats. Pillow knows more, but some (EPS) start other programs, which a dataset must not do."""

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c"),
    "TGA": (".tga",),
    "ICO": (".ico",),
}
"""Suffixes of each format, the usual one first."""

IMAGE_SUFFIXES = frozenset(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
"""Suffixes of the files that count as images in a folder."""

EXIF_TAG = 0x0112
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that makes the image upright."""

EXIF_SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

# Pillow's warnings (odd EXIF, an image above half the limit) would interrupt the progress bar; `rtdetr validate`
# reports what matters. They are switched off globally, since a warning filter cannot be set for a single thread.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class ImageError(DataError):
    """An image that cannot be used; `code` says why.

    Codes: `image-missing`, `image-empty` (zero bytes), `image-unreadable` (not an image, or not one of `FORMATS`),
    `image-truncated` (the header is fine but the pixels are incomplete), `image-bomb`, `image-samples` (samples
    without a standard range, such as floats).
    """

    default_code = "image-unreadable"


def read_image(source: Path | bytes, *, reduce_to: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8 RGB, upright.

    EXIF orientation is applied; 16-bit samples keep their high byte; palette, gray and CMYK become RGB; alpha is
    dropped, as in the published preprocessing; of an animation only the first frame is read.

    Args:
        source: a file, or its bytes.
        reduce_to: height and width that suffice. A JPEG is then decoded at the smallest of 1/8, 1/4, 1/2 and 1 that
            still covers both; other formats are decoded in full.

    Raises:
        ImageError: the image is missing, damaged, too large or of an unsupported kind.
    """
    return np.array(open_image(source, reduce_to=reduce_to), np.uint8)


def open_image(source: Path | bytes, *, reduce_to: tuple[int, int] | None = None) -> Image.Image:
    """Decode like `read_image`, but return Pillow's image, which saves a copy if it is cropped or resized."""
    with opened(source) as file:
        return file.decode(file.divisor(reduce_to) if reduce_to is not None else 1)


@contextmanager
def opened(source: Path | bytes) -> Iterator[ImageFile]:
    """Open an image and read its header; `ImageFile.decode` reads the pixels.

    Raises:
        ImageError: the header is missing or damaged, or declares too many pixels.
    """
    with ExitStack() as stack:
        with _faults(source):
            if isinstance(source, Path):
                require_regular(source)
            stream = io.BytesIO(source) if isinstance(source, bytes) else source
            image = stack.enter_context(Image.open(stream, formats=FORMATS))
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            file = ImageFile(image, source)
        yield file


class ImageFile:
    """An open image whose header has been read; it can be decoded once."""

    def __init__(self, image: Image.Image, source: Path | bytes) -> None:
        self._image = image
        self._source = source
        self._orientation = exif_orientation(image)
        width, height = image.size
        # Width and height of the upright image in pixels.
        self.size_wh = (height, width) if self._orientation in EXIF_SIDEWAYS else (width, height)
        # Whether it can be decoded faster at a half, a quarter or an eighth of its size.
        self.scalable = image.format in ("JPEG", "MPO")

    def divisor(self, hw: tuple[int, int]) -> int:
        """Return the largest of 8, 4, 2, 1 by which the sides can be divided and still cover `hw`."""
        return divisor(self.size_wh, hw) if self.scalable else 1

    def decode(self, divisor: int = 1) -> Image.Image:
        """Return the upright RGB image, its sides divided by `divisor` and rounded up.

        Raises:
            ImageError: the pixels are damaged or of an unsupported kind.
        """
        image = self._image
        with _faults(self._source):
            if divisor > 1:
                # Given the sides rounded down, Pillow chooses exactly this divisor.
                image.draft(None, (image.width // divisor, image.height // divisor))
            image.load()
            return upright(_as_rgb(image, _name(self._source)), self._orientation)


def divisor(size_wh: tuple[int, int], hw: tuple[int, int]) -> int:
    """Return the largest of 8, 4, 2, 1 by which an image's sides can be divided and still cover `hw`."""
    return next((d for d in (8, 4, 2) if size_wh[0] // d >= hw[1] and size_wh[1] // d >= hw[0]), 1)


@contextmanager
def partly_decoded(path: Path) -> Iterator[tuple[Image.Image, float]]:
    """Decode what a truncated file still has, for one thread at a time.

    Yields:
        The image as it is stored, its missing part gray or black, and the fraction of its rows that lack their end:
        the last ones whose last pixel has the color of the very last pixel.

    Raises:
        ImageError: nothing can be decoded.
    """
    PillowFile.LOAD_TRUNCATED_IMAGES = True  # Pillow knows no other way than this global
    try:
        with opened(path) as file:
            with _faults(path):
                image = file._image
                image.load()
            ends = np.asarray(image)[:, -1].reshape(image.height, -1)
            different = np.flatnonzero((ends != ends[-1]).any(axis=1))
            present = int(different[-1]) + 1 if len(different) else 0
            yield image, 1 - present / image.height
    finally:
        PillowFile.LOAD_TRUNCATED_IMAGES = False


def complete_truncated(path: Path) -> None:
    """Write a truncated file again so that every decoder reads it; sizes, colors and EXIF stay as they are."""
    with partly_decoded(path) as (image, _):
        exif = {"exif": image.info["exif"]} if "exif" in image.info else {}
        jpeg = image.format in ("JPEG", "MPO")
        whole = io.BytesIO()
        image.save(whole, "JPEG" if jpeg else image.format, **({"quality": "keep"} if jpeg else {}), **exif)
    path.write_bytes(whole.getvalue())


def image_size(source: Path | bytes) -> tuple[int, int]:
    """Return width and height in pixels of the upright image, from its header alone."""
    with opened(source) as file:
        return file.size_wh


def usual_suffix(path: Path) -> str:
    """Return the usual suffix for the content of an image file, such as `.jpg`."""
    with _faults(path), Image.open(path, formats=FORMATS) as image:
        return SUFFIXES[image.format or ""][0]


def stretch(image: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 to height and width `hw`: bilinear, antialiased, without keeping the aspect ratio.

    Equals the published preprocessing. OpenCV's bilinear resize has no antialiasing and differs by 4 gray levels on
    average when it shrinks an image.
    """
    height, width = hw
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR), np.uint8)


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a newly opened image: 2 to 8, or 0 for none; other values are invalid.

    Two formats are special: Pillow rotates a TIFF itself while loading it, and for a PNG without EXIF before its
    pixels it would load the pixels to look for EXIF after them, where an error in them would be lost.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 0
    try:
        value = image.getexif().get(EXIF_TAG, 0)
    except Exception:  # EXIF is untrusted binary data: whatever the parser raises, the pixels may be fine
        return -1
    return value if isinstance(value, int) else -1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image with its EXIF orientation applied; values that EXIF doesn't define are ignored."""
    transpose = EXIF_TRANSPOSES.get(orientation)
    return image if transpose is None else image.transpose(transpose)


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM", "JPEG2000")):
        # Pillow's own conversion clips at 255, which turns a 16-bit image white.
        samples = np.asarray(image).astype(np.uint16)
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        kind = "integer" if mode == "I" else "floating-point"
        raise ImageError(
            f"{name} has 32-bit {kind} samples, which have no standard range",
            hint="save it with 8 or 16 bits per sample",
            code="image-samples",
        )
    if mode in ("P", "PA"):
        # Through RGBA, because Pillow warns about palettes with transparency otherwise; the colors are the same.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _name(source: Path | bytes) -> str:
    return "the image" if isinstance(source, bytes) else str(source)


@contextmanager
def _faults(source: Path | bytes) -> Iterator[None]:
    """Turn whatever decoding raises into an `ImageError` that names the file and the problem."""
    name = _name(source)
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist", code="image-missing") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not an image") from None
    except NotRegularError:
        raise ImageError(f"{name} is a pipe or a device, not an image file") from None
    except PermissionError:
        raise ImageError(f"{name} cannot be read: permission denied") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} has more than {MAX_PIXELS:,} pixels, too many to decode safely",
            hint="scale it down or remove it",
            code="image-bomb",
        ) from None
    except UnidentifiedImageError:
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise ImageError(f"{name} is empty (zero bytes)", code="image-empty") from None
        raise ImageError(f"{name} is not an image of a supported format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's plugins raise anything on broken data: OSError, SyntaxError, struct.error...
        raise ImageError(f"{name} cannot be decoded: {error}", code="image-truncated") from None
