"""`rtdetr demo`: the whole workflow on a generated dataset, offline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from rtdetr_cli.cli import terminal
from rtdetr_cli.cli.options import JsonFlag
from rtdetr_cli.config.settings import MAX_EPOCHS
from rtdetr_cli.text import counted, tally


def demo(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder for all files.")] = Path("rtdetr-demo"),
    epochs: Annotated[int, typer.Option(min=1, max=MAX_EPOCHS, help="Training epochs.")] = 10,
    as_json: JsonFlag = False,
) -> None:
    """Generate a dataset, check it, train, evaluate, predict and export: offline, in about five minutes."""
    from rtdetr_cli.cli.training_output import render
    from rtdetr_cli.train.stop import stop_on_signals
    from rtdetr_cli.workflows import demo as workflow

    start = time.monotonic()
    work = workflow.Demo(folder, epochs=epochs)

    def stage(number: int, text: str) -> None:
        terminal.say(text, label=f"[{number}/6]", color="36;1")

    stage(1, f"generate a dataset: {workflow.TRAIN_IMAGES} training images, {workflow.VAL_IMAGES} validation images")
    work.make_dataset()
    stage(2, "check the dataset")
    counts = work.check_dataset()
    terminal.say(f"      {tally(counts)}")
    stage(3, f"train the preset tiny from random weights for {counted(work.epochs, 'epoch')}")
    with stop_on_signals() as stop:
        render(work.train(stop=stop), result_on_stdout=False)
    stage(4, "evaluate the model on the validation images")
    metrics = dict(work.evaluate().metrics)
    stage(5, "predict")
    drawn, images, boxes = work.predict()
    stage(6, "export to ONNX, and compare the file with the model")
    artefact = work.export(notify=lambda text: terminal.say("      " + text))
    seconds = time.monotonic() - start

    verdict = artefact.verdict
    assert verdict is not None
    artefacts = {
        "dataset": str(work.data),
        "run": str(work.run),
        "model": str(work.best),
        "predictions": str(drawn),
        "onnx": str(artefact.path),
        "parity": str(artefact.path.parent / "parity.json"),
    }
    if as_json:
        document = {"metrics": metrics, "artefacts": artefacts, "gate": verdict.to_json()}
        terminal.emit_json({**document, "findings": counts, "seconds": round(seconds, 1)})
    else:
        ap, ap50 = terminal.show(metrics["AP"]), terminal.show(metrics["AP50"])
        terminal.table(
            ("what", "where", "result"),
            [
                ("dataset", artefacts["dataset"], counted(counts.get("error", 0), "error")),
                ("model", artefacts["model"], f"AP {ap}  AP50 {ap50} on the validation images"),
                ("images", artefacts["predictions"], f"{counted(boxes, 'box')} on {counted(images, 'image')}"),
                ("export", artefacts["onnx"], verdict.summary),
            ],
            title=f"done in {terminal.duration(seconds)}",
        )
        terminal.next_step("rtdetr", "predict", work.data / "images", "--weights", artefact.path)
        terminal.next_step("rtdetr train --preset r18 YOUR_DATA")
    workflow.check_accuracy(metrics)
