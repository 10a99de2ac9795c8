"""`rtdetr demo`: the whole chain, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where everything goes.")] = Path("rtdetr-demo"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the training. [10]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON document on one line.")] = False,
) -> None:
    """Make a dataset, check it, train on it, evaluate, predict, export: offline, about three minutes."""
    import time

    from rtdetr_cli.cli import terminal
    from rtdetr_cli.cli.training_output import render
    from rtdetr_cli.text import tally
    from rtdetr_cli.workflows import demo as workflow
    from rtdetr_cli.workflows.finetune import stop_on_signals

    began = time.monotonic()
    work = workflow.Demo(folder, epochs=epochs or workflow.EPOCHS)

    def stage(number: int, text: str) -> None:
        terminal.say(terminal.paint(f"[{number}/6]", "36;1") + " " + text)

    stage(1, f"make a dataset: {work.train_images} images to train on, {work.val_images} held out")
    work.make_dataset()
    stage(2, "check it")
    counts = work.check_dataset()
    terminal.say(f"      {tally(counts)}")
    stage(3, f"train the preset tiny from random weights, {work.epochs} epochs")
    with stop_on_signals() as stop:
        render(work.train(stop=stop), result_on_stdout=False)
    stage(4, "evaluate it on the held-out images")
    evaluation = work.evaluate()
    metrics = evaluation.metrics
    stage(5, "predict")
    drawn, images, boxes = work.predict()
    stage(6, "export to ONNX, and hold the file against the model")
    artefact = work.export(tell=lambda text: terminal.say("      " + text))
    seconds = time.monotonic() - began

    verdict = artefact.verdict
    assert verdict is not None
    artefacts: dict[str, Any] = {
        "dataset": str(work.data),
        "run": str(work.run),
        "model": str(work.best),
        "predictions": str(drawn),
        "onnx": str(artefact.path),
        "parity": str(artefact.path.parent / "parity.json"),
    }
    if as_json:
        terminal.emit_json(
            {
                "metrics": dict(metrics),
                "artefacts": artefacts,
                "gate": verdict.to_json(),
                "findings": counts,
                "seconds": round(seconds, 1),
            }
        )
    else:
        shown = {name: terminal.show(metrics[name]) for name in ("AP", "AP50")}
        terminal.table(
            ("what", "where", "result"),
            [
                ("dataset", artefacts["dataset"], f"{counts.get('error', 0)} errors"),
                ("model", artefacts["model"], f"AP {shown['AP']}  AP50 {shown['AP50']} on held-out images"),
                ("images", artefacts["predictions"], f"{boxes} boxes on {images} images"),
                ("export", artefacts["onnx"], verdict.summary),
            ],
            title=f"done in {terminal.duration(seconds)}",
        )
        terminal.out(f"next  rtdetr predict {work.data / 'images'} --weights {artefact.path}")
        terminal.out("      rtdetr train --preset r18 --data YOUR.json")
    workflow.judge(dict(metrics))
