"""Put calibrated thresholds into a model file, and name the exports that do not carry them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import RtdetrError, UsageError
from rtdetr_cli.weights.files import read_header, rewrite_header
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, METADATA_KEY, ModelHeader, Thresholds

STORING_SUFFIX = ".safetensors"
ORIGINAL = "export-original"


def refuse_to_store(path: Path) -> None:
    """Refuse a model file that cannot take thresholds, before anything is run.

    Raises:
        UsageError: it is an export or a published checkpoint.
        ModelError: it is no model of ours.
    """
    if path.suffix.lower() != STORING_SUFFIX:
        raise UsageError(
            f"--calibrate stores thresholds in a {STORING_SUFFIX} model, and {path.name} is none",
            hint="calibrate the model of the run; exports made afterwards carry its thresholds",
            code="calibrate-kind",
        )
    read_header(path)


def store_thresholds(
    path: Path,
    thresholds: Thresholds,
    label_map: NDArray[np.int64] | None,
    *,
    imgsz: tuple[int, int] | None = None,
    layers: int | None = None,
    queries: int | None = None,
) -> ModelHeader:
    """Write thresholds into a model's header; tensors and identity stay as they are.

    Args:
        path: a model file of ours.
        thresholds: in the labels of the dataset they were found on.
        label_map: (model classes,) the dataset's label of each class, -1 for none; None when they are the same.
        imgsz: (height, width) of the input at which they were found.
        layers: of the decoder with which they were found.
        queries: likewise.

    Returns:
        The header as written. A class that the dataset does not have gets the overall threshold.
    """
    header = read_header(path)
    if label_map is not None:
        own = tuple(thresholds.per_class[k] if k >= 0 else thresholds.overall for k in label_map.tolist())
        thresholds = replace(thresholds, per_class=own)
    thresholds = replace(thresholds, imgsz=imgsz, layers=layers, queries=queries)
    return rewrite_header(path, replace(header, thresholds=thresholds))


def export_folders(path: Path) -> list[Path]:
    """Return the folders in which exports of a model are looked for: its own first, which need not be there.

    A second stage exports the model that it began with too, into its own run: into `export-original/`.
    """
    found = [path.parent / "export"]
    for run in sorted({path.parent, *(p.parent for p in path.parent.parent.glob(f"*/{ORIGINAL}"))}):
        if (run / ORIGINAL).is_dir():
            found.append(run / ORIGINAL)
    return found


def stale_exports(path: Path, header: ModelHeader) -> list[Path]:
    """Return the exports of a model, in `export_folders`, that carry other thresholds than the model now has."""
    stale = []
    for folder in export_folders(path):
        for export in sorted(folder.rglob("*")):
            if export.suffix.lower() not in EXPORT_SUFFIXES or not export.is_file():
                continue
            carried = exported_header(export)
            if carried is None or not _made_of(carried, header, sure=folder.name == ORIGINAL):
                continue
            if _bare(carried.thresholds) != _bare(header.thresholds):
                stale.append(export)
    return stale


def _made_of(export: ModelHeader, model: ModelHeader, *, sure: bool) -> bool:
    """Tell whether an export is of a model; one that does not say counts, unless that must be sure."""
    source = export.extra.get("source_identity")
    return source == model.identity if source else not sure


def _bare(thresholds: Thresholds | None) -> Thresholds | None:
    """Return thresholds without what older files do not say."""
    return None if thresholds is None else replace(thresholds, imgsz=None, layers=None, queries=None)


def exported_header(export: Path) -> ModelHeader | None:
    """Return the header that an export carries, without loading the model; None for a foreign or unreadable one."""
    try:
        if export.suffix.lower() == ".onnx":
            import onnx

            model = onnx.load(str(export), load_external_data=False)
            text = next((p.value for p in model.metadata_props if p.key == METADATA_KEY), "")
        elif export.suffix.lower() == ".xml":
            text = _in_xml(export)
        else:
            beside = export.with_name(export.name + ".json")
            text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
        return ModelHeader.from_json(text, source=str(export)) if text else None
    except (RtdetrError, OSError, ValueError, RuntimeError):
        return None
    except Exception as error:
        # A truncated ONNX file raises protobuf's own error, which has no common base that is not Exception.
        if type(error).__name__ != "DecodeError":
            raise
        return None


def _in_xml(path: Path) -> str:
    """Return the header in an OpenVINO file's runtime information, `<rtdetr value="...">`."""
    from defusedxml.ElementTree import parse

    root = parse(path).getroot()
    found = None if root is None else root.find(f".//{METADATA_KEY}")
    return "" if found is None else str(found.get("value") or found.text or "")
