"""Exporting a model: only verified files get the final name, and `parity.json` records the verdicts."""

from __future__ import annotations

import functools
import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import EnvironmentProblem, ModelError, RtdetrError
from rtdetr_cli.export import formats, run
from rtdetr_cli.export.artefacts import Artefact, Notice, artefact_files
from rtdetr_cli.export.compare import Limits, Part
from rtdetr_cli.export.formats import Draft, DraftEvents, ExportContext
from rtdetr_cli.export.options import ExportOptions
from rtdetr_cli.export.run import export_events, export_model
from rtdetr_cli.export.verify import Verdict
from rtdetr_cli.infer.backend import open_backend
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import ModelHeader

Loaded = tuple[RTDETR, ModelHeader]
BOTH = ExportOptions(formats=("onnx", "openvino"))


@pytest.fixture
def copied_drafts(exported: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy drafts from finished exports instead of tracing, which takes seconds."""

    def copy_draft(context: ExportContext, path: Path, name: str) -> DraftEvents:
        yield from ()
        source = exported[name]
        for old, new in zip(artefact_files(source.path), artefact_files(path), strict=True):
            new.write_bytes(old.read_bytes())
        return Draft(context.header_for(source.format, source.precision), lambda path, header: None, {})

    for name in ("onnx", "openvino"):
        monkeypatch.setitem(formats.WRITERS, name, functools.partial(copy_draft, name=name))


@pytest.fixture
def set_verdict(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets whether verification passes."""

    def decide(passed: bool) -> None:
        part = Part(passed, () if passed else ("planted",))
        verdict = Verdict("fp32", Limits(1, 1, 0, 0, 0), 1, part, Part(True), Part(None))

        def verify(*args: object, **options: object) -> Generator[None, None, Verdict]:
            yield from ()
            return verdict

        monkeypatch.setattr(run, "verify", verify)

    return decide


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def recorded(folder: Path) -> dict[str, bool | None]:
    """Return the verdict of each file in parity.json."""
    document = json.loads((folder / "parity.json").read_text())
    verdicts = {Path(a["path"]).name: a["gate"] and a["gate"]["passed"] for a in document["artefacts"]}
    assert len(verdicts) == len(document["artefacts"])
    return verdicts


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


@pytest.mark.usefixtures("copied_drafts")
def test_a_failed_export_is_marked(loaded: Loaded, dataset: Dataset, tmp_path: Path, set_verdict: Any) -> None:
    set_verdict(False)
    failed = export_model(*loaded, tmp_path, BOTH, images=dataset, stem="m")
    assert names_in(tmp_path) == ["m.failed.bin", "m.failed.onnx", "m.failed.xml", "parity.json"]
    assert [a.passed for a in failed] == [False, False]
    set_verdict(True)
    export_model(*loaded, tmp_path, BOTH, images=dataset, stem="m")
    assert names_in(tmp_path) == ["m.bin", "m.onnx", "m.xml", "parity.json"]  # the old failures are gone
    assert open_backend(tmp_path / "m.xml").header.names == loaded[1].names


@pytest.mark.usefixtures("copied_drafts")
def test_a_failed_export_renames_the_earlier_file(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, set_verdict: Any
) -> None:
    """The final name is never that of a file from before the failure."""
    set_verdict(True)
    export_model(*loaded, tmp_path, BOTH, images=dataset, stem="m")
    older = (tmp_path / "m.onnx").read_bytes()
    set_verdict(False)
    events = list(export_events(*loaded, tmp_path, BOTH, images=dataset, stem="m"))
    failed = ["m.failed.bin", "m.failed.onnx", "m.failed.xml"]
    previous = ["m.previous.bin", "m.previous.onnx", "m.previous.xml"]
    assert names_in(tmp_path) == [*failed, *previous, "parity.json"]
    assert (tmp_path / "m.previous.onnx").read_bytes() == older
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any(n.startswith("renamed m.onnx of an earlier export to m.previous.onnx") for n in notices)
    assert open_backend(tmp_path / "m.previous.xml").header.names == loaded[1].names
    assert recorded(tmp_path) == {
        "m.failed.onnx": False,
        "m.failed.xml": False,
        "m.previous.onnx": True,
        "m.previous.xml": True,
    }
    set_verdict(True)
    export_model(*loaded, tmp_path, BOTH, images=dataset, stem="m")
    assert names_in(tmp_path) == ["m.bin", "m.onnx", "m.xml", "parity.json"]


@pytest.mark.usefixtures("copied_drafts")
def test_an_error_renames_the_earlier_files_of_later_formats(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_verdict: Any
) -> None:
    """The formats before the error are still reported."""
    set_verdict(True)
    export_model(*loaded, tmp_path, BOTH, images=dataset, stem="m")

    def missing(context: ExportContext, path: Path) -> Iterator[Notice]:
        yield Notice("openvino")
        raise EnvironmentProblem("planted")

    monkeypatch.setitem(formats.WRITERS, "openvino", missing)
    artefacts: list[Artefact] = []
    events = export_events(*loaded, tmp_path, BOTH, images=dataset, stem="m")
    with pytest.raises(EnvironmentProblem):
        artefacts.extend(event for event in events if isinstance(event, Artefact))
    assert [a.path.name for a in artefacts] == ["m.onnx"]
    assert names_in(tmp_path) == ["m.onnx", "m.previous.bin", "m.previous.xml", "parity.json"]
    assert recorded(tmp_path) == {"m.onnx": True, "m.previous.xml": True}


@pytest.mark.usefixtures("copied_drafts")
def test_parity_file_keeps_valid_verdicts_of_earlier_exports(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, set_verdict: Any
) -> None:
    """They are valid for the same model, as long as the file exists."""
    model, header = loaded
    set_verdict(True)

    def export(name: str, header: ModelHeader = header) -> dict[str, bool | None]:
        export_model(model, header, tmp_path, ExportOptions(formats=(name,)), images=dataset, stem="m")
        return recorded(tmp_path)

    assert header.identity
    assert export("onnx") == {"m.onnx": True}
    assert export("openvino") == {"m.xml": True, "m.onnx": True}
    assert export("openvino") == {"m.xml": True, "m.onnx": True}
    (tmp_path / "m.onnx").unlink()
    assert export("openvino") == {"m.xml": True}
    assert export("onnx", replace(header, identity="of another model")) == {"m.onnx": True}
    (tmp_path / "parity.json").write_text('{"model": 3}')
    assert export("onnx") == {"m.onnx": True}


@pytest.mark.usefixtures("copied_drafts")
def test_an_error_during_verification_leaves_no_file(
    loaded: Loaded, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> Iterator[Verdict]:
        raise ModelError("planted")

    monkeypatch.setattr(run, "verify", broken)
    with pytest.raises(ModelError):
        export_model(*loaded, tmp_path, ExportOptions(formats=("openvino",)), images=dataset)
    assert names_in(tmp_path) == []


@pytest.mark.usefixtures("copied_drafts")
def test_an_unexpected_interface_fails(loaded: Loaded, dataset: Dataset, tmp_path: Path) -> None:
    """The copied file has a dynamic batch, and a fixed one is asked for."""
    (artefact,) = export_model(*loaded, tmp_path, images=dataset, stem="m", device="cpu")
    assert artefact.verdict.failed_parts == ("contract",)
    assert "input images has shape ?x3x96x128, not 1x3x96x128" in artefact.verdict.contract.findings


@pytest.mark.usefixtures("copied_drafts")
def test_without_verification(loaded: Loaded, tmp_path: Path) -> None:
    (artefact,) = export_model(*loaded, tmp_path, stem="m")
    assert artefact.verdict is None
    assert artefact.passed
    assert json.loads((tmp_path / "parity.json").read_text())["artefacts"][0]["gate"] is None


def test_a_folder_that_cannot_be_written(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RtdetrError, match="cannot be written"):
        export_model(*loaded, tmp_path / "file")
