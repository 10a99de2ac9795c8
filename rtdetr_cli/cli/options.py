"""Options that several commands share, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on one line.")]
BatchOption = Annotated[str, typer.Option("--batch", "-b", help="Images per forward pass, or auto.")]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, or a GPU such as 0.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads (not with TensorRT).")]
DedupeOption = Annotated[
    str | None,
    typer.Option(
        help="Lower the scores of duplicates: off, or a strength such as 8 (default: the model's own).",
        metavar="off|GAMMA",
        show_default=False,
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Runtime for weights: torch, or auto to use a verified float32 export in export/ next to them "
        "when there are many images.",
        metavar="torch|auto",
    ),
]
OfflineFlag = Annotated[bool, typer.Option("--offline", help="Use cached weights only; never download any.")]
TolApFlag = Annotated[
    float | None,
    typer.Option(
        "--tol-ap",
        min=0,
        max=1,
        help="Maximum AP difference between model and export (default: 0.002, or 0.01 for INT8).",
        show_default=False,
    ),
]
SizeOption = Annotated[str | None, typer.Option(help="Input size: 640, or height first 480x640.")]
LayersOption = Annotated[int | None, typer.Option(min=1, help="Number of decoder layers to use.")]
QueriesOption = Annotated[int | None, typer.Option(min=1, help="Number of queries to use.")]
SamplingOption = Annotated[
    str | None, typer.Option(help="Sampling of a published file, which does not state it: bilinear or discrete.")
]
