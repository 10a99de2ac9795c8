from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.results import coco_results, read_results

GOOD = {"image_id": 7, "category_id": 3, "bbox": [1, 2, 30, 40], "score": 0.5}


@pytest.fixture
def dataset(make: Any) -> Any:
    return make.dataset(images=2, names=("a", "b"), image_ids=[7, 9], category_ids=(3, 5))


def write(folder: Path, content: Any) -> Path:
    path = folder / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_written_results_are_read_back(tmp_path: Path, make: Any) -> None:
    dataset, table = make.random(seed=1)
    again = read_results(write(tmp_path, coco_results(dataset, table)), dataset)
    np.testing.assert_array_equal(again.image_index, table.image_index)
    np.testing.assert_array_equal(again.labels, table.labels)
    np.testing.assert_allclose(again.boxes_xyxy_px, table.boxes_xyxy_px, atol=2e-3)
    np.testing.assert_allclose(again.scores, table.scores, atol=1e-6)


@pytest.mark.parametrize(
    "row",
    [GOOD, {**GOOD, "image_id": 7.0}, {**GOOD, "image_id": "0000.jpg"}, {**GOOD, "image_id": "0000"}],
    ids=["id", "float", "file", "stem"],
)
def test_images_are_named_by_id_or_file_name(tmp_path: Path, dataset: Any, row: dict[str, Any]) -> None:
    table = read_results(write(tmp_path, [row]), dataset)
    assert (table.image_index[0], table.labels[0]) == (0, 0)
    assert table.boxes_xyxy_px[0].tolist() == [1, 2, 31, 42]


def test_a_whole_coco_file_and_an_empty_list_are_read(tmp_path: Path, dataset: Any) -> None:
    assert len(read_results(write(tmp_path, {"annotations": [GOOD]}), dataset)) == 1
    assert len(read_results(write(tmp_path, []), dataset)) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**GOOD, "image_id": 8}] * 2 + [GOOD], "2 results are for images that the val split does not have: 8"),
        ([{**GOOD, "image_id": "x.jpg"}], "does not have: x.jpg"),
        ([{**GOOD, "image_id": True}], "does not have: True"),
        ([{**GOOD, "category_id": 4}], "1 results have a category that made does not have: 4"),
        ([GOOD, {"image_id": 7}], "entry 2 has no category_id"),
        ([{**GOOD, "bbox": 5}], "entry 1 has bbox 5"),
        ([{**GOOD, "bbox": [1, 2, 3]}], "entry 1 has bbox [1, 2, 3]"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], "which is not a valid detection"),
        ([{**GOOD, "score": float("nan")}], "entry 1 has bbox"),
        ([{**GOOD, "score": None}], "score None"),
        ("[{", ":1 is not JSON"),
        ({"a": 1}, "is not a list of COCO results"),
        ([1], "is not a list of COCO results"),
    ],
)
def test_invalid_results_are_an_error(tmp_path: Path, dataset: Any, rows: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        read_results(write(tmp_path, rows), dataset)
    assert message in raised.value.message


def test_all_kinds_of_problem_are_reported_at_once(tmp_path: Path, dataset: Any) -> None:
    rows = [{**GOOD, "image_id": 1}, {**GOOD, "category_id": 1}, {**GOOD, "score": "high"}]
    with pytest.raises(DataError) as raised:
        read_results(write(tmp_path, rows), dataset)
    assert raised.value.message.count(";") == 2
    with pytest.raises(DataError, match="does not exist"):
        read_results(tmp_path / "none.json", dataset)
