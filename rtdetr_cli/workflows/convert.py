"""Write a model in the layout of another maker, and verify it by loading it there and comparing detections."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import GateError, ModelError, UsageError
from rtdetr_cli.export.compare import Limits, Match, match_images
from rtdetr_cli.export.synthetic import synthetic_image
from rtdetr_cli.files import atomic_write
from rtdetr_cli.images.decode import stretch
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.packages import import_package
from rtdetr_cli.infer.torch_backend import TorchBackend
from rtdetr_cli.model.decoder import anchor_table
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.header import EXPORT_SUFFIXES, ModelHeader
from rtdetr_cli.weights.load import load_model, save_model
from rtdetr_cli.weights.names import to_official
from rtdetr_cli.weights.transformers_files import write_transformers

Layout = Literal["official", "hf", "safetensors"]

# Of float32 on a CPU: queries of almost equal score may swap places, so not all need agree.
LIMITS = Limits(matched=0.98, iou=0.99, score_step=1e-4, score_error=1e-4, box_error=1e-3)

Images = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted model: where it is, how it agrees, and what its user must set."""

    path: Path
    layout: Layout
    tensors: int
    match: Match
    notes: tuple[str, ...]


def convert(source: Path, layout: Layout, out: Path, *, sampling: str | None = None) -> Converted:
    """Write a model in another layout, and verify it there.

    Args:
        source: a model file that torch loads.
        layout: that of the official code (`.pth`), a folder of transformers (`hf`), or our own.
        out: the file or folder to create.
        sampling: `discrete` for a published file that was trained with it, where its name does not say so.

    Raises:
        UsageError: `out` exists.
        ModelError: the file cannot be loaded, or the layout has no such model.
        EnvironmentProblem: transformers is not installed.
        GateError: the written model detects something else; it has been removed.
    """
    if source.suffix.lower() in EXPORT_SUFFIXES:
        hint = "convert the model that it was exported from"
        raise ModelError(
            f"{source} is an exported graph; only weights can be converted", hint=hint, code="model-foreign"
        )
    if out.exists():
        raise UsageError(f"{out} exists", hint="choose another name", code="output")
    if layout == "hf":
        import_package("transformers", "transformers, which verifies what --to hf writes,", extra="hf")
    model, header = load_model(source, sampling=sampling)
    spec = ModelSpec(**header.architecture)
    v1 = bool(header.extra.get("v1"))
    notes = [] if layout != "official" else [official_settings(spec, header)]
    if layout != "safetensors" and header.dedupe_gamma:
        notes.insert(0, "duplicates are not rescored there: the detections are those of --dedupe off")
        header = header.with_dedupe(0.0)
    images = [synthetic_image(number) for number in range(3)]
    expected = detect(model, header, images)
    try:
        if layout == "safetensors":
            save_model(out, model.state_dict(), header)
            tensors, loaded = len(model.state_dict()), load_model(out)
            found = detect(*loaded, images)
        elif layout == "official":
            tensors = write_official(out, model, header, v1=v1)
            again = load_model(out, sampling=header.sampling, layers=header.layers, queries=header.queries)[0]
            found = detect(again, header, images)  # the size is not in a file of v1
        else:
            write_transformers(out, model.state_dict(), spec, header, v1=v1)
            tensors, found = detect_with_transformers(out, header, images)
            rows = np.arange(header.queries)  # transformers returns no more
            expected = [d.keep(rows[: len(d)]) for d in expected]
        match = match_images(expected, found, LIMITS, floor=0.0)
        if not agrees(match):
            raise GateError(
                f"{out} does not detect what {source} does: {match.share:.1%} of the detections match; "
                "it has been removed",
                code="parity",
            )
    except BaseException:
        if out.is_dir():
            shutil.rmtree(out)
        else:
            out.unlink(missing_ok=True)
        raise
    return Converted(out, layout, tensors, match, tuple(notes))


def agrees(match: Match) -> bool:
    """Return whether detections are the same, to the rounding of float32."""
    return match.share >= LIMITS.matched and float(match.box_errors.mean()) <= LIMITS.box_error


