"""The script that evaluates real published files, on a made COCO of ten images and a small made file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.weights import catalogue, hub
from rtdetr_cli.weights.catalogue import Published
from tests import published  # type: ignore[attr-defined]


@pytest.fixture
def coco(shapes: Any, tmp_path: Path) -> Path:
    """Ten images that the small trained detector knows, laid out as COCO is."""
    source = shapes.write_dataset(tmp_path / "made")
    document = json.loads(source.read_text())
    document["images"] = document["images"][:10]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/val2017").mkdir()
    for image in document["images"]:
        name = Path(image["file_name"]).name
        next(source.parent.rglob(name)).rename(tmp_path / "coco/val2017" / name)
        image["file_name"] = name
    (tmp_path / "coco/annotations/instances_val2017.json").write_text(json.dumps(document))
    return tmp_path / "coco"


def test_it_prints_our_ap_beside_the_published_one(
    coco: Path, shapes_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Published("small", "small.pth", "tiny", "coco", ap=0.5)
    known = {"small": entry, "backbone": replace(entry, name="backbone", file="b.pth", data="imagenet", ap=None)}
    for module in (catalogue, published):
        monkeypatch.setattr(module, "catalogue", lambda: known)
    monkeypatch.setattr(hub, "fetch", lambda name, **options: shapes_model)
    assert published.main(["--weights", "small", "--coco", str(coco), "--device", "cpu"]) == 0
    name, ours, theirs, difference = capsys.readouterr().out.splitlines()[1].split()
    assert (name, theirs) == ("small", "0.500")
    assert 0.5 < float(ours) <= 1
    assert float(difference) == pytest.approx(float(ours) - 0.5, abs=1e-3)
    known["small"] = replace(entry, ap=1.0)
    assert published.main(["--weights", "all", "--coco", str(coco), "--device", "cpu"]) == (
        6 if float(ours) < 0.997 else 0
    )
    assert published.main(["--weights", "backbone", "--coco", str(coco)]) == 6
    assert published.main(["--weights", "smal", "--coco", str(coco)]) == 4
