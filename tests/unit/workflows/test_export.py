"""Plan an export: what is refused before any work is tested by `tests/cli/test_export.py`."""

from __future__ import annotations

from pathlib import Path

from safetensors.numpy import load_file, save_file

from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.workflows.export import plan_export


def test_a_model_of_another_maker(shapes_model: Path, shapes_data: Path, tmp_path: Path) -> None:
    """Its file has no header of ours, which says what it was trained on."""
    path = tmp_path / "model.safetensors"
    save_file(load_file(shapes_model), path)
    plan = plan_export(path, ExportOptions(), verify=shapes_data)
    assert plan.images is not None
    assert len(plan.images) == 16
    assert plan.folder == tmp_path / "export"
    assert plan.image_runs() == 32
