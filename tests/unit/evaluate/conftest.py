"""The public pair of annotations and detections."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.results import read_results
from rtdetr_cli.evaluate.source import choose_split
from rtdetr_cli.evaluate.table import DetectionTable


@pytest.fixture(scope="session")
def pair(eval_pair: Path) -> tuple[Dataset, DetectionTable]:
    """The public pair: 100 images of COCO val2014 with crowds and mask areas, and 734 detections."""
    dataset = choose_split(eval_pair / "ground_truth.json", find_images=False).dataset
    return dataset, read_results(eval_pair / "detections.json", dataset)
