"""Keep the file of ids beside YOLO and VOC labels in step with the repaired labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtdetr_cli.checks.repair.plan import Plan, read_label
from rtdetr_cli.datasets.ids_file import IDS_FILE


def plan_ids(plan: Plan, dropped: Mapping[tuple[str, int], set[int]]) -> None:
    """Remove the facts of boxes that are dropped, and rename the images that are renamed.

    `dropped` has positions among the labels of each image (split and index).
    """
    raw = plan.report.raw
    path = next((path for path in raw.label_paths.values() if path.name == IDS_FILE), None)
    if path is None or not (dropped or (plan.renamed and raw.format == "yolo")):
        return
    try:
        document: dict[str, Any] = json.loads(read_label(path))
        for name, split in raw.splits.items():
            images = document["splits"].get(name, {})
            for image, file_name in enumerate(split.file_names):
                # VOC names an image by the stem of its label file, YOLO by its path as listed.
                listed = split.label_names.get(image, file_name)
                key = Path(split.label_file(image)).stem if raw.format == "voc" else listed
                facts = images.get(key)
                if facts is None:
                    continue
                gone = dropped.get((name, image), set())
                facts["boxes"] = [box for n, box in enumerate(facts["boxes"]) if n not in gone]
                if (name, image) in plan.renamed and raw.format == "yolo":
                    images[plan.renamed[name, image]] = images.pop(key)
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # a file that the reader ignores as well
    target = plan.destination(path)
    plan.texts[target] = json.dumps(document)
    plan.record("edit", "ids", target, "the labels it describes have changed")
