"""From a model to named files: nothing unverified carries the final name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rtdetr_cli.data.records import Dataset
from rtdetr_cli.errors import ModelError, RtdetrError, UsageError
from rtdetr_cli.export import run
from rtdetr_cli.export.gate import Gate, Limits, Part, Verdict
from rtdetr_cli.export.graph import ExportOptions
from rtdetr_cli.export.run import Artefact, Draft, Work, export_model, files_of, gate_rounds, marked
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.header import ModelHeader

Loaded = tuple[RTDETR, ModelHeader]


@pytest.fixture
def ready(exported: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the tracing: a draft is a copy of what has been exported already."""

    def draft(work: Work, name: str) -> Draft:
        source = exported[name].path
        final = work.out / f"{work.stem}{source.suffix}"
        path = marked(final, "unverified")
        for old, new in zip(files_of(source), files_of(path), strict=True):
            new.write_bytes(old.read_bytes())
        return Draft(path, final, exported[name].format, exported[name].precision, lambda path, verdict: None)

    for name in ("onnx", "openvino"):
        monkeypatch.setitem(run.DRAFTS, name, lambda work, name=name: draft(work, name))


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def verdict(passed: bool) -> Verdict:
    part = Part(passed, () if passed else ("planted",))
    return Verdict("fp32", Limits(1, 1, 0, 0, 0), 1, part, Part(True), Part(None))


def test_names_and_parity_file(exported: dict[str, Artefact]) -> None:
    folder = exported["onnx"].path.parent
    assert names_in(folder) == ["parity.json", "shapes-fp16.onnx", "shapes.bin", "shapes.onnx", "shapes.xml"]
    document = json.loads((folder / "parity.json").read_text())
    assert document["schema_version"] == 1
    assert [(a["format"], a["precision"], a["gate"]["passed"]) for a in document["artefacts"]] == [
        ("onnx", "fp32", True),
        ("onnx", "fp16", True),
        ("openvino", "fp16", True),
    ]
    first = document["artefacts"][0]
    assert first["gate"]["matched"] == 1
    assert first["gate"]["ap_model"] > 0.8
    assert first["operators"]["Conv"] > 20
    assert {"contract", "agreement", "ap", "limits"} <= set(first["gate"])


@pytest.mark.usefixtures("ready")
def test_failed_export_is_marked(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(formats=("onnx", "openvino"))
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(False))
    failed = export_model(*loaded, tmp_path, options, pictures=dataset, stem="m")
    assert names_in(tmp_path) == ["m.failed.bin", "m.failed.onnx", "m.failed.xml", "parity.json"]
    assert [a.passed for a in failed] == [False, False]
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(True))
    export_model(*loaded, tmp_path, options, pictures=dataset, stem="m")
    assert names_in(tmp_path) == ["m.bin", "m.onnx", "m.xml", "parity.json"]  # the old failures are gone
    assert open_backend(tmp_path / "m.xml").header.names == loaded[1].names


@pytest.mark.usefixtures("ready")
def test_what_breaks_leaves_nothing(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Gate, candidate: object, **facts: object) -> Verdict:
        raise ModelError("planted")

    monkeypatch.setattr(Gate, "judge", broken)
    with pytest.raises(ModelError):
        export_model(*loaded, tmp_path, ExportOptions(formats=("openvino",)), pictures=dataset)
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("ready")
def test_without_the_gate(loaded: Loaded, tmp_path: Path) -> None:
    made = export_model(*loaded, tmp_path, stem="m")
    assert made[0].verdict is None
    assert made[0].passed
    assert json.loads((tmp_path / "parity.json").read_text())["artefacts"][0]["gate"] is None


def test_folder_that_cannot_be_written(loaded: Loaded, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    with pytest.raises(RtdetrError, match="cannot be written"):
        export_model(*loaded, taken)


def test_engine_needs_its_graph(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16"):
        export_model(*loaded, tmp_path, ExportOptions(formats=("trt-fp16",)))


def test_rounds_of_the_gate() -> None:
    assert gate_rounds(("onnx",)) == 2
    assert gate_rounds(("onnx", "fp16", "openvino")) == 5


def test_summary_says_what_failed() -> None:
    assert "planted" in verdict(False).summary
    assert verdict(False).failed_parts == ("contract",)
    assert replace(verdict(False), half=Part(False, ("infinite",))).failed_parts == ("contract", "half")
