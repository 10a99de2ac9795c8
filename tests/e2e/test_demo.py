"""The whole chain as `rtdetr demo` runs it: short by default, in full when slow tests are asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtdetr_cli.errors import GateError
from rtdetr_cli.workflows.demo import REQUIRED_AP50, check_accuracy


def test_a_folder_with_something_else_in_it_is_left_alone(rtdetr, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    rtdetr("demo", tmp_path, code=2, err="is not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_too_low_an_ap_fails_the_demo() -> None:
    check_accuracy({"AP50": REQUIRED_AP50})
    with pytest.raises(GateError):
        check_accuracy({"AP50": REQUIRED_AP50 - 0.001})
    with pytest.raises(GateError):
        check_accuracy({"AP50": None})


@pytest.mark.slow
def test_the_whole_chain_learns(rtdetr, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ran = rtdetr("demo", folder, "--json", code=0)
    document = ran.json
    assert document["metrics"]["AP50"] >= 0.5
    artefacts = {name: Path(path) for name, path in document["artefacts"].items()}
    assert set(artefacts) >= {"dataset", "run", "onnx"}
    assert all(path.exists() for path in artefacts.values())
    assert len(list(artefacts["predictions"].glob("*.jpg"))) == 12
    assert document["findings"]["error"] == 0
    parity = json.loads(artefacts["parity"].read_text())
    assert parity["artefacts"][0]["gate"]["passed"] is True
