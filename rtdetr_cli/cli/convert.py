"""`rtdetr convert`: write a model in the layout of another maker."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag
from rtdetr_cli.errors import UsageError


def convert(
    model: Annotated[Path, typer.Argument(help="Model file, run folder, published .pth, or folder of transformers.")],
    out: Annotated[Path, typer.Argument(help="File or folder to create.")],
    to: Annotated[
        str, typer.Option("--to", help="Layout: official (.pth), hf (folder of transformers) or safetensors (ours).")
    ],
    sampling: Annotated[
        str | None,
        typer.Option(help="Sampling of a published file whose name does not say it: bilinear or discrete."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a model in another layout, load it there, and compare the detections before saying done."""
    from rtdetr_cli.cli.select import model_file

    layouts = ("official", "hf", "safetensors")
    if to not in layouts:
        raise UsageError(f"--to {to}: there is no such layout", hint=f"--to {', '.join(layouts)}")
    suffix = {"official": ".pth", "safetensors": ".safetensors", "hf": ""}[to]
    if suffix and out.suffix.lower() != suffix:
        raise UsageError(f"{out} must end in {suffix}", hint=f"rtdetr convert {model} {out}{suffix} --to {to}")
    source = model_file(model)

    from rtdetr_cli.infer.torch_backend import check_sampling
    from rtdetr_cli.workflows import convert as workflow

    check_sampling(source, sampling)
    done = workflow.convert(source, cast(workflow.Layout, to), out, sampling=sampling)
    agreement = done.agreement
    if as_json:
        terminal.emit_json({
            "path": str(done.path), "layout": to, "tensors": done.tensors, "notes": list(done.notes),
            "agreement": {**asdict(agreement), "passed": agreement.passed},
        })  # fmt: skip
        return
    for note in done.notes:
        terminal.say(note)
    terminal.out(
        f"{done.path}: {done.tensors} tensors; {agreement.matched} of {agreement.detections} detections match "
        f"(score error {agreement.score_error:.1e}, box error {agreement.box_error_px:.1e} px)"
    )
    use = {
        "hf": f"AutoModelForObjectDetection.from_pretrained({str(done.path)!r})",
        "official": f"python tools/train.py -c CONFIG -t {done.path}",
        "safetensors": f"rtdetr predict IMAGE --weights {done.path}",
    }[to]
    terminal.next_step(use)
