"""A user's own Albumentations file: applied to images and boxes, and refused at once if it does not work."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.errors import UsageError
from rtdetr_cli.images.augment import NONE, Augmentation, augment, load_augmentation
from rtdetr_cli.images.decode import opened

FLIP = {"__class_fullname__": "HorizontalFlip", "p": 0.5}
BLUR = {"__class_fullname__": "GaussianBlur", "p": 1.0}
CROP = {"__class_fullname__": "RandomSizedBBoxSafeCrop", "height": 50, "width": 70, "p": 1.0}


def write_pipeline(path: Path, *transforms: dict[str, Any]) -> str:
    document = {
        "__version__": "2.0.8",
        "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": list(transforms), "bbox_params": None},
    }
    if path.suffix == ".json":
        path.write_text(json.dumps(document))
    else:
        import yaml

        path.write_text(yaml.safe_dump(document))
    return str(path)


def run(augmentation: Augmentation, box: list[float], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Augment a noise image of 140x100 pixels with one box of label 3."""
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 140, 3), np.uint8)).save(data, "PNG")
    out = np.empty((3, 64, 64), np.uint8)
    with opened(data.getvalue()) as image:
        boxes, labels = augment(image, np.array([box]), np.array([3]), augmentation, np.random.default_rng(seed), out)
    assert labels.tolist() == [3]
    assert ((boxes >= 0) & (boxes <= 1)).all()
    return out, boxes


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_custom_file_transforms_images_and_boxes(tmp_path: Path, suffix: str) -> None:
    custom = load_augmentation(write_pipeline(tmp_path / f"custom{suffix}", FLIP, BLUR, CROP))
    box = [35.0, 25, 105, 75]
    first, again, other = (run(custom, box, seed) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    plain, _ = run(custom.without_strong(), box, 0)
    assert np.array_equal(plain, run(NONE, box, 0)[0])


def test_a_custom_file_with_color_transforms_only(tmp_path: Path) -> None:
    custom = load_augmentation(write_pipeline(tmp_path / "custom.json", BLUR))
    _, boxes = run(custom, [35.0, 25, 105, 75], 0)
    np.testing.assert_allclose(boxes, [[0.5, 0.5, 0.5, 0.5]], atol=1e-5)


@pytest.mark.parametrize(
    ("transforms", "expected"),
    [
        ([{"__class_fullname__": "NoSuchTransform", "p": 1.0}], "NoSuchTransform"),
        ([{"__class_fullname__": "GaussianBlur", "blurriness": 3, "p": 1.0}], "blurriness"),
        ([{"__class_fullname__": "Normalize", "p": 1.0}], "uint8"),
        ([FLIP, {"__class_fullname__": "Normalize", "p": 1.0}], "uint8"),
        ([{"__class_fullname__": "ToGray", "num_output_channels": 1, "p": 1.0}], "uint8"),
        ([{"__class_fullname__": "RandomCrop", "height": 4000, "width": 4000, "p": 1.0}], "4000"),
    ],
)
def test_a_custom_file_that_does_not_work_is_refused_at_once(
    tmp_path: Path, transforms: list[dict[str, Any]], expected: str
) -> None:
    path = write_pipeline(tmp_path / "bad.json", *transforms)
    with pytest.raises(UsageError) as error:
        load_augmentation(path)
    assert expected in error.value.message
    assert "bad.json" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", '{"transform": 3}'),
        ("a.json", "[" * 100000),
        ("a.yaml", "a: [1"),
        ("a.yaml", "x: 1"),
    ],
)
def test_a_file_that_is_not_an_augmentation_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        load_augmentation(str(tmp_path / name))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="'recipee' is neither an augmentation"):
        load_augmentation("recipee")


def test_a_yaml_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(
        f"transform: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{tmp_path}/ran']]\n"
    )
    with pytest.raises(UsageError):
        load_augmentation(str(path))
    assert not (tmp_path / "ran").exists()
