"""`rtdetr finetune-discrete`: the second stage with discrete sampling, before and after in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.errors import GateError, UsageError

if TYPE_CHECKING:
    from rtdetr_cli.workflows.finetune_discrete import FinetuneDiscrete, Outcome

LINE = 120  # characters of the longest line of a list


def finetune_discrete(
    model: Annotated[
        Path | None, typer.Argument(help="Run folder or model file; the newest run when left out.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Dataset; the one that the model was trained with.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images, when it cannot be guessed.")] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", "-e", min=1, help="Passes. [the recipe's share of the first stage]")
    ] = None,
    max_drop: Annotated[float, typer.Option(help="AP that may be lost; more leaves with exit code 6.")] = 0.01,
    batch: Annotated[
        str | None, typer.Option("--batch", "-b", help="Images on the device at once, or auto. [auto]")
    ] = None,
    effective_batch: Annotated[int | None, typer.Option(help="Images in a step. [the run's]")] = None,
    imgsz: Annotated[str | None, typer.Option(help="Input size: 640, or 480x640. [the model's]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [the run's]")] = None,
    lr_backbone: Annotated[float | None, typer.Option(help="The backbone's. [the run's]")] = None,
    aug: Annotated[str | None, typer.Option(help="recipe, light, none, or an Albumentations file. [the run's]")] = None,
    freeze: Annotated[str | None, typer.Option(help="preset, none, stem, backbone, encoder. [the run's]")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16. [the run's]")] = None,
    workers: Annotated[str | None, typer.Option(help="Processes that load images, or auto. [the run's]")] = None,
    cache: Annotated[str | None, typer.Option(help="Keep decoded images: none, ram or disk. [the run's]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, 0, or several: 0,1. [the run's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random. [the run's]")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without a better AP.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. [runs]")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new run; an existing one is refused.")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile", help="Compile backbone and encoder.")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="CUDA: deterministic kernels.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with an interrupted second stage; goes with --max-drop alone."),
    ] = None,
    log: Annotated[str | None, typer.Option(help="Besides the CSV: tensorboard,wandb,mlflow.")] = None,
    set_values: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as rounding=nearest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")] = False,
) -> None:
    """Finetune with discrete sampling, and say whether it is worth it."""
    import sys

    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.select import parse_size, resolve_model
    from rtdetr_cli.weights.header import EXPORT_SUFFIXES

    if not 0 <= max_drop <= 1:
        raise UsageError(f"--max-drop {max_drop:g} is not a fraction from 0 to 1", hint="0.01 is one point of AP")
    given = {
        "data": data and str(data),
        "images": images and str(images),
        "epochs": epochs,
        "batch": _number_or_word(batch),
        "effective_batch": effective_batch,
        "imgsz": parse_size(imgsz) if imgsz else None,
        "lr": lr,
        "lr_backbone": lr_backbone,
        "aug": aug,
        "freeze": freeze,
        "precision": precision,
        "workers": _number_or_word(workers),
        "cache": cache,
        "device": device,
        "seed": seed,
        "patience": patience,
        "compile": compile_,
        "deterministic": deterministic,
        "out": out and str(out),
        "name": name,
        "log": tuple(w for w in log.split(",") if w) if log is not None else None,
    }
    flags = {key: value for key, value in given.items() if value is not None}
    if resume is not None and (model is not None or flags or set_values):
        raise UsageError("--resume takes model and settings from the run", hint=f"finetune-discrete --resume {resume}")
    path = resolve_model(model) if resume is None else None
    if path is not None and path.suffix.lower() in EXPORT_SUFFIXES:
        raise UsageError(f"{path} is an export, which cannot be trained", hint="name the weights that it was made of")

    from rtdetr_cli.weights.load import load_model
    from rtdetr_cli.workflows.finetune import refuse_early, stop_on_signals
    from rtdetr_cli.workflows.finetune_discrete import FinetuneDiscrete, begun_stage, plan_discrete

    if path is None:
        assert resume is not None
        path, config = begun_stage(resume)
    else:
        config = plan_discrete(path, load_model(path)[1], flags, sets=set_values or [])
        refuse_early(config)
    stage = FinetuneDiscrete(path, config, max_drop=max_drop, begun=resume is not None, tell=terminal.say)
    terminal.say(f"start {path}  discrete sampling, rounding {config.settings.rounding}, offsets frozen")
    with terminal.progress(2 * len(stage.val), "before") as bar:
        stage.before(progress=bar.advance)
    if not stage.trained:
        with stop_on_signals() as stop:
            _train(stage, stop, sys.argv)
    with terminal.progress(len(stage.val), "after") as bar:
        outcome = stage.after(progress=bar.advance)
    _report(outcome, as_json)


def _train(stage: FinetuneDiscrete, stop: Any, argv: list[str]) -> None:
    """Train here, or in a process for each device where several are named."""
    import tempfile

    from rtdetr_cli.cli.train import render
    from rtdetr_cli.train import launch
    from rtdetr_cli.train.processes import parse_devices
    from rtdetr_cli.train.stop import Interrupted

    devices = parse_devices(stage.config.settings.device)
    if len(devices) == 1:
        try:
            render(stage.train(stop=stop, argv=argv), result_on_stdout=False)
        except Interrupted as error:
            error.hint = f"rtdetr finetune-discrete --resume {stage.run}"
            raise
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "config.toml"
        settings.write_text(stage.config.to_toml(), encoding="utf-8")
        words = ["--resume", str(stage.run)] if stage.begun else ["--config", str(settings)]
        code = launch.supervise(["train", *words], devices)
    if code:
        raise typer.Exit(code)


def _operators(counts: dict[str, int], begin: str) -> tuple[str, bool]:
    """Return a line of an export's operators, the most frequent first, and whether some had no room in it."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} {number}" for kind, number in ordered]
    for shown in range(len(words), 0, -1):
        rest = len(words) - shown
        line = begin + ", ".join(words[:shown]) + (f" and {rest} more kinds" if rest else "")
        if len(line) <= LINE:
            return line, rest > 0
    return begin + f"{len(words)} kinds", bool(words)


