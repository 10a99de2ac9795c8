"""`rtdetr finetune-discrete`: the second stage with discrete sampling, before and after in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag
from rtdetr_cli.cli.select import resolve_model
from rtdetr_cli.cli.setting_flags import TRAIN_FLAGS, SetFlag, with_setting_flags
from rtdetr_cli.errors import GateError, UsageError
from rtdetr_cli.runs import DISCRETE_RESULT, RunFolder
from rtdetr_cli.text import abbreviate
from rtdetr_cli.weights.header import EXPORT_SUFFIXES

if TYPE_CHECKING:
    from rtdetr_cli.train.stop import StopFlag
    from rtdetr_cli.workflows.finetune_discrete import FinetuneDiscrete, Outcome

OPERATORS_LISTED = 8
# Preset and weights come from the model; overfitting a few images makes no sense in a second stage.
FLAGS = tuple(name for name in TRAIN_FLAGS if name not in ("preset", "weights", "overfit"))
DEFAULTS = dict.fromkeys(FLAGS, "the run's") | {
    "data": "the model's",
    "images": "the model's",
    "epochs": "the published share of the first stage",
    "imgsz": "the model's",
    "name": "PRESET-DATASET-discrete-NN",
}


@with_setting_flags(FLAGS, defaults=DEFAULTS)
def finetune_discrete(
    flags: dict[str, Any],
    model: Annotated[
        Path | None, typer.Argument(help="Run folder or model file; the newest run by default.", show_default=False)
    ] = None,
    *,
    max_drop: Annotated[
        float, typer.Option(help="Maximum loss of AP (0 to 1); exit with code 6 if it is larger.")
    ] = 0.01,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Resume an interrupted second stage; allows no other flag but --max-drop."),
    ] = None,
    set_values: SetFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Finetune a model with discrete sampling, and report whether it is worth it."""
    from rtdetr_cli.workflows.launching import require_dataset

    if not 0 <= max_drop <= 1:
        raise UsageError(f"--max-drop {max_drop:g} is not a fraction from 0 to 1", hint="0.01 is one point of AP")
    if resume is not None and (model is not None or flags or set_values):
        hint = f"rtdetr finetune-discrete --resume {resume}"
        raise UsageError("--resume takes the model and all settings from the run", hint=hint)
    if resume is not None:
        RunFolder.open(resume)
    else:
        path = resolve_model(model)
        if path.suffix.lower() in EXPORT_SUFFIXES:
            hint = "pass the model that it was exported from"
            raise UsageError(f"{path} is an exported file, which cannot be trained", hint=hint)
        if "data" in flags:
            require_dataset(flags["data"])

    from rtdetr_cli.train.stop import stop_on_signals
    from rtdetr_cli.weights.load import load_model
    from rtdetr_cli.workflows.finetune import refuse_early
    from rtdetr_cli.workflows.finetune_discrete import FinetuneDiscrete, open_stage, plan_discrete

    if resume is not None:
        path, config = open_stage(resume)
    else:
        config = plan_discrete(path, load_model(path)[1], flags, sets=set_values or [])
        refuse_early(config)
    stage = FinetuneDiscrete(path, config, max_drop=max_drop, resuming=resume is not None, notify=terminal.say)
    terminal.say(f"start {path}  discrete sampling, rounding {config.settings.rounding}, offsets frozen")
    with terminal.progress(2 * len(stage.val), "before") as bar:
        stage.before(progress=bar.advance)
    if not stage.trained:
        with stop_on_signals() as stop:
            _train(stage, stop)
    with terminal.progress(len(stage.val), "after") as bar:
        outcome = stage.after(progress=bar.advance)
    if as_json:
        terminal.emit_json(outcome.to_json())
    else:
        show_outcome(outcome)
        if outcome.passed:
            terminal.next_step("rtdetr", "export", outcome.run)
    if not outcome.passed:
        message, code = "the verification of an export failed", "parity"
        if outcome.drop > outcome.max_drop:
            message = f"discrete sampling lost {outcome.drop:.3f} AP, more than --max-drop {outcome.max_drop:g}"
            code = "max-drop"
        hint = f"the files are kept in {outcome.run}; train longer with --epochs, or keep the original model"
        terminal.fail(GateError(message, hint=hint, code=code))


def _train(stage: FinetuneDiscrete, stop: StopFlag) -> None:
    """Train here, or in one process for each device if there are several."""
    from rtdetr_cli.cli.training_output import render
    from rtdetr_cli.train.processes import parse_devices
    from rtdetr_cli.train.stop import Interrupted
    from rtdetr_cli.workflows.launching import command_line, run_processes

    devices = parse_devices(stage.config.settings.device)
    if len(devices) > 1:
        code = run_processes(stage.config, devices, resume=stage.run if stage.resuming else None)
        if code:
            raise typer.Exit(code)
        return
    try:
        render(stage.train(stop=stop, argv=command_line()), result_on_stdout=False)
    except Interrupted as error:
        error.hint = f"rtdetr finetune-discrete --resume {stage.run}"
        raise


def show_outcome(outcome: Outcome) -> None:
    """Print the tables of a second stage, its files and the recommendation."""

    def difference(gap: Any) -> str:
        return "" if gap is None else f"{gap.value:+.3f} ({gap.lower:+.3f} to {gap.upper:+.3f})"

    terminal.table(
        ("model", "AP", "95%", "AP50", "difference to the original"),
        [
            (row.name, row.ap.value, f"{row.ap.lower:.3f} to {row.ap.upper:.3f}", row.ap50, difference(row.difference))
            for row in outcome.rows
        ],
    )
    counts = [export.artefact.operators for export in outcome.exports]
    kinds = sorted({kind for operators in counts for kind in operators} | {"GridSample"})
    numbers = {kind: [operators.get(kind, 0) for operators in counts] for kind in kinds}
    terminal.table(
        ("export", *(export.name for export in outcome.exports)),
        [
            ("verification", *("passed" if export.artefact.passed else "FAILED" for export in outcome.exports)),
            ("ms in ONNX Runtime", *(f"{export.milliseconds:.1f}" for export in outcome.exports)),
            ("operators", *(str(sum(operators.values())) for operators in counts)),
            *((kind, *map(str, row)) for kind, row in numbers.items() if len(set(row)) > 1 or kind == "GridSample"),
        ],
    )
    # Outside the table, which a narrow terminal folds: a path must stay on one line to be copied.
    terminal.out(f"model  {outcome.best}")
    for export in outcome.exports:
        terminal.out(f"export of the {export.name} model  {export.artefact.path}")
    for export in outcome.exports:
        ordered = sorted(export.artefact.operators.items(), key=lambda item: (-item[1], item[0]))
        words = [f"{kind} {number}" for kind, number in ordered]
        terminal.out(f"operators of the {export.name} model  {abbreviate(words, OPERATORS_LISTED)}")
    if any(len(operators) > OPERATORS_LISTED for operators in counts):
        terminal.out(f"all operators  {outcome.run / DISCRETE_RESULT}")
    terminal.out("\n" + outcome.recommendation)
