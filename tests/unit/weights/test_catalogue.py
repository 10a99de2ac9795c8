from __future__ import annotations

from collections import Counter

import pytest

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.config.settings import PUBLISHED_WEIGHTS
from rtdetr_cli.errors import ModelError
from rtdetr_cli.weights.catalogue import catalogue, find_by_file, find_published


def test_every_entry_is_sound() -> None:
    entries = catalogue().values()
    assert max(Counter(e.file for e in entries).values()) == 1
    for entry in entries:
        assert entry.preset in preset_names(), entry.name
        assert (entry.ap is None) == entry.is_backbone, entry.name
        assert entry.ap is None or 0.2 < entry.ap < 0.6, entry.name
        assert len(entry.sha256) in (0, 64)
        assert bool(entry.bytes) == bool(entry.sha256), entry.name
        assert entry.file.endswith(".pth")
        assert entry.license == "Apache-2.0"
        assert entry.spec.num_points == (entry.points,) * 3


def test_presets_name_files_of_the_catalogue() -> None:
    for name in preset_names():
        preset = load_preset(name)
        for data, field in PUBLISHED_WEIGHTS.items():
            file = getattr(preset, field)
            if file is None:
                continue
            entry = find_by_file(file)
            assert entry is not None, file
            assert entry.data == data
            assert load_preset(entry.preset).model.model_dump(exclude={"expansion", "eval_layers"}) == (
                preset.model.model_dump(exclude={"expansion", "eval_layers"})
            )  # r50m shares the backbone of r50
        if preset.weights:
            assert find_published(name).file == preset.weights
            assert find_published(name).ap == preset.published_ap


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r18", "r18, COCO, AP 0.481"),
        ("r50m-discrete", "r50m discrete, COCO, AP 0.514"),
        ("r18-sp1", "r18 with 1 sampling point a scale, COCO, AP 0.473"),
        ("r101-objects365-coco", "r101 RT-DETR v1, Objects365, then COCO, AP 0.562"),
        ("hgx", "hgx, COCO, AP 0.547"),
        ("hgh-imagenet", "hgh backbone, ImageNet"),
    ],
)
def test_names_and_descriptions(name: str, text: str) -> None:
    assert find_published(name).description == text
    assert find_published(find_published(name).file).name == name


def test_an_unknown_name() -> None:
    with pytest.raises(ModelError, match=r"no published weights r50-discret \(did you mean r50-discrete\?\)"):
        find_published("r50-discret")