def write_official(path: Path, model: RTDETR, header: ModelHeader, *, v1: bool) -> int:
    """Write a `.pth` as the official code does, with its anchors for a square input; return the number of tensors.

    Raises:
        ModelError: the official code has no such model.
    """
    height, width = header.imgsz
    if height != width:
        raise ModelError(
            f"the official code computes other positions for an input of {height}x{width} pixels, which is no square",
            hint="--to hf, or train with a square --imgsz",
            code="layout",
        )
    if header.sampling == "discrete" and header.rounding != "published":
        message = f"the official code has no discrete sampling with {header.rounding} rounding"
        raise ModelError(message, hint="--to safetensors", code="layout")
    state = to_official({n: t.detach().cpu() for n, t in model.state_dict().items()}, v1=v1)
    if not v1:
        shapes = [(height // stride, width // stride) for stride in (8, 16, 32)]
        anchors = model.decoder.published_anchors.get(tuple(shapes)) or anchor_table(shapes)
        state["decoder.anchors"] = torch.where(anchors.valid, anchors.logits, torch.inf)
        state["decoder.valid_mask"] = anchors.valid
    with atomic_write(path) as temporary:
        torch.save({"ema": {"module": state}}, temporary)
    return len(state)


def official_settings(spec: ModelSpec, header: ModelHeader) -> str:
    """Return the settings of an official configuration that this model needs."""
    count, points = len(header.names), list(spec.num_points)
    used = {
        "num_classes": count,
        "remap_mscoco_category": count == 80 and header.category_ids != tuple(range(80)),
        "eval_spatial_size": list(header.imgsz),
        "RTDETRTransformerv2.num_points": points if points != [4, 4, 4] else None,
        "RTDETRTransformerv2.num_queries": header.queries if header.queries != 300 else None,
        "RTDETRTransformerv2.cross_attn_method": "discrete" if header.sampling == "discrete" else None,
        "RTDETRTransformerv2.eval_idx": header.layers - 1 if header.layers != spec.decoder_layers else None,
    }
    settings = ", ".join(f"{k}: {json.dumps(v)}" for k, v in used.items() if v is not None)
    return f"settings for the official configuration: {settings}"


def detect(model: RTDETR, header: ModelHeader, images: Images) -> list[Detections]:
    """Run a model of ours on images of any sizes."""
    backend = TorchBackend(model, header, device="cpu")
    return [
        backend.run(stretch(image, header.imgsz)[None], np.array([[image.shape[1], image.shape[0]]]))[0]
        for image in images
    ]


def detect_with_transformers(folder: Path, header: ModelHeader, images: Images) -> tuple[int, list[Detections]]:
    """Load a folder with transformers, with its own image processor, and run it; return its number of tensors too.

    Raises:
        GateError: transformers does not use every tensor, or has other names or another input size.
    """
    api = import_package("transformers", "transformers", extra="hf")
    with _quiet_transformers():
        model, report = api.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
        processor = api.AutoImageProcessor.from_pretrained(folder)
    problems = [f"{kind} {sorted(report[kind])[:3]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
                if report.get(kind)]  # fmt: skip
    labels = tuple(model.config.id2label[i] for i in range(len(model.config.id2label)))
    if labels != header.names:
        problems.append(f"names {labels[:3]}")
    size = (processor.size["height"], processor.size["width"])
    if size != header.imgsz:
        problems.append(f"input size {size}")
    if problems:
        raise GateError(f"transformers loads {folder} with {'; '.join(problems)}", code="parity")
    found = []
    with torch.inference_mode():
        for image in images:
            inputs = processor(images=Image.fromarray(image), return_tensors="pt")
            outputs = model.eval()(**inputs)
            (result,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.shape[:2]])
            boxes, scores, classes = (result[k].numpy() for k in ("boxes", "scores", "labels"))
            size_wh = (image.shape[1], image.shape[0])
            found.append(
                Detections(boxes, scores, classes.astype(np.int64), size_wh, header.names, header.category_ids)
            )
    return len(model.state_dict()), found


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep the progress bars and warnings of transformers off the terminal."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
