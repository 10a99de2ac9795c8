"""A user's own augmentation: an Albumentations file; the only module that knows Albumentations."""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.documents import parse_json, read_bounded
from rtdetr_cli.errors import UsageError


def load_pipeline(path: Path) -> str:
    """Read an Albumentations file (JSON or YAML of `to_dict`), try it out, and return it as JSON.

    Raises:
        UsageError: the file cannot be read, or its transforms do not work on images with boxes.
    """
    pipeline = json.dumps(_read(path))
    _try_out(pipeline, path)
    return pipeline


def run_pipeline(
    pipeline: str,
    image: NDArray[np.uint8],
    boxes_xyxy_px: NDArray[np.float64],
    labels: NDArray[np.int64],
    *,
    seed: int,
    name: str,
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]:
    """Apply a pipeline to an image (H, W, 3) and its boxes (N, 4), both of which may change their size.

    `name` is the user's file, for the error message.

    Raises:
        UsageError: the result is not an (H, W, 3) uint8 image.
    """
    transform = _compose(pipeline)
    transform.set_random_seed(seed)
    result = transform(image=image, bboxes=boxes_xyxy_px, labels=labels)
    image = result["image"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
        raise UsageError(
            f"{name}: the transforms must return an (H, W, 3) uint8 image, but they return {kind}",
            hint="remove Normalize and ToTensorV2: scaling to 0..1 is done on the device",
        )
    boxes = np.asarray(result["bboxes"], np.float64).reshape(-1, 4)
    return image, boxes, np.asarray(result["labels"]).astype(np.int64).reshape(-1)


@lru_cache(maxsize=2)
def _compose(pipeline: str) -> Any:
    """Build the transforms with our box format in place of the user's; once per process."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise it asks the network for a newer version of itself
    import albumentations

    built = albumentations.from_dict(json.loads(pipeline))
    is_compose = isinstance(built, albumentations.Compose)
    boxes = albumentations.BboxParams(format="pascal_voc", label_fields=["labels"], min_width=1, min_height=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that color transforms alone don't change the boxes
        return albumentations.Compose(
            built.transforms if is_compose else [built], bbox_params=boxes, p=built.p if is_compose else 1.0, seed=0
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_bounded(path).decode()
        if path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            document = yaml.safe_load(text)
        else:
            document = parse_json(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    except Exception as error:  # yaml.YAMLError, which can only be named where yaml is imported
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("transform"), dict):
        raise UsageError(
            f"{path} has no `transform` entry, so it is not an Albumentations file",
            hint="write one with A.save(A.Compose([...]), path), data_format='json' or 'yaml'",
        )
    return document


def _try_out(pipeline: str, path: Path) -> None:
    """Run the transforms a few times, so that a bad file fails before training starts."""
    image = np.array(Image.effect_noise((128, 96), 40).convert("RGB"), np.uint8)
    boxes = np.array([[8.0, 8, 60, 50], [40, 30, 120, 90]])
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for seed in range(4):
                run_pipeline(pipeline, image.copy(), boxes, np.array([0, 1]), seed=seed, name=str(path))
        # Albumentations only warns about an unknown argument, and ignores it.
        unknown = [str(w.message) for w in caught if "not valid for transform" in str(w.message)]
        if unknown:
            raise ValueError("; ".join(unknown))
    except UsageError:
        raise
    except Exception as error:  # a user's transforms can raise anything
        reason = " ".join(str(error).split())
        raise UsageError(
            f"{path} does not work on an image with boxes: {reason[:300]}",
            hint="every transform must be known to Albumentations 2.0 and must support bounding boxes",
        ) from None
