"""Images of every kind are decoded to upright 8-bit RGB, or refused with a clear error."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from rtdetr_cli.errors import DataError
from rtdetr_cli.images.decode import (
    ImageError,
    divisor,
    image_size,
    open_image,
    opened,
    read_image,
    stretch,
)
from tests.images import exif_of, paint, png


def texture(height: int, width: int) -> NDArray[np.uint8]:
    return np.array(paint(0, (width, height)))


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA", "GIF", "JPEG", "AVIF", "JPEG2000"])
def test_every_format_can_be_read(kind: str, tmp_path: Path) -> None:
    image = texture(48, 64)
    how = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95}}.get(kind, {})
    data = encoded(Image.fromarray(image), kind, **how)
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    for source in (data, path):
        got = read_image(source)
        assert got.shape == (48, 64, 3)
        assert got.dtype == np.uint8
        assert got.flags.writeable
        assert np.abs(got.astype(int) - image).mean() <= {"GIF": 12, "JPEG": 2, "AVIF": 3}.get(kind, 0)
        assert image_size(source) == (64, 48)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 2), 90), "PNG", (90, 90, 90)),
        (Image.new("1", (4, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("LA", (4, 2), (90, 10)), "PNG", (90, 90, 90)),
        (Image.new("RGBA", (4, 2), (10, 20, 30, 0)), "PNG", (10, 20, 30)),
        (Image.new("RGB", (4, 2), (10, 20, 30)).quantize(4), "PNG", (10, 20, 30)),
        (Image.new("RGB", (4, 2), (10, 20, 30)).quantize(4), "GIF", (10, 20, 30)),
        (Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("I;16", (4, 2), 0x5AFF), "PNG", (0x5A, 0x5A, 0x5A)),
        (Image.new("I;16", (4, 2), 0x5AFF), "TIFF", (0x5A, 0x5A, 0x5A)),
    ],
    ids=["grey", "bits", "grey-alpha", "alpha", "palette", "palette-gif", "cmyk", "cmyk-jpeg", "16-bit", "16-bit-tiff"],
)
def test_every_mode_becomes_rgb(image: Image.Image, kind: str, expected: tuple[int, int, int]) -> None:
    got = read_image(encoded(image, kind))
    assert got.shape == (image.height, image.width, 3)
    assert np.abs(got.astype(int) - expected).max() <= (2 if kind == "JPEG" else 0)


def test_a_transparent_palette_is_read_without_a_warning() -> None:
    image = Image.new("RGB", (4, 2), (10, 20, 30)).quantize(4)
    assert read_image(encoded(image, "PNG", transparency=b"\x00\x80\xff\xff"))[0, 0].tolist() == [10, 20, 30]


def test_16_bit_color_keeps_the_high_byte() -> None:
    row = b"\x00" + struct.pack(">HHH", 0x1234, 0x5678, 0xFFFF) * 3
    assert read_image(png(3, 2, 16, 2, row * 2))[0, 0].tolist() == [0x12, 0x56, 0xFF]


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(data)[0, 0].tolist() == [250, 0, 0], kind


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32] = (255, 255, 255)  # a white corner at the upper left
    upright[20:, 32:] = (0, 0, 255)
    stored = Image.fromarray(upright)
    if orientation > 1:
        kinds = [
            "FLIP_LEFT_RIGHT",
            "ROTATE_180",
            "FLIP_TOP_BOTTOM",
            "TRANSPOSE",
            "ROTATE_90",
            "TRANSVERSE",
            "ROTATE_270",
        ]
        stored = stored.transpose(Image.Transpose[kinds[orientation - 2]])
    data = encoded(stored, kind, exif=exif_of(orientation), quality=95)
    assert image_size(data) == (64, 40)
    assert np.abs(read_image(data).astype(int) - upright).mean() < 5
    half = read_image(data, reduce_to=(20, 32))
    assert half.shape == ((20, 32, 3) if kind == "JPEG" else (40, 64, 3))
    assert np.abs(half[:8, :12].astype(int) - 255).mean() < 5


@pytest.mark.parametrize("value", [0, 9, 77, 60000])
def test_an_invalid_orientation_is_ignored(value: int) -> None:
    assert image_size(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif_of(value))) == (8, 4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # outside of pytest, `images` filters Pillow's remarks itself
@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00MM\x00*" + b"\xff" * 40]
)
def test_an_image_with_broken_exif_can_be_read(exif: bytes) -> None:
    data = encoded(Image.new("RGB", (8, 4), (9, 9, 9)), "JPEG", exif=exif)
    assert read_image(data).shape == (4, 8, 3)


def faulty() -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(Image.fromarray(texture(64, 64)), "JPEG")
    whole = encoded(Image.fromarray(texture(64, 64)), "PNG")
    return {
        "empty": (b"", "image-empty"),
        "text": (b"this is no image", "image-unreadable"),
        "html": (b"<html><body>404</body></html>", "image-unreadable"),
        "jpeg-half": (jpeg[: len(jpeg) // 2], "image-truncated"),
        "jpeg-headless": (jpeg[:30], "image-truncated"),
        "png-half": (whole[: len(whole) // 2], "image-truncated"),
        "png-overwritten": (whole[:41] + bytes(40) + whole[81:], "image-truncated"),
        "bomb": (png(60000, 60000, 8, 0, b"\x00"), "image-bomb"),
        "just-a-bomb": (png(20000, 9000, 8, 0, b"\x00"), "image-bomb"),
        "float": (encoded(Image.new("F", (4, 4)), "TIFF"), "image-samples"),
        "int32": (encoded(Image.new("I", (4, 4)), "TIFF"), "image-samples"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "image-unreadable"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg' width='3' height='3'/>", "image-unreadable"),
    }


@pytest.mark.parametrize("name", list(faulty()))
def test_each_fault_has_its_code_and_names_the_file(name: str, tmp_path: Path) -> None:
    data, code = faulty()[name]
    path = tmp_path / f"{name}.jpg"
    path.write_bytes(data)
    for source, called in ((path, str(path)), (data, "the image")):
        with pytest.raises(ImageError) as error:
            read_image(source)
        assert error.value.code == code
        assert error.value.message.startswith(called)
        assert "\n" not in error.value.message
        assert isinstance(error.value, DataError)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist") as error:
        image_size(tmp_path / "nothing.png")
    assert error.value.code == "image-missing"
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)


def test_the_size_is_read_from_the_header() -> None:
    assert image_size(encoded(Image.fromarray(texture(64, 64)), "PNG")[:60]) == (64, 64)


def test_exceptions_of_the_caller_are_not_reported_as_image_errors() -> None:
    with pytest.raises(ZeroDivisionError), opened(encoded(Image.new("RGB", (4, 4)), "PNG")):
        1 / 0  # noqa: B018


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(60))
def test_random_damage_gives_an_image_or_an_image_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")[seed % 6]
    data = bytearray(encoded(Image.fromarray(texture(32, 32)), kind))
    for _ in range(int(rng.integers(1, 12))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    with contextlib.suppress(ImageError):
        assert read_image(bytes(data)).ndim == 3


def test_no_file_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "bad.png").write_bytes(b"no")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        image_size(path)
        open_image(path)
        with pytest.raises(ImageError):
            image_size(tmp_path / "bad.png")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_jpegs_decode_to_the_same_bits_as_opencvs(coco21: Path) -> None:
    for path in sorted((coco21 / "images").glob("*.jpg")):
        other = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.array_equal(read_image(path), other), path.name


@pytest.mark.parametrize(
    ("size_wh", "hw", "expected"),
    [
        ((640, 480), (480, 640), 1),
        ((640, 480), (240, 320), 2),
        ((640, 480), (241, 320), 1),
        ((640, 480), (100, 100), 4),
        ((640, 480), (60, 80), 8),
        ((640, 480), (1, 1), 8),
        ((5, 5), (1, 1), 4),
        ((1, 1), (1, 1), 1),
        ((3, 1000), (100, 1), 2),
    ],
)
def test_the_divisor_covers_the_size(size_wh: tuple[int, int], hw: tuple[int, int], expected: int) -> None:
    assert divisor(size_wh, hw) == expected


@pytest.mark.parametrize("size_wh", [(640, 480), (641, 481), (647, 479), (17, 33), (100, 7)])
def test_reduced_decoding_rounds_the_sides_up(size_wh: tuple[int, int]) -> None:
    data = encoded(Image.fromarray(texture(size_wh[1], size_wh[0])), "JPEG")
    for by in (1, 2, 4, 8):
        if min(size_wh) < by:
            continue
        with opened(data) as file:
            assert file.scalable
            assert file.decode(by).size == (-(-size_wh[0] // by), -(-size_wh[1] // by))


@pytest.mark.parametrize("hw", [(64, 64), (320, 320), (96, 160), (480, 640), (800, 700)])
def test_the_stretch_equals_the_published_preprocessing(hw: tuple[int, int]) -> None:
    image = texture(480, 640)
    published = np.array(F.resize(Image.fromarray(image), list(hw), antialias=True))
    assert np.array_equal(stretch(image, hw), published)


def test_pillows_warnings_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff"))
    code = "import pathlib, sys; from rtdetr_cli.images import decode; decode.read_image(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
