"""Store calibrated thresholds in a model file, and find the exports that carry other ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtdetr_cli.errors import RtdetrError, UsageError
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, ModelHeader, Thresholds, read_header, rewrite_header

WEIGHTS_SUFFIX = ".safetensors"
EXPORT_ORIGINAL = "export-original"


def check_can_store(path: Path) -> None:
    """Refuse a model file that cannot store thresholds, before anything is run.

    Raises:
        UsageError: it is an export or a published checkpoint.
        ModelError: it is not a model of ours.
    """
    if path.suffix.lower() != WEIGHTS_SUFFIX:
        raise UsageError(
            f"--calibrate stores thresholds in a {WEIGHTS_SUFFIX} model, and {path.name} is not one",
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
    """Write thresholds into a model's header; its tensors and identity stay the same.

    Args:
        path: a model file of ours.
        thresholds: in the labels of the dataset that they were calibrated on.
        label_map: (model classes,) the dataset's label of each class, -1 for none; None when they are the same.
        imgsz: (height, width) of the input, as calibrated.
        layers: decoder layers used, as calibrated.
        queries: queries used, as calibrated.

    Returns:
        The header as written. A class that the dataset does not have gets the overall threshold.
    """
    header = read_header(path)
    per_class = thresholds.per_class
    if label_map is not None:
        per_class = tuple(per_class[k] if k >= 0 else thresholds.overall for k in label_map.tolist())
    thresholds = replace(thresholds, per_class=per_class, imgsz=imgsz, layers=layers, queries=queries)
    return rewrite_header(path, replace(header, thresholds=thresholds))


def export_folders(path: Path) -> list[Path]:
    """Return the folders that may hold exports of a model: `export/` beside it first, even if it does not exist.

    finetune-discrete also exports the model that it started from, into `export-original/` of its own run.
    """
    runs = sorted({path.parent, *(p.parent for p in path.parent.parent.glob(f"*/{EXPORT_ORIGINAL}"))})
    return [path.parent / "export", *(run / EXPORT_ORIGINAL for run in runs if (run / EXPORT_ORIGINAL).is_dir())]


def stale_exports(path: Path, header: ModelHeader) -> list[Path]:
    """Return the exports of a model, in `export_folders`, that carry other thresholds than the model now has."""
    current = _essentials(None if header.thresholds is None else asdict(header.thresholds))
    stale = []
    for folder in export_folders(path):
        for export in sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXPORT_SUFFIXES and p.is_file()):
            exported = _exported_header(export)
            if exported is None:
                continue
            # Without a recorded source, what lies in export/ is of this model; in export-original/ it may not be.
            source = exported["extra"].get("source_identity")
            made_of_model = source == header.identity if source else folder.name != EXPORT_ORIGINAL
            if made_of_model and _essentials(exported["thresholds"]) != current:
                stale.append(export)
    return stale


def _essentials(thresholds: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """Return what decides about a detection; older files do not record the size, layers and queries."""
    return None if thresholds is None else tuple(thresholds[key] for key in ("target", "overall", "per_class"))


def _exported_header(export: Path) -> dict[str, Any] | None:
    """Return the header of an export as plain values, or None for a foreign or unreadable file."""
    from rtdetr_cli.infer.inspect import inspect_model

    try:
        header: dict[str, Any] | None = inspect_model(export)["header"]
    except (RtdetrError, OSError):
        return None
    return header
