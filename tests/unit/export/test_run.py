"""From a model to named files: nothing unverified carries the final name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, ModelError, RtdetrError, UsageError
from rtdetr_cli.export import run
from rtdetr_cli.export.gate import Gate, Limits, Part, Verdict
from rtdetr_cli.export.graph import ExportOptions
from rtdetr_cli.export.run import Artefact, Draft, Work, export_model, files_of, gate_rounds, marked
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader

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


def entries(folder: Path) -> dict[str, bool | None]:
    """Return what parity.json says of each file."""
    document = json.loads((folder / "parity.json").read_text())
    told = {Path(a["path"]).name: a["gate"] and a["gate"]["passed"] for a in document["artefacts"]}
    assert len(told) == len(document["artefacts"])
    return told


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
    failed = export_model(*loaded, tmp_path, options, images=dataset, stem="m")
    assert names_in(tmp_path) == ["m.failed.bin", "m.failed.onnx", "m.failed.xml", "parity.json"]
    assert [a.passed for a in failed] == [False, False]
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(True))
    export_model(*loaded, tmp_path, options, images=dataset, stem="m")
    assert names_in(tmp_path) == ["m.bin", "m.onnx", "m.xml", "parity.json"]  # the old failures are gone
    assert open_backend(tmp_path / "m.xml").header.names == loaded[1].names


@pytest.mark.usefixtures("ready")
def test_older_file_gives_up_its_name(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody finds, under the name to deploy, a file that the last export did not pass."""
    options = ExportOptions(formats=("onnx", "openvino"))
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(True))
    export_model(*loaded, tmp_path, options, images=dataset, stem="m")
    older = (tmp_path / "m.onnx").read_bytes()
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(False))
    told: list[str] = []
    export_model(*loaded, tmp_path, options, images=dataset, stem="m", tell=told.append)
    failed = ["m.failed.bin", "m.failed.onnx", "m.failed.xml"]
    aside = ["m.previous.bin", "m.previous.onnx", "m.previous.xml"]
    assert names_in(tmp_path) == [*failed, *aside, "parity.json"]
    assert (tmp_path / "m.previous.onnx").read_bytes() == older
    assert "m.onnx of an earlier export is now m.previous.onnx" in "\n".join(told)
    assert open_backend(tmp_path / "m.previous.xml").header.names == loaded[1].names
    assert entries(tmp_path) == {
        "m.failed.onnx": False,
        "m.failed.xml": False,
        "m.previous.onnx": True,
        "m.previous.xml": True,
    }
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(True))
    export_model(*loaded, tmp_path, options, images=dataset, stem="m")
    assert names_in(tmp_path) == ["m.bin", "m.onnx", "m.xml", "parity.json"]


@pytest.mark.usefixtures("ready")
def test_older_file_after_an_export_that_breaks_off(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One format is made, the next cannot be: what was made is told, and its older file gives up its name too."""
    options = ExportOptions(formats=("onnx", "openvino"))
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(True))
    export_model(*loaded, tmp_path, options, images=dataset, stem="m")

    def missing(work: Work) -> Draft:
        raise EnvironmentProblem("planted")

    monkeypatch.setitem(run.DRAFTS, "openvino", missing)
    made: list[Artefact] = []
    with pytest.raises(EnvironmentProblem):
        export_model(*loaded, tmp_path, options, images=dataset, stem="m", finished=made.append)
    assert [a.path.name for a in made] == ["m.onnx"]
    assert names_in(tmp_path) == ["m.onnx", "m.previous.bin", "m.previous.xml", "parity.json"]
    assert entries(tmp_path) == {"m.onnx": True, "m.previous.xml": True}


@pytest.mark.usefixtures("ready")
def test_parity_file_keeps_what_still_holds(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdicts of another format, of the same model, as long as its file is there."""
    model, header = loaded
    monkeypatch.setattr(Gate, "judge", lambda self, candidate, **facts: verdict(True))

    def export(name: str, header: ModelHeader = header) -> dict[str, bool | None]:
        export_model(model, header, tmp_path, ExportOptions(formats=(name,)), images=dataset, stem="m")
        return entries(tmp_path)

    assert header.identity
    assert export("onnx") == {"m.onnx": True}
    assert export("openvino") == {"m.xml": True, "m.onnx": True}
    assert export("openvino") == {"m.xml": True, "m.onnx": True}
    (tmp_path / "m.onnx").unlink()
    assert export("openvino") == {"m.xml": True}
    assert export("onnx", replace(header, identity="of another model")) == {"m.onnx": True}
    (tmp_path / "parity.json").write_text('{"model": 3}')
    assert export("onnx") == {"m.onnx": True}


@pytest.mark.usefixtures("ready")
def test_what_breaks_leaves_nothing(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Gate, candidate: object, **facts: object) -> Verdict:
        raise ModelError("planted")

    monkeypatch.setattr(Gate, "judge", broken)
    with pytest.raises(ModelError):
        export_model(*loaded, tmp_path, ExportOptions(formats=("openvino",)), images=dataset)
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