def _report(outcome: Outcome, as_json: bool) -> None:
    from rtdetr_cli.cli import terminal
    from rtdetr_cli.workflows.finetune_discrete import RESULT

    if as_json:
        terminal.emit_json(outcome.to_json())
    else:
        terminal.table(
            ("model", "AP", "95 %", "AP50", "beside the original"),
            [
                (
                    row.name,
                    row.ap.value,
                    f"{row.ap.lower:.3f} to {row.ap.upper:.3f}",
                    row.ap50,
                    "" if row.difference is None else _difference(row.difference),
                )
                for row in outcome.rows
            ],
        )
        kinds = sorted({k for e in outcome.exports for k in e.artefact.operators} | {"GridSample"})
        counts = [[e.artefact.operators.get(kind, 0) for e in outcome.exports] for kind in kinds]
        terminal.table(
            ("export", *(e.name for e in outcome.exports)),
            [
                ("gate", *("passed" if e.artefact.passed else "FAILED" for e in outcome.exports)),
                ("ms in ONNX Runtime", *(f"{e.milliseconds:.1f}" for e in outcome.exports)),
                ("operators", *(str(sum(e.artefact.operators.values())) for e in outcome.exports)),
                *(
                    (kind, *map(str, row))
                    for kind, row in zip(kinds, counts, strict=True)
                    if len(set(row)) > 1 or kind == "GridSample"
                ),
            ],
        )
        # Outside the table, which a narrow terminal folds: a path must stay whole to be copied.
        terminal.out(f"model  {outcome.best}")
        for export in outcome.exports:
            terminal.out(f"export of the {export.name} model  {export.artefact.path}")
        lists = [_operators(e.artefact.operators, f"operators of the {e.name} model  ") for e in outcome.exports]
        for line, _ in lists:
            terminal.out(line)
        if any(cut for _, cut in lists):
            terminal.out(f"all operators  {outcome.run / RESULT}")
        terminal.out("\n" + outcome.recommendation)
    if outcome.passed:
        return
    error = GateError(
        f"discrete sampling lost {outcome.drop:.3f} AP, more than --max-drop {outcome.max_drop:g}"
        if outcome.drop > outcome.max_drop
        else "an export did not pass its gate",
        hint=f"the files are kept in {outcome.run}; train longer with --epochs, or keep the original",
        code="max-drop" if outcome.drop > outcome.max_drop else "parity",
    )
    if not as_json:
        raise error
    terminal.complain(error.message, error.hint)
    raise typer.Exit(error.exit_code)


def _difference(gap: Any) -> str:
    return f"{gap.value:+.3f} ({gap.lower:+.3f} to {gap.upper:+.3f})"


def _number_or_word(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdecimal() else text
