"""Compare the output of `predict` for an image file with the detections of the official code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCORE, PIXELS, SHARE = 1e-4, 0.05, 0.98  # the limits of parity/README.md for float32 on a CPU
ROUNDED = 0.005 + 1e-6  # the document has hundredths of a pixel


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18", "r18_discrete"])
def test_documents_agree_with_the_official_detections(
    name: str, rtdetr: Callable[..., Any], parity: Path, deterministic: ModuleType, tmp_path: Path
) -> None:
    script = parity / "deterministic.py"
    weights, image = tmp_path / f"{name}.pth", tmp_path / "image.png"
    subprocess.run([sys.executable, script, parity / "keys" / f"{name}.txt", weights], check=True)
    Image.fromarray(deterministic.make_image()).save(image)
    sampling = "discrete" if name.endswith("discrete") else "bilinear"
    ran = rtdetr(
        *("predict", image, "--weights", weights, "--sampling", sampling, "--conf", 0, "--max-det", 300),
        *("--no-save", "--json"),
        code=0,
    )
    found = json.loads(ran.out)
    expected = np.load(parity / f"{name}.npz")
    width, height = (int(n) for n in expected["size"].ravel())
    assert (found["width"], found["height"]) == (width, height)
    boxes = np.array([row["box_xyxy"] for row in found["detections"]])
    scores = np.array([row["score"] for row in found["detections"]])
    category_ids = np.array([row["category_id"] for row in found["detections"]])
    # The official labels are COCO's ids, and the official boxes are not clipped to the image.
    clipped = np.clip(expected["det_boxes"].reshape(-1, 4), 0, [width, height, width, height])
    matched = 0
    for box, score, category_id in zip(
        clipped, expected["det_scores"].ravel(), expected["det_labels"].ravel(), strict=True
    ):
        near = np.abs(boxes - box).max(axis=1) <= PIXELS + ROUNDED
        matched += bool(np.any(near & (np.abs(scores - score) <= SCORE) & (category_ids == category_id)))
    assert matched / len(clipped) >= SHARE
