"""From settings to everything that a run needs, loaded and on its device."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from rtdetr_cli.batches.loader import TrainLoader
from rtdetr_cli.checks.load import load_splits
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.datasets.records import Dataset, Splits
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.images.augment import Augmentation, load_augmentation
from rtdetr_cli.infer.torch_backend import choose_device
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.train import memory
from rtdetr_cli.train.losses import Criterion
from rtdetr_cli.train.optim import FusedAdamW, MovingAverage, NormStatistics, parameter_groups
from rtdetr_cli.train.plan import Plan, frozen_spec, make_plan
from rtdetr_cli.train.precision import choose_precision
from rtdetr_cli.train.processes import SINGLE_PROCESS, ProcessGroup, images_per_process
from rtdetr_cli.train.state import Learner
from rtdetr_cli.train.step import draw_group, largest_batch, run_largest_step, to_input
from rtdetr_cli.version import __version__
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.hub import ShowProgress
from rtdetr_cli.weights.transfer import TransferTable
from rtdetr_cli.workflows.checkup import examine_if_cheap
from rtdetr_cli.workflows.start import load_start


@dataclass(slots=True)
class Prepared:
    """A run that can begin: everything is loaded and on its device."""

    config: RunConfig
    splits: Splits
    train_set: Dataset
    val_set: Dataset
    plan: Plan
    learner: Learner
    processes: ProcessGroup
    loader: TrainLoader
    header: ModelHeader
    augmentation: Augmentation
    precision: str
    precision_reason: str
    workers: int
    start: str
    transfer: TransferTable | None
    warnings: list[str] = field(default_factory=list)

    @property
    def most_boxes(self) -> int:
        """Boxes of the fullest training image."""
        return int(np.diff(self.train_set.offsets).max(initial=1))


def prepare(
    config: RunConfig,
    processes: ProcessGroup = SINGLE_PROCESS,
    *,
    pretrained: bool = True,
    fetching: ShowProgress | None = None,
) -> Prepared:
    """Load dataset and weights and put everything that learns on its device.

    Args:
        config: the resolved settings.
        processes: the processes of the run.
        pretrained: False when the tensors come from a checkpoint anyway.
        fetching: shows how far a download of weights has come.
    """
    settings, preset = config.settings, config.preset
    warnings: list[str] = []
    device = choose_device(processes.device if processes.distributed else settings.device)
    chosen = choose_precision(settings.precision, device)
    batch_size = images_per_process(settings.effective_batch, processes.size)
    if settings.aug != "auto":
        load_augmentation(settings.aug)  # a bad file is refused before anything is read

    # ---- data
    assert settings.data is not None
    splits = load_splits(
        Path(settings.data),
        images=Path(settings.images) if settings.images else None,
        val_fraction=settings.val_fraction,
        seed=settings.seed,
    )
    train_set, val_set = training_sets(splits, config, warnings)
    alike = {k: v for k, v in versions(processes).items() if k in ("torch", "rtdetr-cli")}
    refuse_differences(processes, {"dataset": splits.fingerprint, "precision": chosen.name, **alike})

    # ---- plan
    spec = resolve_freezing(config, warnings)
    boxes = int(np.count_nonzero(~train_set.crowd))
    if not boxes:
        raise DataError(
            f"no image to train on has a box ({len(train_set)} images in {settings.data})",
            hint=f"rtdetr validate {settings.data}",
            code="split-no-objects",
        )
    plan = make_plan(config, images=len(train_set))
    augmentation = load_augmentation(plan.augmentation)
    warnings += plan.warnings

    # ---- model
    # Nothing of ours draws from the generators of Python and numpy; a user's augmentation may.
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    if device.type == "cuda":
        # TF32 halves the time of float32 products and is far finer than the noise of a batch.
        torch.set_float32_matmul_precision("high")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    model = build_detector(
        spec, num_classes=len(train_set.categories), sampling=settings.sampling, rounding=settings.rounding
    )
    table, start = None, f"random weights, seed {settings.seed}"
    if pretrained and settings.weights != "none" and processes.is_main:
        table, start = load_start(model, config, train_set, fetching=fetching)
    freeze(model, settings.freeze)
    if settings.deterministic and device.type == "cuda" and settings.sampling == "bilinear":
        # The backward pass of grid_sample adds in no fixed order; that of a gather can.
        model.set_sampling("bilinear", operator="gather")
    model = model.to(device).to(memory_format=torch.channels_last)
    if pretrained and processes.is_main:  # a resumed run has had its look
        findings = examine_if_cheap(
            Path(settings.data),
            train_set,
            model,
            images=Path(settings.images) if settings.images else None,
            imgsz=config.imgsz,
            device=device,
        )
        if findings is not None:
            splits = replace(splits, findings=findings)
    processes.broadcast_tensors(list(model.state_dict().values()))
    learner = make_learner(model, config, spec, plan, device, chosen.dtype)
    learner.processes = processes

    workers = choose_workers(device) if settings.workers == "auto" else settings.workers
    loader = TrainLoader(
        train_set,
        imgsz=config.imgsz,
        batch_size=batch_size,
        seed=settings.seed,
        augmentation=augmentation,
        workers=workers,
        cache=settings.cache,
        cache_budget=int(settings.cache_gb * 1e9) or None,
        rank=processes.rank,
        world_size=processes.size,
        pin_memory=device.type == "cuda",
    )
    header = ModelHeader(
        names=train_set.names,
        category_ids=train_set.category_ids,
        imgsz=config.imgsz,
        architecture=spec.model_dump(mode="json"),
        preset=preset.name,
        sampling=settings.sampling,
        rounding=settings.rounding,
        layers=spec.eval_layers,
        queries=spec.queries,
        dataset={
            "name": splits.name,
            "fingerprint": splits.fingerprint,
            "train": len(train_set),
            "val": len(val_set),
        },
        version=__version__,
        extra={"weights": start},
    )
    return Prepared(
        config=config,
        splits=splits,
        train_set=train_set,
        val_set=val_set,
        plan=plan,
        learner=learner,
        processes=processes,
        loader=loader,
        header=header,
        augmentation=augmentation,
        precision=chosen.name,
        precision_reason=chosen.reason,
        workers=workers,
        start=start,
        transfer=table,
        warnings=warnings,
    )


def make_learner(
    model: RTDETR, config: RunConfig, spec: ModelSpec, plan: Plan, device: torch.device, autocast: torch.dtype | None
) -> Learner:
    """Put optimizer, moving average and losses around a model on its device."""
    groups = parameter_groups(model, config.preset.optim, lr=plan.lr, lr_backbone=plan.lr_backbone)
    if not groups:
        raise UsageError(f"--freeze {config.settings.freeze} leaves nothing to train", code="freeze")
    return Learner(
        model=model,
        average=MovingAverage(model),
        optimizer=FusedAdamW(groups, clip_norm=config.preset.optim.clip_norm, scaled=autocast == torch.float16),
        criterion=Criterion(num_classes=model.num_classes),
        spec=spec,
        device=device,
        autocast=autocast,
        norms=NormStatistics(model),
    )


def training_sets(splits: Splits, config: RunConfig, warnings: list[str]) -> tuple[Dataset, Dataset]:
    """Return what is trained on and what is measured on.

    Raises:
        DataError: there is no training split, or no image in it.
    """
    settings = config.settings
    train_set, val_set = splits.train, splits.val
    if train_set is None or not len(train_set):
        raise DataError(
            f"{splits.source} has no training images", hint=f"rtdetr validate {splits.source}", code="dataset-empty"
        )
    if settings.overfit:
        wanted = min(settings.overfit, len(train_set))
        if wanted < settings.overfit:
            warnings.append(f"--overfit {settings.overfit}: there are only {wanted} training images")
        few = train_set.subset(range(wanted))
        # Repeated, so that an epoch is worth an evaluation.
        times = max(1, math.ceil(OVERFIT_STEPS * settings.effective_batch / wanted))
        return train_set.subset(list(range(wanted)) * times), replace(few, split="val")
    if val_set is None or not len(val_set):
        if splits.test is not None and len(splits.test):
            warnings.append("the dataset has no val split: the test split is used to choose the best epoch")
            return train_set, splits.test
        count = max(1, round(settings.val_fraction * len(train_set)))
        if len(train_set) < 2:
            warnings.append("the only image is both trained and measured on")
            return train_set, replace(train_set, split="val")
        drawn = np.sort(np.random.default_rng(settings.seed).permutation(len(train_set))[:count])
        rest = np.setdiff1d(np.arange(len(train_set)), drawn)
        warnings.append(f"the dataset has no val split: {count} of {len(train_set)} images were drawn for it")
        return train_set.subset(rest), train_set.subset(drawn, split="val")
    return train_set, val_set


OVERFIT_STEPS = 20


def resolve_freezing(config: RunConfig, warnings: list[str]) -> ModelSpec:
    """Return the model's sizes with what `--freeze` and random weights change of them."""
    spec = frozen_spec(config)
    if config.settings.freeze == "preset" and spec != config.preset.model:
        warnings.append(
            f"preset {config.preset.name} freezes part of the backbone; with random weights nothing is frozen"
        )
    return spec


