"""A run from settings to its end: what is freed when it fails, how signals stop it, and how it resumes."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image

from rtdetr_cli.batches.loader import TrainLoader
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.datasets.generate import generate_dataset
from rtdetr_cli.errors import DataError, EnvironmentProblem, ModelError, RtdetrError, UsageError
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.train import loggers, memory
from rtdetr_cli.train.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from rtdetr_cli.train.events import EpochDone, StepDone
from rtdetr_cli.train.stop import Interrupted, StopFlag, stop_on_signals
from rtdetr_cli.weights.header import read_header
from rtdetr_cli.workflows import dry_run
from rtdetr_cli.workflows import finetune as workflow
from rtdetr_cli.workflows.events import DryRunResult, Notice, RunFinished, RunStarted
from rtdetr_cli.workflows.finetune import finetune, resume
from rtdetr_cli.workflows.identity import refuse_changes
from rtdetr_cli.workflows.prepare import prepare, resolve_micro_batch
from tests.small import SETS


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_dataset(tmp_path_factory.mktemp("shapes"), train=8, val=3, imgsz=64)


@pytest.fixture
def settings(shapes: Path, small_run: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    defaults = {"data": str(shapes), "effective_batch": 4, "batch": 4, "name": "x"}
    return lambda *sets, **flags: small_run(*sets, **{**defaults, **flags})


def killed_at_start(config: RunConfig) -> Path:
    """Begin a run and leave it before its first step; return the folder."""
    events = finetune(config)
    assert isinstance(next(events), RunStarted)
    events.close()  # type: ignore[attr-defined]
    return Path(config.settings.out) / config.settings.name


def interrupted(config: RunConfig) -> Path:
    """Train one epoch, then stop as on a signal; return the folder."""
    stop = StopFlag()
    folder = Path(config.settings.out) / config.settings.name

    def train_one_epoch() -> None:
        for event in finetune(config, stop=stop):
            if isinstance(event, EpochDone):
                stop.signal = signal.SIGTERM

    with pytest.raises(Interrupted):
        train_one_epoch()
    return folder


# ---- the loader -------------------------------------------------------------------------------------------------


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[TrainLoader]:
    """Return the loaders that were closed explicitly, not by the garbage collector."""
    seen: list[TrainLoader] = []
    real = TrainLoader.close
    monkeypatch.setattr(TrainLoader, "close", lambda self: (seen.append(self), real(self))[1])
    return seen


def test_the_cache_has_the_given_budget(settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def watched(*words: Any, **options: Any) -> TrainLoader:
        given.update(options)
        return TrainLoader(*words, **options)

    monkeypatch.setattr("rtdetr_cli.workflows.prepare.TrainLoader", watched)
    prepare(settings(cache="ram", cache_gb=0.5)).loader.close()
    assert (given["cache"], given["cache_budget"]) == ("ram", 500_000_000)


def test_workers_start_before_there_is_a_network(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A forked process keeps what its parent had in memory, which was a network, its average and its moments.
    def workers() -> int:
        return len([c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE])

    before, seen = workers(), []

    def build(*_: object) -> None:
        seen.append(workers() - before)
        raise ModelError("no network")

    monkeypatch.setattr("rtdetr_cli.workflows.prepare._build_model", build)
    with pytest.raises(ModelError, match="no network"):
        prepare(settings(workers=2))
    assert seen == [2]
    gc.collect()
    assert workers() == before


def test_the_loader_is_closed_when_no_micro_batch_fits(
    settings: Callable[..., RunConfig], closed: list[TrainLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        return memory.halve(1, where="cpu")

    monkeypatch.setattr(workflow, "resolve_micro_batch", full)
    with pytest.raises(RtdetrError, match="one image does not fit"):
        list(finetune(settings()))
    assert len(closed) == 1


def test_the_loader_is_closed_when_a_run_cannot_resume(
    settings: Callable[..., RunConfig], closed: list[TrainLoader]
) -> None:
    folder = interrupted(settings())
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("seed = 0", "seed = 1"))
    closed.clear()
    with pytest.raises(UsageError, match="seed was 0"):
        list(resume(folder))
    assert len(closed) == 1


def test_the_loader_is_closed_when_output_fails(
    settings: Callable[..., RunConfig], closed: list[TrainLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering fails in the middle of a run, and the error keeps its frames alive."""
    from rtdetr_cli.cli import training_output

    def fail(*_: object) -> str:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(training_output, "epoch_line", fail)
    with pytest.raises(OSError, match="the terminal is gone") as caught:
        training_output.render(finetune(settings()))
    assert caught.tb is not None
    assert len(closed) == 3, "the loader of the run, and two of sampled images"


