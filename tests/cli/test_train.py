"""`rtdetr train`: its output, its run folder, its refusals, and resuming."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rtdetr_cli.cli.training_output import dry_run_warnings
from rtdetr_cli.train.checkpoint import load_checkpoint, save_checkpoint
from rtdetr_cli.weights.header import read_header
from rtdetr_cli.workflows.events import DryRunResult
from tests.small import FLAGS

SMALL = [*FLAGS, "--batch", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated dataset with one box that leaves its image, which is a warning."""
    from rtdetr_cli.datasets.generate import generate_dataset

    folder = generate_dataset(tmp_path_factory.mktemp("data") / "shapes", train=20, val=6, imgsz=64)
    document = json.loads((folder / "train.json").read_text())
    box = document["annotations"][0]["bbox"]
    box[2] = 64 - box[0] + 5
    (folder / "train.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    from rtdetr_cli.cli.app import run

    out = tmp_path_factory.mktemp("finished") / "runs"
    assert run(["train", *SMALL, "--data", str(data), "--epochs", "2", "--out", str(out)]) == 0
    return out / "tiny-shapes-01"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run as it was after its first epoch."""
    path = tmp_path / "runs" / "mine"
    shutil.copytree(finished, path)
    (path / ".last.ckpt.previous").replace(path / "last.ckpt")
    mark_unfinished(path)
    return path


def mark_unfinished(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "finished": ""}))


def test_files_of_a_run_folder(finished: Path) -> None:
    found = {p.name for p in finished.iterdir() if not p.name.startswith(".")}
    assert found >= {"config.toml", "manifest.json", "metrics.csv", "train.log", "best.safetensors", "last.ckpt"}
    weights = [p.name for p in finished.rglob("*") if p.suffix in (".safetensors", ".ckpt", ".pth", ".pt")]
    assert sorted(weights) == ["best.safetensors", "last.ckpt"]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert all((manifest["argv"], manifest["versions"]["torch"], manifest["dataset"]["fingerprint"]))
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    assert [r["epoch"] for r in rows] == ["1", "2"]
    assert all(float(r["loss"]) > 0 for r in rows)
    assert all(float(r[name]) > 0 for r in rows for name in ("train_loss", "val_loss"))
    terms = [k for k in rows[0] if k.startswith("loss_")]
    assert len(terms) == 3 * (1 + 1 + 2 + 1), "main, one aux, two denoising, encoder"
    assert sum(float(rows[0][t]) for t in terms) == pytest.approx(float(rows[0]["loss"]))


def test_the_model_file_holds_everything_that_prediction_needs(finished: Path, data: Path) -> None:
    header = read_header(finished / "best.safetensors")
    categories = json.loads((data / "train.json").read_text())["categories"]
    assert header.names == tuple(c["name"] for c in categories)
    assert header.category_ids == tuple(c["id"] for c in categories)
    assert (header.imgsz, header.preset, header.layers) == ((64, 64), "tiny", 2)
    assert header.thresholds.target == "f1"
    assert header.thresholds.dedupe == header.dedupe_gamma
    assert header.metrics["AP"] == header.dedupe.ap
    assert all((header.version, header.identity, header.dataset["fingerprint"]))
    assert header.metrics["AP"] >= 0


def test_eval_gives_the_metrics_of_training(finished: Path, data: Path, rtdetr) -> None:
    """Training evaluates the moving average in float32, as `eval` does with the file."""
    ran = rtdetr("eval", finished, "--data", data, "--json", "--device", "cpu", code=0)
    stored = read_header(finished / "best.safetensors").metrics
    for name, value in stored.items():
        assert ran.json["metrics"][name] == pytest.approx(value, abs=1e-6), name


def test_output_in_a_pipe(data: Path, rtdetr, tmp_path: Path) -> None:
    ran = rtdetr("train", data, *SMALL, "--epochs", 3, "--out", tmp_path, code=0)
    lines = ran.err.splitlines()
    assert lines[0].startswith("rtdetr 0.")
    assert lines[1].startswith("model  tiny, 0.1M parameters, from random weights")
    assert lines[2] == "data  shapes: 20 train / 6 val images, 5 classes, 1 warning (rtdetr validate)"
    plan = next(line for line in lines if line.startswith("plan  "))
    assert "3 epochs x 3 steps" in plan
    assert "effective batch 8 (2 x 4)" in plan
    assert any(line.startswith("warning: ") and "too few to learn" in line for line in lines)
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 3, "one line an epoch in a pipe"
    assert epochs[0].startswith("epoch 1/3  loss ")
    assert " left" in epochs[0]
    assert " left" not in epochs[2]
    assert any(line.startswith("loss  Val loss ") for line in lines)
    assert "AP50" in ran.out
    assert str(tmp_path / "tiny-shapes-01" / "best.safetensors") in ran.out
    assert "\033" not in ran.err + ran.out
    run = tmp_path / "tiny-shapes-01"
    predict, image, *weights = [line.split()[2:] for line in lines if line.startswith("next: ")][1]
    assert (predict, weights, Path(image).is_file()) == ("predict", ["--weights", str(run)], True)
    assert f"next: rtdetr eval {run}" in lines
    assert lines[-1] == f"next: rtdetr export {run}"


def test_json_output_is_one_document(data: Path, rtdetr, tmp_path: Path) -> None:
    ran = rtdetr("train", *SMALL, "--data", data, "--epochs", 1, "--out", tmp_path, "--name", "x", "--json", code=0)
    assert ran.json["schema_version"] == 1
    assert ran.json["run"] == str(tmp_path / "x")
    assert set(ran.json["metrics"]) >= {"AP", "AP50"}
    assert "next: " not in ran.err


def test_the_name_of_an_existing_run_is_refused(finished: Path, data: Path, rtdetr) -> None:
    before = sorted(p.name for p in finished.parent.rglob("*"))
    ran = rtdetr("train", *SMALL, "--data", data, "--out", finished.parent, "--name", finished.name, code=2)
    assert "exists" in ran.err
    assert f"rtdetr train --resume {finished}" in ran.err
    assert sorted(p.name for p in finished.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "no dataset given"),
        (["DATA", "--data", "gone"], 2, "two datasets given"),
        (["--data", "gone.json"], 3, "gone.json does not exist"),
        (["--data", "DATA", "--weights", "gone.pth"], 4, "gone.pth"),
        (["--data", "DATA", "--weights", "coco"], 2, "no such published weights"),
        (["--data", "DATA", "--device", "7"], 7, "7"),
        (["--data", "DATA", "--device", "fast"], 2, "fast"),
        (["--data", "DATA", "--precision", "fp16"], 7, "fp16"),
        (["--data", "DATA", "--batch", "9"], 2, "--effective-batch 8"),
        (["--data", "DATA", "--out", "FILE/runs"], 1, "cannot write to the output folder"),
        (["--data", "DATA", "--resume", "gone"], 2, "gone does not exist"),
        (["--resume", "DATA"], 2, "is not a run"),
        (["--resume", "gone", "--dry-run"], 2, "--dry-run"),
        (["--data", "DATA", "--set", "schedule"], 2, "key=value"),
        (["--data", "DATA", "--set", "model.quries=3"], 2, "did you mean model.queries?"),
        (["--data", "DATA", "--aug", "storng"], 2, "storng"),
    ],
)
def test_refusals(flags: list[str], code: int, message: str, data: Path, rtdetr, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    words = [str(data) if f == "DATA" else f for f in flags]
    settings = [] if "--resume" in flags else SMALL
    ran = rtdetr("train", *settings, *words, code=code)
    assert message in ran.err
    assert ran.err.count("error: ") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["FILE"], "nothing is left behind"


def test_a_resumed_run_needs_no_other_flag_and_gives_the_same_result(
    copy: Path, finished: Path, rtdetr, monkeypatch
) -> None:
    monkeypatch.chdir("/")
    state, _ = load_checkpoint(copy)
    assert 0 < state["seconds"] < 1000
    save_checkpoint(copy, state | {"seconds": 5000.0})
    ran = rtdetr("train", "--resume", copy, "--json", code=0)
    assert 5000 < ran.json["seconds"] < 6000, "with the time before the pause"
    assert "resumed at epoch 2, step 3" in ran.err
    assert "epoch 2/2" in ran.err
    data_line = next(line for line in ran.err.splitlines() if line.startswith("data  "))
    assert data_line.endswith("6 val images, 5 classes"), "the dataset was checked when the run began"
    for name in ("metrics.csv", "best.safetensors"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize("resolved", [False, True])
def test_resume_accepts_the_same_flags(copy: Path, data: Path, rtdetr, resolved: bool) -> None:
    """The flags may be those of the first command, or the values that the run chose for the others."""
    lr = json.loads((copy / "manifest.json").read_text())["plan"]["lr"]
    found = ["--lr", lr, "--aug", "light", "--weights", "none", "--out", copy.parent, "--name", copy.name]
    rtdetr("train", "--resume", copy, *SMALL, "--data", data, "--epochs", 2, *(found if resolved else []), code=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "9"], "epochs is 2 in this run, not 9"),
        (["--lr", "1e-5"], "lr is"),
        (["--imgsz", "96"], "imgsz is 64x64 in this run, not 96x96"),
        (["--seed", "3"], "seed is 0 in this run, not 3"),
        (["--preset", "r18"], "preset is tiny in this run, not r18"),
        (["--set", "schedule=official"], "schedule is scaled in this run, not official"),
        (["--set", "model.queries=13"], "model.queries is 12 in this run, not 13"),
        (["--effective-batch", "16"], "effective_batch is 8"),
        (["--weights", "other"], "weights is none in this run, not /"),
        (["--aug", "recipe"], "aug is light in this run, not recipe"),
        (["--name", "other"], "name is mine in this run, not other"),
        (["--preset", "other.toml"], "other.toml does not exist"),
    ],
)
def test_resume_refuses_a_changed_flag_by_name(flags: list[str], message: str, copy: Path, rtdetr) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    rtdetr("train", "--resume", copy, *flags, code=2, err=message)
    assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before


def test_resume_refuses_an_edited_config_by_name(copy: Path, rtdetr) -> None:
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("ema_age = ", "ema_age = 0.1 # "))
    ran = rtdetr("train", "--resume", copy, code=2)
    assert "ema_age was" in ran.err
    assert "0.1 now" in ran.err


def changed(document: dict[str, Any], what: str) -> None:
    if what == "box":
        document["annotations"][0]["bbox"][0] += 1
    elif what == "image":
        gone = document["images"].pop()["id"]
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] != gone]
    else:
        document["categories"][0]["name"] = "other"


@pytest.mark.parametrize(
    ("what", "message"),
    [("box", "boxes"), ("image", "training images 20 then, 19 now"), ("class", "classes")],
)
def test_resume_refuses_a_changed_dataset(what: str, message: str, data: Path, rtdetr, tmp_path: Path) -> None:
    own = tmp_path / "shapes"
    shutil.copytree(data, own)
    words = ["train", *SMALL, "--data", own, "--epochs", 2, "--out", tmp_path, "--name", "x"]
    assert rtdetr(*words).code == 0
    (tmp_path / "x" / ".last.ckpt.previous").replace(tmp_path / "x" / "last.ckpt")
    mark_unfinished(tmp_path / "x")
    for name in ("train.json", "val.json") if what == "class" else ("train.json",):
        document = json.loads((own / name).read_text())
        changed(document, what)
        (own / name).write_text(json.dumps(document))
    ran = rtdetr("train", "--resume", tmp_path / "x", code=3)
    assert "the dataset has changed" in ran.err
    assert message in ran.err


def test_resuming_a_finished_run_does_nothing(finished: Path, rtdetr) -> None:
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()}
    ran = rtdetr("train", "--resume", finished, "--json", code=0)
    assert "nothing left to do" in ran.err
    assert ran.json["best"] == str(finished / "best.safetensors")
    assert {p.name: p.read_bytes() for p in finished.iterdir() if p.is_file()} == before


def test_resume_with_damaged_checkpoints(copy: Path, finished: Path, rtdetr) -> None:
    good = (copy / "last.ckpt").read_bytes()
    (copy / ".last.ckpt.previous").write_bytes(good)
    (copy / "last.ckpt").write_bytes(good[:-100])
    rtdetr("train", "--resume", copy, code=0, err="truncated: continuing from the checkpoint before it")
    assert (copy / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    for name in ("last.ckpt", ".last.ckpt.previous"):
        (copy / name).write_bytes(b"rubbish")
    mark_unfinished(copy)
    rtdetr("train", "--resume", copy, code=4, err="is not a checkpoint")


def test_a_dry_run_measures_and_writes_nothing(data: Path, rtdetr, tmp_path: Path, monkeypatch) -> None:
    words = ["train", *SMALL, "--data", data, "--out", tmp_path / "runs", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["rtdetr", *map(str, words)])
    ran = rtdetr(*words, code=0)
    assert ran.err.endswith(f"next: rtdetr train {shlex.join(map(str, words[1:-1]))}\n")
    for row in ("largest step", "evaluation", "whole run", "memory", "disk"):
        assert row in ran.out
    assert not list(tmp_path.iterdir())
    ran = rtdetr(*words, "--json")
    assert min(ran.json["seconds"]["total"], ran.json["memory_bytes"], ran.json["disk_bytes"]) > 0
    assert {c["name"] for c in ran.json["plan"]} >= {"lr", "warmup", "EMA"}


@pytest.mark.parametrize(
    ("disk_free", "memory_total", "words"),
    [(10**12, 10**10, []), (10**6, 10**10, ["only 0.00 GiB is free"]), (10**12, 2 * 10**9, ["1.9 of 1.9 GiB"])],
)
def test_a_dry_run_warns_about_too_little_memory_or_disk_space(
    disk_free: int, memory_total: int, words: list[str]
) -> None:
    report = DryRunResult(
        **dict.fromkeys(("step_seconds", "worst_seconds", "evaluation_seconds", "export_seconds"), 1.0),
        total_seconds=9.0,
        micro_batch=1,
        export_bytes=1,
        memory_bytes=2 * 10**9,
        memory_total=memory_total,
        disk_bytes=10**8,
        disk_free=disk_free,
    )
    warnings = dry_run_warnings(report)
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_running_out_of_memory_is_one_sentence(data: Path, rtdetr, tmp_path: Path, monkeypatch) -> None:
    from rtdetr_cli.workflows import prepare

    def fail(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(prepare, "forward_largest", fail)
    ran = rtdetr("train", *SMALL, "--data", data, "--out", tmp_path, "--batch", "auto")
    assert (ran.code, "one image does not fit into the memory of cpu" in ran.err) == (1, True)
    monkeypatch.setattr(prepare, "make_learner", fail)
    rtdetr("train", *SMALL, "--data", data, "--out", tmp_path, code=1, err="error: out of memory: CUDA out of memory")
    assert not list(tmp_path.iterdir())


def test_a_drawn_val_split_is_the_same_in_every_run_and_kept_in_it(data: Path, rtdetr, tmp_path: Path) -> None:
    single = tmp_path / "single.json"
    shutil.copy(data / "train.json", single)
    held_out = []
    for seed in (0, 1):
        words = ("--images", data, "--out", tmp_path, "--epochs", 1, "--seed", seed)
        rtdetr("train", *SMALL, "--data", single, *words, code=0, err="the dataset has no val split: ")
        run = tmp_path / f"tiny-single-{seed + 1:02d}"
        held_out.append(json.loads((run / "val_images.json").read_text()))
    assert held_out[0] == held_out[1]
    # The run evaluates on the images that it kept, also if another version would choose others.
    (run / "val_images.json").write_text(json.dumps(held_out[1][:2]))
    evaluated = rtdetr("eval", run / "best.safetensors", "--json", code=0)
    assert evaluated.json["pictures"] == 2


def test_a_class_is_added_to_a_trained_detector(finished: Path, data: Path, rtdetr, tmp_path: Path) -> None:
    """The other classes keep what they have learned, by name; a renamed class counts as new, and the output says so."""
    own = tmp_path / "shapes"
    shutil.copytree(data, own)
    for name in ("train.json", "val.json"):
        document = json.loads((own / name).read_text())
        document["categories"][1]["name"] = "doughnut"
        document["categories"].append({"id": 99, "name": "comet"})
        document["annotations"][0]["category_id"] = 99
        (own / name).write_text(json.dumps(document))
    ran = rtdetr("train", *SMALL, "--data", own, "--epochs", 1, "--out", tmp_path, "--weights", finished, code=0)
    transferred = next(line for line in ran.err.splitlines() if "transferred by class name" in line)
    new = next(line for line in ran.err.splitlines() if "reinitialized" in line)
    assert "disc" in transferred
    assert "doughnut, comet" in new
    assert "doughnut" not in transferred
    manifest = json.loads((tmp_path / "tiny-shapes-01" / "manifest.json").read_text())
    assert [row["source_name"] for row in manifest["transfer"]["classes"]].count(None) == 2
    assert read_header(tmp_path / "tiny-shapes-01" / "best.safetensors").names[-1] == "comet"


@pytest.mark.slow
def test_a_few_images_can_be_overfitted(data: Path, rtdetr, tmp_path: Path) -> None:
    words = ["train", "--preset", "tiny", "--imgsz", 96, "--workers", 0, "--data", data, "--overfit", 4, "--epochs", 30]
    ran = rtdetr(*words, "--effective-batch", 8, "--out", tmp_path, "--json", code=0)
    assert ran.json["metrics"]["AP"] > 0.9


def test_a_failed_overfit_is_explained(data: Path, rtdetr, tmp_path: Path) -> None:
    ran = rtdetr("train", *SMALL, "--data", data, "--overfit", 3, "--epochs", 1, "--out", tmp_path, code=0)
    assert "data  shapes: 3 images, 54 times per epoch, for training and validation, 5 classes" in ran.err
    assert "were not overfitted" in ran.err
    early = next(line for line in ran.err.splitlines() if line.startswith("step "))
    assert re.fullmatch(
        r"step \d+/21  epoch 1/1  loss [\d.]+  [\d.]+ images/s  [\d.]+ GiB  .+ left without evaluation", early
    )
    assert "too few to overfit" in ran.err


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_told_so(
    rtdetr: Callable[..., Any], shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/bin/false"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    flags = "--preset tiny --weights none --imgsz 64 --epochs 1 --workers 0 --device cpu --dry-run --compile"
    ran = rtdetr("train", "--data", shapes_data, *flags.split(), code=7)
    assert "torch.compile failed" in ran.err
    assert "start a run without --compile" in ran.err
