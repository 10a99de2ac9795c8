"""Headers of small model files."""

from __future__ import annotations

from typing import Any

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.weights.header import ModelHeader


def header_of(spec: ModelSpec, names: tuple[str, ...], **changes: Any) -> ModelHeader:
    """Return the header of a model of these sizes and classes, with ids from 1."""
    facts = {"category_ids": tuple(range(1, len(names) + 1)), "imgsz": (64, 64)}
    sizes = {"architecture": spec.model_dump(mode="json"), "layers": spec.eval_layers, "queries": spec.queries}
    return ModelHeader(names=names, **{**facts, **sizes, **changes})
