"""From a labelled folder to a detector with the commands that the tool prints itself, for every layout it reads.

The first command is `rtdetr validate FOLDER` (or the zip file); each further one is a line `next: ...` of the one
before. To be fast, `SMALL` is appended to `train`, and `CPU` to `predict`.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.small import FLAGS
from tests.unit.datasets.test_layouts import SPLIT, WHOLE, Tree, samples

CPU = ["--device", "cpu"]
SMALL = [*FLAGS, "--epochs", "1", "--weights", "none"]
MOST_COMMANDS = 5
LAYOUTS = {
    "COCO": "coco in a folder of labels",
    "COCO of a whole": "coco windows",
    "YOLO with data.yaml": "yaml with labels beside the images",
    "YOLO without a yaml": "yolo images/train",
    "VOC": "voc lists",
    "VOC with other names": "voc annots and images",
    "zip": "coco in the folder of each split",
    "CSV": "csv headerless",
    "Labelme": "labelme",
}


@pytest.mark.parametrize(
    "layout",
    [name if name == "YOLO without a yaml" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_from_a_folder_to_detections(rtdetr: Any, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my data"
    _, write = (SPLIT | WHOLE)[LAYOUTS[layout]]
    write(Tree(folder), samples({"train": 24, "val": 8} if LAYOUTS[layout] in SPLIT else {"train": 32}))
    data = shutil.make_archive(str(tmp_path / "shapes"), "zip", folder) if layout == "zip" else folder
    words, commands, last = ["validate", str(data)], 0, ""
    worked = None
    while commands < MOST_COMMANDS:
        ran = rtdetr(*words, *{"train": SMALL, "predict": CPU}.get(words[0], []))
        commands += 1
        worked = ran.code == 0 if worked is None else worked
        last = (ran.err.strip().splitlines() or [""])[-1]
        if words[0] == "predict":
            break
        steps = [shlex.split(line)[2:] for line in ran.err.splitlines() if line.startswith("next: rtdetr ")]
        assert steps, f"{words[0]} printed no next command: {ran.out}{ran.err}"
        words = next((step for step in steps if step[0] == "predict"), steps[0])
    print(f"\nTEN | {layout} | {'yes' if worked else 'no'} | {commands} | {last}")
    assert words[0] == "predict"
    assert ran.code == 0, ran.err
    drawn = [p for p in (tmp_path / "runs/predict-01").rglob("*") if p.suffix in (".png", ".jpg")]
    assert drawn, ran.err
    with Image.open(drawn[0]) as image:
        assert image.size == (64, 48)
    assert (worked, commands) == (True, 3)
