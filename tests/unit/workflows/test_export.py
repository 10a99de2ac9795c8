"""Plan an export: what is refused before any work is tested by `tests/cli/test_export.py`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.numpy import load_file, save_file

from rtdetr_cli.datasets.records import image_paths
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.weights.header import read_header, rewrite_header
from rtdetr_cli.workflows.export import plan_export


def test_a_model_of_another_maker(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """Its file has no header of ours, which says what it was trained on."""
    path = tmp_path / "model.safetensors"
    save_file(load_file(shapes_model), path)
    plan = plan_export(path, ExportOptions(), verify=shapes_data)
    assert len(plan.images) == 16
    assert plan.folder == tmp_path / "export"
    assert plan.image_runs() == 2 * 16
    more = replace(plan, options=ExportOptions(("onnx", "fp16", "openvino")), images=[tmp_path] * 300)
    assert more.image_runs() == 5 * 200, "float16 also in torch"


def test_notes_on_the_images_are_given_once(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """INT8 is calibrated on the train part of the dataset whose val part is verified on."""
    path = tmp_path / "best.safetensors"
    shutil.copy(shapes_model, path)
    rewrite_header(path, replace(read_header(path), dataset={"source": str(shapes_data)}))
    plan = plan_export(path, ExportOptions(("onnx", "int8")))
    assert plan.notes == [
        f"data {shapes_data} (the dataset that the model was trained with)",
        "shapes has no val split: val is the part that was held out in training",
    ]
    assert plan.images is not None
    assert not {path.resolve() for path in image_paths(plan.images)} & {path.resolve() for path in plan.calibration}
