"""The split that a model is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.errors import DataError
from rtdetr_cli.evaluate.source import choose_split, training_data
from rtdetr_cli.runs import CONFIG, MANIFEST, RunFolder


@pytest.fixture
def single(coco: Any) -> Path:
    """A dataset with a train split of four images only."""
    del coco.documents["val"]
    folder: Path = coco.write()
    return folder


def make_run(path: Path, data: Path, **manifest: Any) -> RunFolder:
    path.mkdir()
    (path / CONFIG).write_text(f'data = "{data}"\nseed = 1\nval_fraction = 0.25\n')
    (path / MANIFEST).write_text(json.dumps(manifest))
    return RunFolder(path)


def test_the_images_that_the_run_held_out(single: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", single, finished="done")
    run.write_val_images(["train_3.jpg"])
    for source in (None, single):
        selected = choose_split(source, model=run.best)
        assert list(selected.dataset.file_names) == ["train_3.jpg"]
        assert "val is the part that was held out in training" in selected.notes[-1]


def test_a_run_of_version_0_1_drew_by_its_seed(single: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", single)
    trained = training_data(run.best)
    assert (trained.legacy_seed, trained.val_images) == (1, None)
    assert list(choose_split(None, model=run.best).dataset.file_names) == ["train_0.jpg"]


def test_all_images_of_a_dataset_that_the_model_does_not_know(single: Path, tmp_path: Path) -> None:
    selected = choose_split(single, model=tmp_path / "model.safetensors")
    assert (len(selected.dataset), selected.notes) == (4, ())


def test_train_and_test_without_val(coco: Any) -> None:
    coco.documents["test"] = coco.documents.pop("val")
    folder = coco.write()
    selected = choose_split(folder)
    assert len(selected.dataset) == 1
    assert "val is the part of train that training would hold out" in selected.notes[0]
    assert len(choose_split(folder, split="test").dataset) == 4


def test_a_split_that_is_missing_is_refused_with_the_command_that_makes_one(coco: Any) -> None:
    folder = coco.write()
    with pytest.raises(DataError) as refused:
        choose_split(folder, split="test")
    assert f"rtdetr validate {folder} --resplit" in refused.value.hint