def freeze(model: RTDETR, what: str) -> None:
    """Freeze the stem, the backbone, or backbone and encoder; norms of frozen parts keep their statistics."""
    if what == "stem":
        model.backbone.freeze(0)
    elif what in ("backbone", "encoder"):
        model.backbone.freeze(4)
        model.backbone.requires_grad_(False)
        if what == "encoder":
            model.encoder.requires_grad_(False)


def compile_parts(model: RTDETR) -> None:
    """Compile backbone and encoder, in place; the decoder's shapes change with every denoising group."""
    model.backbone.compile()
    model.encoder.compile()


def choose_workers(device: torch.device) -> int:
    """Return how many processes load images: on a CPU they compete with the network for the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        return max(1, min(8, cores - 1))
    return 1 if cores <= 4 else min(4, cores // 4)


def resolve_micro_batch(prepared: Prepared) -> int:
    """Return how many images go onto the device at once."""
    settings, learner, processes = prepared.config.settings, prepared.learner, prepared.processes
    own = images_per_process(settings.effective_batch, processes.size)
    plan = replace(prepared.plan, effective_batch=own)
    if isinstance(settings.batch, int):
        return min(settings.batch, own)
    most = prepared.most_boxes

    def attempt(micro: int) -> None:
        run_largest_step(learner, plan, most_boxes=most, micro_batch=micro, parts=1)

    with memory.one_image(where=str(learner.device)):
        one = memory.saved_bytes(lambda: worst_forward(prepared))
    free = memory.free_bytes(learner.device)
    found = memory.fitting_micro_batch(
        own,
        bytes_for_one=one,
        # Processes on CPUs share the host's memory.
        free=free if learner.device.type == "cuda" else free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        attempt=attempt if learner.device.type == "cuda" else None,
        where=str(learner.device),
    )
    return processes.min(found)


def worst_forward(prepared: Prepared) -> object:
    """Run one image of the largest scale with the most boxes forward, and return what came out."""
    learner = prepared.learner
    one = replace(prepared.plan, effective_batch=1)
    batch = largest_batch(one, most_boxes=prepared.most_boxes, num_classes=learner.model.num_classes)
    group = draw_group(learner, batch, step=0, seed=0)
    learner.train_mode()
    learner.norms.save()
    size = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    inputs = to_input(batch.images.to(learner.device), size)
    with torch.autocast(learner.device.type, learner.autocast, enabled=learner.autocast is not None):
        outputs = learner.model(inputs, group.to(learner.device) if group is not None else None)
    learner.norms.restore()
    return outputs


def refuse_differences(processes: ProcessGroup, own: Mapping[str, str]) -> None:
    """Refuse a run whose processes would not do the same.

    Raises:
        UsageError: it names what differs, and where.
    """
    told = processes.all_gather(dict(own))
    for key, value in told[0].items():
        for rank, other in enumerate(told):
            if other[key] != value:
                short = "another one" if key == "dataset" else other[key]
                raise UsageError(
                    f"the processes of the run differ: {key} is {value[:12]} in process 0, {short} in process {rank}",
                    hint="the same dataset, GPUs and versions on every host"
                    + (", or --precision fp32" if key == "precision" else ""),
                    code="team-differs",
                )


def versions(processes: ProcessGroup = SINGLE_PROCESS) -> dict[str, str]:
    """Return what the numbers of a run depend on."""
    return {
        "rtdetr-cli": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "processes": str(processes.size),
    }


def processor() -> str:
    """Return the processor's name: another one may give other last bits."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "cpu"