# ---- signals ----------------------------------------------------------------------------------------------------


def raised(number: int) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        signal.raise_signal(number)
    return caught.value


def test_a_signal_before_the_run_ends_at_once() -> None:
    with stop_on_signals() as stop:
        assert isinstance(raised(signal.SIGINT), KeyboardInterrupt)
    with stop_on_signals():
        found = raised(signal.SIGTERM)
    assert isinstance(found, SystemExit)
    assert found.code == 143
    assert not stop


def test_a_run_handles_signals_once_its_folder_exists(settings: Callable[..., RunConfig]) -> None:
    with stop_on_signals() as stop:
        events = finetune(settings(), stop=stop)
        assert isinstance(next(events), RunStarted)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(Interrupted) as caught:
            list(events)
    assert caught.value.exit_code == 130


def test_a_dry_run_halves_a_micro_batch_that_does_not_fit(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = dry_run.run_largest_step, []

    def full(*words: Any, micro_batch: int, **others: Any) -> None:
        tried.append(micro_batch)
        if micro_batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        real(*words, micro_batch=micro_batch, **others)

    monkeypatch.setattr(dry_run, "run_largest_step", full)
    events = list(finetune(settings(), dry_run=True))
    assert isinstance(events[-1], DryRunResult)
    assert events[-1].micro_batch == 1
    assert tried == [4, 2, 1, 1]


def test_a_dry_run_stops_at_once(settings: Callable[..., RunConfig]) -> None:
    with stop_on_signals() as stop:
        events = finetune(settings(), stop=stop, dry_run=True)
        next(events)
        assert isinstance(raised(signal.SIGINT), KeyboardInterrupt)
        events.close()  # type: ignore[attr-defined]


# ---- resuming ----------------------------------------------------------------------------------------------------


def test_a_changed_augmentation_file_is_refused(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    import albumentations

    file = tmp_path / "aug.json"

    def write(p: float) -> None:
        albumentations.save(albumentations.Compose([albumentations.HorizontalFlip(p=p)]), file)

    write(0.5)
    folder = interrupted(settings(aug=str(file)))
    write(0.6)
    with pytest.raises(UsageError, match=r"the content of the --aug file was .* and is .* now") as caught:
        list(resume(folder))
    assert "restore the file" in caught.value.hint
    write(0.5)
    assert isinstance(list(resume(folder))[-1], RunFinished)


PRESET = """
name = "mine"
description = "ours"
params_m = 1.0
imgsz = [64, 64]
[model]
depth = 10
denoising = 8
num_points = [1, 1, 1]
[optim]
[official]
epochs = 11
strong_augmentation_until = 9
"""


def test_a_run_resumes_without_its_preset_file(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Naming the preset again, or the size that it gave, is no change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(PRESET)
    folder = interrupted(settings(preset="mine.toml", imgsz=None))
    (tmp_path / "mine.toml").rename(tmp_path / "moved.toml")
    events = list(resume(folder, flags={"preset": "mine.toml", "imgsz": (64, 64)}, sets=list(SETS)))
    begun = next(e for e in events if isinstance(e, RunStarted))
    assert begun.config.preset.name == "mine"
    assert begun.config.preset.official.epochs == 11
    assert isinstance(events[-1], RunFinished)


def test_another_spelling_of_the_same_value_is_no_change(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = interrupted(settings(imgsz=None, name="w"))
    (tmp_path / "w").symlink_to(first)
    config = settings(imgsz=None, weights="w/best.safetensors").anchored()
    folder = tmp_path / "runs" / "x"
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "manifest.json").write_text('{"plan": {"lr": 0.25, "augmentation": "light"}}')
    same = {"weights": "w/best.safetensors", "imgsz": (192, 192), "lr": 0.25, "aug": "light", "name": "x"}
    refuse_changes(config, {**same, "out": "runs"}, ["model.decoder_layers=2"], Path("runs/x"))
    refuse_changes(config, {"weights": str(first / "best.safetensors")}, [], folder)


# ---- images ---------------------------------------------------------------------------------------------------


def test_a_replaced_image_is_refused_by_name(settings: Callable[..., RunConfig], shapes: Path, tmp_path: Path) -> None:
    """Even of the same size in pixels. File times are ignored: a copy of the dataset has other ones."""
    own = tmp_path / "own"
    shutil.copytree(shapes, own)
    folder = interrupted(settings(data=str(own)))
    kept = tmp_path / "kept"
    own.rename(kept)
    shutil.copytree(kept, own, copy_function=shutil.copyfile)
    images = sorted(load_splits(own).train.path(i) for i in range(8))  # type: ignore[union-attr]
    good = {path: path.read_bytes() for path in images}

    def overwrite(path: Path) -> None:
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)

    overwrite(images[2])
    with pytest.raises(DataError, match=f": 1 image file, such as .*{images[2].name}"):
        list(resume(folder))
    overwrite(images[5])
    with pytest.raises(DataError, match=f"2 image files, such as .*{images[2].name}"):
        list(resume(folder))
    (folder / ".images").unlink()
    with pytest.raises(DataError, match="some image files are different"):
        list(resume(folder))
    for path, content in good.items():
        path.write_bytes(content)
    assert isinstance(list(resume(folder))[-1], RunFinished)


# ---- finished and locked runs -----------------------------------------------------------------------------------


def test_a_finished_run_has_nothing_left_to_do(
    settings: Callable[..., RunConfig], closed: list[TrainLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    (end,) = [e for e in finetune(settings()) if isinstance(e, RunFinished)]
    assert len(closed) == 3, "the loader of the run, and two of sampled images"
    manifest = RunFolder(end.folder).manifest()
    assert manifest["finished"] == "done"
    assert manifest["ended"] >= manifest["started"]
    monkeypatch.setattr(workflow, "prepare", None)  # nothing is loaded
    (again,) = list(resume(end.folder))
    assert isinstance(again, RunFinished)
    assert again.already_finished
    assert not end.already_finished
    for name in ("best", "metrics", "best_epoch", "epochs", "reason"):
        assert getattr(again, name) == getattr(end, name), name
    with pytest.raises(UsageError, match="epochs is 2 in this run, not 3"):
        list(resume(end.folder, flags={"epochs": 3}))


def test_a_run_killed_before_it_was_marked_as_finished_is_completed(settings: Callable[..., RunConfig]) -> None:
    """All epochs are done and saved, but the end of the run is not recorded."""
    end = list(finetune(settings()))[-1]
    assert isinstance(end, RunFinished)
    folder = RunFolder(end.folder)
    folder.write_manifest({**folder.manifest(), "finished": None})
    before = results(end.folder)
    events = list(resume(end.folder))
    assert not [e for e in events if isinstance(e, StepDone)]
    assert isinstance(events[-1], RunFinished)
    assert not events[-1].already_finished
    assert folder.finished == "done"
    assert results(end.folder) == before


def test_a_run_is_locked_while_it_trains(settings: Callable[..., RunConfig]) -> None:
    events = finetune(settings())
    started = next(events)
    assert isinstance(started, RunStarted)
    assert started.folder is not None
    with pytest.raises(UsageError, match=f"is being trained by process {os.getpid()} on "):
        next(resume(started.folder))
    events.close()  # type: ignore[attr-defined]
    assert isinstance(list(resume(started.folder))[-1], RunFinished)


# ---- nothing saved yet ------------------------------------------------------------------------------------------


def results(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "best.safetensors").read_bytes(), (folder / "metrics.csv").read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(finetune(settings(name="alone")))
    runs = Path(settings().settings.out)
    first = settings(name="killed", weights=str(runs / "alone"))
    other = settings(name="other", weights=str(runs / "alone"))
    list(finetune(other))
    assert not (killed_at_start(first) / "last.ckpt").exists()

    monkeypatch.setattr(workflow, "resolve_micro_batch", None)  # the recorded one is used
    events = resume(runs / "killed")
    begun = next(e for e in events if isinstance(e, RunStarted))
    assert begun.restarted
    assert begun.resumed is None
    assert begun.transfer is not None
    assert isinstance(list(events)[-1], RunFinished)
    assert results(runs / "killed") == results(runs / "other")


def test_a_run_killed_in_its_first_epoch_names_the_weights_that_it_started_from(
    settings: Callable[..., RunConfig],
) -> None:
    (end,) = (e for e in finetune(settings(epochs=1)) if isinstance(e, RunFinished))

    def config(name: str) -> RunConfig:
        return settings("checkpoint_steps=1", name=name, weights=str(end.best), epochs=1)

    (whole,) = (e for e in finetune(config("whole")) if isinstance(e, RunFinished))
    stop = StopFlag()

    def train_one_step() -> None:
        for event in finetune(config("killed"), stop=stop):
            if isinstance(event, StepDone):
                stop.signal = signal.SIGTERM

    with pytest.raises(Interrupted):
        train_one_step()
    folder = whole.folder.with_name("killed")
    assert not RunFolder(folder).best.exists()
    list(resume(folder))
    assert read_header(folder / "best.safetensors").extra["weights"] == "best.safetensors"
    assert results(folder) == results(whole.folder)


FORGED: tuple[dict[str, Any], ...] = (
    {"micro_batch": 0}, {"epoch": -3}, {"epoch": True}, {"rate_scale": float("nan")}, {"best_score": float("inf")},
    {"loss_sums": {"loss_vfl": "x"}}, {"loss_sums": {3: 1.0}}, {"loss_steps": -1},
)  # fmt: skip


def test_a_checkpoint_with_parts_of_another_kind_is_refused(settings: Callable[..., RunConfig]) -> None:
    folder = interrupted(settings())
    whole = read_checkpoint(folder / "last.ckpt")
    for part, value in (
        ("identity", {"dataset": 3}), ("identity", {}), ("place", {"epoch": "x"}), ("place", {"gone": 1}),
        *(("place", {**whole["place"], **change}) for change in FORGED),
        ("identity", {"dataset": {"fingerprint": torch.zeros(3)}, "settings": {}, "plan": {}}),
        ("learner", {}), ("generators", {"torch": 3}), ("metrics_offset", -1), ("metrics_offset", None),
        ("seconds", []),
    ):  # fmt: skip
        save_checkpoint(folder, {**whole, part: value})
        (folder / ".last.ckpt.previous").unlink()
        with pytest.raises(ModelError, match=r"last\.ckpt|checkpoint"):
            list(resume(folder))


def test_a_run_that_lost_its_checkpoint_does_not_start_again(settings: Callable[..., RunConfig]) -> None:
    folder = interrupted(settings())
    for name in ("last.ckpt", ".last.ckpt.previous"):
        (folder / name).unlink()
    before = results(folder)
    with pytest.raises(ModelError, match=r"last\.ckpt does not exist"):
        list(resume(folder))
    assert results(folder) == before


def test_a_run_that_starts_again_needs_the_same_dataset(
    settings: Callable[..., RunConfig], shapes: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(shapes, own)
    folder = killed_at_start(settings(data=str(own)))
    for name in ("train.json", "val.json"):
        (own / name).write_text((own / name).read_text().replace('"name": "disc"', '"name": "other"'))
    with pytest.raises(DataError, match=r"the dataset has changed .*: classes"):
        list(resume(folder))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_for_the_log_does_not_end_a_run(settings: Callable[..., RunConfig]) -> None:
    config = settings()
    events = finetune(config)
    begun = next(e for e in events if isinstance(e, RunStarted))
    assert begun.folder is not None
    (begun.folder / "train.log").symlink_to("/dev/full")
    rest = list(events)
    notices = [e.text for e in rest if isinstance(e, Notice)]
    assert sum("train.log: No space left on device" in text for text in notices) == 1
    assert isinstance(rest[-1], RunFinished)


def test_resuming_on_another_machine_warns(settings: Callable[..., RunConfig]) -> None:
    folder = interrupted(settings())
    manifest = RunFolder(folder).manifest()
    manifest["precision"], manifest["versions"]["device"] = "bf16", "Another Processor"
    RunFolder(folder).write_manifest(manifest)
    begun = next(e for e in resume(folder) if isinstance(e, RunStarted))
    assert any("precision was bf16 and is fp32 now" in w for w in begun.warnings)
    assert any("device was Another Processor and is " in w for w in begun.warnings)


def test_a_missing_logger_is_an_error_before_anything_is_loaded(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    folder = interrupted(settings(log=("tensorboard",)))
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    monkeypatch.setattr(workflow, "prepare", None)
    with pytest.raises(EnvironmentProblem, match="--log tensorboard needs a package"):
        next(resume(folder))


def test_resuming_from_the_previous_checkpoint_keeps_a_good_one(
    settings: Callable[..., RunConfig],
) -> None:
    """The newest checkpoint is damaged. During the first save of the resumed run one of the two must be good."""
    folder = interrupted(settings())
    good = (folder / ".last.ckpt.previous").read_bytes()
    (folder / "last.ckpt").write_bytes(b"rubbish")
    events = resume(folder)
    next(e for e in events if isinstance(e, RunStarted))
    assert (folder / "last.ckpt").read_bytes() == good
    list(events)
    for name in ("last.ckpt", ".last.ckpt.previous"):
        read_checkpoint(folder / name)


# ---- the machine ------------------------------------------------------------------------------------------------


def losses(events: Iterator[Any]) -> list[float]:
    return [e.loss for e in events if isinstance(e, StepDone)]


def test_batch_auto_finds_what_fits_on_a_cpu(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the memory that the worst-case image keeps for its backward pass, and the free memory."""
    prepared = prepare(settings(batch="auto", effective_batch=8))
    with prepared.loader:
        assert resolve_micro_batch(prepared) == 8
        monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
        assert resolve_micro_batch(prepared) == 1
        seen: dict[str, int] = {}
        real = memory.fitting_micro_batch

        def watched(effective: int, *, bytes_for_one: int, free: int, **more: Any) -> int:
            seen["one"] = bytes_for_one
            return real(effective, bytes_for_one=bytes_for_one, free=free, **more)

        monkeypatch.setattr(memory, "fitting_micro_batch", watched)
        resolve_micro_batch(prepared)
        share = memory.PEAK_OVER_SAVED / memory.SHARE_OF_FREE
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(4.5 * seen["one"] * share))
        assert resolve_micro_batch(prepared) == 4


def test_the_micro_batch_is_in_the_checkpoint(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "resolve_micro_batch", lambda prepared: 2)
    folder = interrupted(settings(batch="auto"))
    monkeypatch.setattr(workflow, "resolve_micro_batch", None)  # a resumed run does not search again
    begun = next(e for e in resume(folder) if isinstance(e, RunStarted))
    assert begun.micro_batch == 2
    assert load_checkpoint(folder)[0]["place"]["micro_batch"] == 2


@pytest.mark.slow
# The compiler checks whether the encoder's input has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_a_compiled_run_has_the_same_losses(settings: Callable[..., RunConfig]) -> None:
    plain = losses(finetune(settings(epochs=1, name="plain")))
    compiled = losses(finetune(settings(epochs=1, name="compiled", compile=True)))
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_a_deterministic_run_on_a_cpu_has_the_same_losses(settings: Callable[..., RunConfig]) -> None:
    try:
        flagged = losses(finetune(settings(epochs=1, name="a", deterministic=True)))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert flagged == losses(finetune(settings(epochs=1, name="b")))
