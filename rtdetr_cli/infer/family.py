"""Say which member of the family a model is: who made it, which variant, what it costs, what was published about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtdetr_cli.weights.architecture import checked_spec, matching_preset
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.hub import known_file

DEIM_AP = {"r18": 0.490, "r34": 0.509, "r50m": 0.532, "r50": 0.543, "r101": 0.555}
"""The published AP on COCO val2017 of DEIM's RT-DETRv2, whose files have no fixed names."""


def family_facts(path: Path, header: ModelHeader, imgsz: tuple[int, int] | None = None) -> dict[str, Any]:
    """Describe a detector as a member of the family, by its file and a header that states its architecture.

    Returns:
        `maker`, `version`, `variant` (a preset, or "" for other sizes), `published` (None for a file that is not known,
        else its `name`, `data` and `ap`), and `gflops` with `imgsz`.
    """
    from rtdetr_cli.model.cost import count_gflops

    spec = checked_spec(header, str(path))
    variant = matching_preset(spec.model_copy(update={"decoder": "rtdetrv2"}))  # DEIM's have the same sizes
    size = imgsz or header.imgsz
    gflops = count_gflops(
        spec, num_classes=len(header.names), imgsz=size, layers=header.layers or None, queries=header.queries
    )
    maker = str(header.extra.get("maker") or "rtdetr-cli")
    entry = known_file(path)
    published = None if entry is None else {"name": entry.name, "data": entry.data, "ap": entry.ap}
    if maker == "DEIM" and len(header.names) == 80 and variant in DEIM_AP:
        published = {"name": f"DEIM {variant}, if this is its published file", "data": "coco", "ap": DEIM_AP[variant]}
    return {
        "maker": maker,
        "version": "RT-DETR v1" if header.extra.get("v1") else "RT-DETRv2",
        "variant": variant,
        "published": published,
        "gflops": {"value": round(gflops, 2), "imgsz": list(size)},
    }
