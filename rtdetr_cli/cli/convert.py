"""`rtdetr convert`: write a model in the layout of another maker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag, SamplingOption
from rtdetr_cli.cli.select import model_file
from rtdetr_cli.errors import UsageError

SUFFIXES = {"official": ".pth", "hf": "", "safetensors": ".safetensors"}


def convert(
    model: Annotated[Path, typer.Argument(help="Model file, run folder, published .pth, or folder of transformers.")],
    out: Annotated[Path, typer.Argument(help="File or folder to create.")],
    to: Annotated[
        str, typer.Option("--to", help="Layout: official (.pth), hf (folder of transformers) or safetensors (ours).")
    ],
    sampling: SamplingOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a model in another layout, load it there, and compare the detections before saying done."""
    if to not in SUFFIXES:
        raise UsageError(f"--to {to}: there is no such layout", hint=f"--to {', '.join(SUFFIXES)}")
    suffix = SUFFIXES[to]
    if suffix and out.suffix.lower() != suffix:
        raise UsageError(f"{out} must end in {suffix}", hint=f"rtdetr convert {model} {out}{suffix} --to {to}")
    source = model_file(model)

    from rtdetr_cli.infer.torch_backend import check_sampling
    from rtdetr_cli.workflows import convert as workflow

    check_sampling(source, sampling)
    done = workflow.convert(source, cast(workflow.Layout, to), out, sampling=sampling)
    match = done.match
    score_error, box_error = float(match.score_errors.max()), float(match.box_errors.max())
    if as_json:
        figures = {"detections": match.rows // 2, "matched": match.share, "score_error": score_error}
        terminal.emit_json({
            "path": str(done.path), "layout": to, "tensors": done.tensors, "notes": list(done.notes),
            "agreement": {**figures, "box_error": box_error, "passed": True},
        })  # fmt: skip
        return
    for note in done.notes:
        terminal.say(note)
    terminal.out(
        f"{done.path}: {done.tensors} tensors; {match.share:.1%} of {match.rows // 2} detections match "
        f"(largest score difference {score_error:.1e}, largest 1 - IoU {box_error:.1e})"
    )
    use = {
        "hf": f"AutoModelForObjectDetection.from_pretrained({str(done.path)!r})",
        "official": f"python tools/train.py -c CONFIG -t {done.path}",
        "safetensors": f"rtdetr predict IMAGE --weights {done.path}",
    }[to]
    terminal.next_step(use)
