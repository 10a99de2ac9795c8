"""Run folders of version 0.1, which say only in their log that they finished: they can be used, but not resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rtdetr_cli.config.presets import load_preset
from rtdetr_cli.errors import UsageError
from rtdetr_cli.runs import RunFolder, find_runs
from rtdetr_cli.weights.header import read_header

EPOCHS = 3
LOG = """\
2026-11-29 04:51:04  epoch 1/3  step 3  lr 0.000707  loss 30.3687  AP 0.9000  AP50 0.9500  3.6 s  waited 3%  1.04 GB
2026-11-29 04:51:08  epoch 2/3  step 6  lr 0.000707  loss 31.9211  AP 0.9000  AP50 0.9500  3.2 s  waited 2%  1.08 GB
2026-11-29 04:51:11  epoch 3/3  step 9  lr 3.54e-05  loss 29.5029  AP 0.9000  AP50 0.9500  3.1 s  waited 3%  1.09 GB
"""
FINISHED = "2026-11-29 04:51:11  finished (done), best AP 0.9000 at epoch 1\n"
CONFIG = """\
# Resolved settings of one run of rtdetr train. preset: tiny
data = "{data}"  # --data
preset = "tiny"  # --preset
weights = "none"  # --weights
epochs = 3  # --epochs
batch = 4  # --batch
effective_batch = 8  # --effective-batch
imgsz = [96, 128]  # --imgsz
aug = "auto"
freeze = "preset"
precision = "auto"
compile = false
workers = 0  # --workers
cache = "none"
cache_gb = 0.0
device = "auto"
seed = 3  # --seed
deterministic = false
patience = 0
overfit = 0
out = "runs"
name = "{name}"  # --name
log = []
sampling = "bilinear"
rounding = "published"
schedule = "scaled"
warmup = 0.05
flat = 0.8
final_rate = 0.05
ema_age = 0.03
ema_ramp = 0.15
calm = 0.1
eval_every = 1
val_fraction = 0.2
checkpoint_minutes = 5.0
plots = true
checkpoint_steps = 0

[model]
{model}

[optim]
lr = 0.001
lr_backbone = 0.001
weight_decay = 0.0001
decay_free = "norm"
batch = 16
clip_norm = 0.1
why = "trained from random weights, so backbone and head share one high rate"

[rest_of_preset]
name = "tiny"
description = "ours, for demos and tests"
params_m = 1.7
imgsz = [192, 192]

[rest_of_preset.official]
epochs = 120
strong_augmentation_until = 117
multi_scale_until = 0
warmup_steps = 2000
ema_decay = 0.9999
ema_warmup = 2000
discrete_epochs = 36
discrete_strong_until = 33

[provenance]
"data" = "--data"
"preset" = "--preset"
"weights" = "--weights"
"epochs" = "--epochs"
"name" = "--name"
"""


def write_old_run(path: Path, *, model: Path, data: Path, finished: bool = True) -> Path:
    """Write what version 0.1.0 left of a run, with a trained model in it."""
    path.mkdir(parents=True)
    shutil.copy(model, path / "best.safetensors")
    sizes = {**load_preset("tiny").model.model_dump(mode="json"), **read_header(model).architecture}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in sizes.items())
    (path / "config.toml").write_text(CONFIG.format(data=data, name=path.name, model=lines))
    manifest = {
        "argv": ["rtdetr", "train"],
        "started": "2026-11-29T04:50:59+0000",
        "versions": {"rtdetr-cli": "0.1.0", "torch": "2.14.1"},
        "micro_batch": 4,
        "identity": {"dataset": {"pictures": "8ca8", "training pictures": 13}},
        "plan": {"epochs": EPOCHS, "lr": 0.0007, "augmentation": "light"},
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    (path / "metrics.csv").write_text("epoch,step,AP\n1,3,0.9\n2,6,0.9\n3,9,0.9\n")
    (path / "train.log").write_text(LOG + FINISHED * finished)
    (path / "last.ckpt").write_bytes(b"rtdetr-checkpoint 1\n")
    return path


@pytest.fixture
def runs(tmp_path: Path, shapes_model: Path, shapes_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run `a` and an interrupted run `b`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_old_run(tmp_path / "runs" / "a", model=shapes_model, data=shapes_data)
    write_old_run(tmp_path / "runs" / "b", model=shapes_model, data=shapes_data, finished=False)
    return Path("runs")


def test_the_log_says_whether_an_old_run_finished(runs: Path) -> None:
    finished, interrupted = RunFolder(runs / "a"), RunFolder(runs / "b")
    assert [run.path.name for run in find_runs(runs)] == ["a", "b"]
    assert finished.finished == "done"
    assert finished.caveat() == ""
    finished.refuse_old()
    assert interrupted.finished == ""
    assert interrupted.caveat() == "unfinished, epoch 3 of 3"
    with pytest.raises(UsageError, match=r"started by rtdetr-cli 0\.1\.0, and this version cannot resume it"):
        interrupted.refuse_old()


def test_an_old_run_evaluates_predicts_and_exports(rtdetr: Any, runs: Path, shapes_data: Path) -> None:
    ran = rtdetr("eval", "--json", code=0)
    assert "runs/a/best.safetensors (the newest finished run; runs/b is newer, but unfinished, epoch 3 of 3)" in ran.err
    assert ran.json["metrics"]["AP"] > 0.3
    image = next(p for p in sorted(shapes_data.parent.rglob("*")) if p.suffix in (".png", ".jpg"))
    ran = rtdetr("predict", image, "--weights", runs / "a", "--no-save", "--json", code=0)
    ran = rtdetr("export", runs / "a", "--onnx", "--json", code=0)
    assert (runs / "a" / "export" / "best.onnx").is_file()


def test_a_new_run_starts_from_an_old_one(rtdetr: Any, runs: Path, shapes_data: Path) -> None:
    words = ["--weights", runs / "b", "--data", shapes_data, "--epochs", 1, "--workers", 0, "--name", "new", "--json"]
    rtdetr("train", *words, "--set", "plots=false", code=0)
    assert json.loads((runs / "new" / "manifest.json").read_text())["finished"] == "done"


def test_an_old_finished_run_has_nothing_left_to_do(rtdetr: Any, runs: Path) -> None:
    ran = rtdetr("train", "--resume", runs / "a", "--json", code=0)
    assert ran.json["already_finished"] is True
    assert ran.json["epochs"] == EPOCHS


def test_an_old_interrupted_run_is_not_resumed(rtdetr: Any, runs: Path) -> None:
    ran = rtdetr("train", "--resume", runs / "b", code=2)
    assert "was started by rtdetr-cli 0.1.0, and this version cannot resume it" in ran.err
    assert f"rtdetr train --weights {runs / 'b'} --data DATA starts a new run from its best model" in ran.err
