"""From settings to everything that a run needs, loaded and on its device."""

from __future__ import annotations

import math
import os
import platform
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from rtdetr_cli import machine
from rtdetr_cli.batches.examples import ExampleLoader
from rtdetr_cli.batches.loader import TrainLoader
from rtdetr_cli.checks.load import unlabelled_note
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.datasets.records import Dataset, Splits
from rtdetr_cli.errors import DataError, EnvironmentProblem, UsageError
from rtdetr_cli.evaluate.source import TrainingData, training_data
from rtdetr_cli.images.augment import Augmentation, load_augmentation
from rtdetr_cli.infer.graph import first_line
from rtdetr_cli.infer.torch_backend import choose_device
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.text import counted
from rtdetr_cli.train import memory
from rtdetr_cli.train.explain import Choice, crowding_warnings, explain_plan, explain_rare_classes, plan_warnings
from rtdetr_cli.train.optim import FusedOptimizer, MovingAverage, NormStatistics, parameter_groups
from rtdetr_cli.train.plan import Plan, frozen_spec, make_plan
from rtdetr_cli.train.precision import Precision, choose_precision
from rtdetr_cli.train.processes import SINGLE_PROCESS, ProcessGroup, images_per_process
from rtdetr_cli.train.state import Learner
from rtdetr_cli.train.step import draw_group, largest_batch, run_largest_step, to_input
from rtdetr_cli.version import __version__
from rtdetr_cli.weights.download import ShowProgress
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.transfer import TransferTable
from rtdetr_cli.workflows.image_check import check_images_if_cheap
from rtdetr_cli.workflows.starting_weights import load_starting_weights, weights_file

OVERFIT_STEPS = 20  # of an epoch with --overfit


@dataclass(slots=True)
class Prepared:
    """A run that can start: everything is loaded and on its device."""

    config: RunConfig
    splits: Splits
    train_set: Dataset
    val_set: Dataset
    plan: Plan
    choices: tuple[Choice, ...]  # the reasons for the plan
    learner: Learner
    processes: ProcessGroup
    loader: TrainLoader
    header: ModelHeader  # of the model that the run writes
    augmentation: Augmentation
    precision: Precision
    workers: int
    start: str  # where the weights came from, in words
    transfer: TransferTable | None  # what was taken from the pretrained weights
    warnings: list[str] = field(default_factory=list)

    @property
    def most_boxes(self) -> int:
        """Largest number of boxes in one training image."""
        return _most_boxes(self.train_set)


def prepare(
    config: RunConfig,
    processes: ProcessGroup = SINGLE_PROCESS,
    *,
    pretrained: bool = True,
    run: RunFolder | None = None,
    fetching: ShowProgress | None = None,
) -> Prepared:
    """Load dataset and weights and put everything that learns on its device.

    `pretrained` is False when the tensors come from a checkpoint anyway, and `run` is the run that is resumed.
    """
    settings = config.settings
    warnings: list[str] = []
    device = choose_device(processes.device if processes.distributed else settings.device)
    precision = choose_precision(settings.precision, device)
    batch = images_per_process(settings.effective_batch, processes.size)  # refuses one that cannot be shared
    if settings.aug != "auto":
        load_augmentation(settings.aug)  # refuses a bad file before anything is read

    splits = load_data(config, run)
    train_set, val_set = training_sets(splits, config, warnings)
    same_everywhere = {k: v for k, v in versions(processes).items() if k in ("torch", "rtdetr-cli")}
    refuse_differences(processes, {"dataset": splits.fingerprint, "precision": precision.name, **same_everywhere})

    spec = frozen_spec(config)
    if settings.freeze == "preset" and spec != config.preset.model:
        warnings.append(
            f"preset {config.preset.name} freezes part of the backbone; with random weights nothing is frozen"
        )
    if train_set.crowd.all():
        raise DataError(
            f"no training image has a box ({counted(len(train_set), 'image')} in {settings.data})",
            hint=f"rtdetr validate {settings.data}",
            code="split-no-objects",
        )
    plan = make_plan(config, images=len(train_set))
    augmentation = load_augmentation(plan.augmentation)
    warnings += plan_warnings(config, plan, images=len(train_set))
    warnings += crowding_warnings(_most_boxes(train_set, val_set), spec.queries)
    boxes = np.bincount(train_set.labels[~train_set.crowd], minlength=len(train_set.names)).tolist()
    choices = explain_plan(config, plan, images=len(train_set))
    choices += explain_rare_classes(dict(zip(train_set.names, boxes, strict=True)))

    _seed(config, device)
    pretrained = pretrained and processes.is_main
    model, transfer, start = _build_model(config, spec, train_set, device, pretrained, fetching)
    if run is not None:  # its tensors come from the checkpoint, and started where the run did
        start = run.manifest().get("weights", start)
    if pretrained:  # the images of a resumed run were checked when it started
        findings = check_images_if_cheap(config, train_set, model, device)
        if findings is not None:
            splits = replace(splits, findings=findings)
    processes.broadcast_tensors(list(model.state_dict().values()))
    workers = choose_workers(device) if settings.workers == "auto" else settings.workers
    from rtdetr_cli.train import losses, matcher

    losses.KIND, losses.VFL_WEIGHT = settings.loss, settings.vfl
    matcher.POSITION = settings.loss == "position-cost"
    examples = ExampleLoader(
        repeat=settings.repeat,
        dataset=train_set,
        imgsz=config.imgsz,
        batch_size=batch,
        seed=settings.seed,
        augmentation=augmentation,
        strong_until=plan.strong_until,
        rank=processes.rank,
        world_size=processes.size,
    )
    return Prepared(
        config=config,
        splits=splits,
        train_set=train_set,
        val_set=val_set,
        plan=plan,
        choices=choices,
        learner=make_learner(model, config, spec, plan, device, precision.dtype, processes),
        processes=processes,
        loader=TrainLoader(
            examples,
            workers=workers,
            cache=settings.cache,
            cache_budget=int(settings.cache_gb * 1e9) or None,
            pin_memory=device.type == "cuda",
        ),
        header=_make_header(config, spec, splits, train_set, val_set, start),
        augmentation=augmentation,
        precision=precision,
        workers=workers,
        start=start,
        transfer=transfer,
        warnings=warnings,
    )


# ---- parts ------------------------------------------------------------------------------------------------------


def load_data(config: RunConfig, run: RunFolder | None = None) -> Splits:
    """Load the dataset of a run, taking a val split from train where it has none.

    A resumed run holds out the same images as before. So does a run that starts from the model of another run on the
    same dataset, because the model knows the other images.
    """
    settings = config.settings
    source, images = Path(str(settings.data)), Path(settings.images) if settings.images else None
    model = run.best if run is not None else weights_file(settings.weights)
    earlier = training_data(model) if model.is_file() else None
    if earlier is None or not earlier.is_of(source):
        earlier = TrainingData(source, val_fraction=settings.val_fraction)
    return replace(earlier, source=source, images=images).load()


def training_sets(splits: Splits, config: RunConfig, warnings: list[str]) -> tuple[Dataset, Dataset]:
    """Return the images to train on and the images to evaluate on.

    Raises:
        DataError: there are no training images.
    """
    settings, train_set = config.settings, splits.train
    if note := unlabelled_note(splits.findings):
        warnings.append(f"{note}; they are used as images without objects")
    if train_set is None or not len(train_set):
        raise DataError(
            f"{splits.source} has no training images", hint=f"rtdetr validate {splits.source}", code="dataset-empty"
        )
    if settings.overfit:
        count = min(settings.overfit, len(train_set))
        if count < settings.overfit:
            warnings.append(f"--overfit {settings.overfit}: the dataset has only {counted(count, 'training image')}")
        # Repeated, so that an epoch has enough steps to be worth an evaluation.
        repeats = max(1, math.ceil(OVERFIT_STEPS * settings.effective_batch / count))
        few = train_set.subset(range(count))
        return train_set.subset(list(range(count)) * repeats), replace(few, split="val")
    if splits.val is not None:
        return train_set, splits.val
    images = "the only image is" if len(train_set) == 1 else "no val split can be drawn, so the training images are"
    warnings.append(f"{images} used for evaluation as well")
    return train_set, replace(train_set, split="val")


def _most_boxes(*datasets: Dataset) -> int:
    """Return the largest number of boxes in one image; at least 1."""
    return max(int(np.diff(dataset.offsets).max(initial=1)) for dataset in datasets)


def _seed(config: RunConfig, device: torch.device) -> None:
    settings = config.settings
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


def _build_model(
    config: RunConfig,
    spec: ModelSpec,
    train_set: Dataset,
    device: torch.device,
    pretrained: bool,
    fetching: ShowProgress | None,
) -> tuple[RTDETR, TransferTable | None, str]:
    """Build the model with its starting weights; return it, what was transferred, and where the weights came from."""
    settings = config.settings
    model = build_detector(
        spec, num_classes=len(train_set.categories), sampling=settings.sampling, rounding=settings.rounding
    )
    transfer, start = None, f"random weights, seed {settings.seed}"
    if pretrained and settings.weights != "none":
        transfer, start = load_starting_weights(model, config, train_set, fetching=fetching)
    if settings.freeze == "stem":
        model.backbone.freeze(0)
    elif settings.freeze in ("backbone", "encoder"):
        model.backbone.freeze(4)  # its norms keep their statistics
        model.backbone.requires_grad_(False)
        if settings.freeze == "encoder":
            model.encoder.requires_grad_(False)
    if settings.deterministic and device.type == "cuda" and settings.sampling == "bilinear":
        # The backward pass of grid_sample adds in no fixed order; that of a gather can.
        model.set_sampling("bilinear", operator="gather")
    return model.to(device).to(memory_format=torch.channels_last), transfer, start


def make_learner(
    model: RTDETR,
    config: RunConfig,
    spec: ModelSpec,
    plan: Plan,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Learner:
    """Wrap a model on its device with its optimizer and moving average."""
    optim = config.preset.optim
    muon = config.settings.optimizer == "muon"
    groups = parameter_groups(model, optim, lr=plan.lr, lr_backbone=plan.lr_backbone, muon=muon)
    if not groups:
        raise UsageError(f"--freeze {config.settings.freeze} leaves nothing to train", code="freeze")
    if device.type == "cpu":
        machine.keep_freed_memory()
    return Learner(
        model=model,
        average=MovingAverage(model),
        optimizer=FusedOptimizer(
            groups,
            clip_norm=optim.clip_norm,
            scaled=autocast == torch.float16,
            muon_dtype=torch.bfloat16 if autocast == torch.bfloat16 else torch.float32,
        ),
        spec=spec,
        device=device,
        autocast=autocast,
        norms=NormStatistics(model),
        processes=processes,
    )


def _make_header(
    config: RunConfig, spec: ModelSpec, splits: Splits, train_set: Dataset, val_set: Dataset, start: str
) -> ModelHeader:
    return ModelHeader(
        names=train_set.names,
        category_ids=train_set.category_ids,
        imgsz=config.imgsz,
        architecture=spec.model_dump(mode="json"),
        preset=config.preset.name,
        sampling=config.settings.sampling,
        rounding=config.settings.rounding,
        layers=spec.eval_layers,
        queries=spec.queries,
        dataset={"name": splits.name, "fingerprint": splits.fingerprint, "train": len(train_set), "val": len(val_set)},
        version=__version__,
        extra={"weights": start},
    )


@contextmanager
def compiled(model: RTDETR, wanted: bool) -> Iterator[None]:
    """Compile the parts of a model that trains within, if wanted.

    Raises:
        EnvironmentProblem: torch's compiler fails at the first step, for instance without a C++ compiler.
    """
    if not wanted:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    model.backbone.compile()  # not the decoder, whose shapes change with every denoising group
    model.encoder.compile()
    try:
        yield
    except TorchDynamoException as error:
        raise EnvironmentProblem(
            f"torch.compile failed: {first_line(error)}", hint="start a run without --compile", code="compile"
        ) from error


# ---- machine ----------------------------------------------------------------------------------------------------


def choose_workers(device: torch.device) -> int:
    """Return how many processes load images; on a CPU they compete with the network for the cores."""
    cores = max(1, machine.cpu_count() // _processes_on_host())
    if device.type == "cuda":
        return max(1, min(8, cores - 1))
    return 1 if cores <= 4 else min(4, cores // 4)


def resolve_micro_batch(prepared: Prepared) -> int:
    """Return how many images go onto the device at once."""
    settings, learner, processes = prepared.config.settings, prepared.learner, prepared.processes
    batch = images_per_process(settings.effective_batch, processes.size)
    if isinstance(settings.batch, int):
        return min(settings.batch, batch)
    plan = replace(prepared.plan, effective_batch=batch)

    def attempt(micro_batch: int) -> None:
        run_largest_step(learner, plan, most_boxes=prepared.most_boxes, micro_batch=micro_batch, parts=1)

    device = learner.device
    try:
        bytes_for_one = memory.saved_bytes(lambda: forward_largest(prepared))
    except Exception as error:
        if memory.is_out_of_memory(error):
            memory.halve(1, where=str(device))  # raises: there is nothing less than one image
        raise
    free = memory.free_bytes(device)
    micro_batch = memory.fitting_micro_batch(
        batch,
        bytes_for_one=bytes_for_one,
        # Processes on CPUs share the host's memory.
        free=free if device.type == "cuda" else free // _processes_on_host(),
        attempt=attempt if device.type == "cuda" else None,
        where=str(device),
    )
    return int(min(processes.all_gather(micro_batch)))


def forward_largest(prepared: Prepared) -> object:
    """Run a forward pass of one image at the largest scale with the most boxes; return its outputs."""
    learner = prepared.learner
    plan = replace(prepared.plan, effective_batch=1)
    batch = largest_batch(plan, most_boxes=prepared.most_boxes, num_classes=learner.model.num_classes)
    group = draw_group(learner, batch, step=0, seed=0)
    learner.train_mode()
    learner.norms.save()
    size = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))
    inputs = to_input(batch.images.to(learner.device), size)
    with torch.autocast(learner.device.type, learner.autocast, enabled=learner.autocast is not None):
        outputs = learner.model(inputs, group.to(learner.device) if group is not None else None)
    learner.norms.restore()
    return outputs


def refuse_differences(processes: ProcessGroup, facts: Mapping[str, str]) -> None:
    """Refuse a run whose processes would not compute the same.

    Raises:
        UsageError: it names what differs, and in which process.
    """
    gathered = processes.all_gather(dict(facts))
    for rank, other in enumerate(gathered):
        for key, value in gathered[0].items():
            if other[key] != value:
                raise UsageError(
                    f"the processes of the run differ: {key} is {value[:12]} in process 0 "
                    f"and {other[key][:12]} in process {rank}",
                    hint="use the same dataset, GPUs, versions and --precision on every host",
                    code="team-differs",
                )


def versions(processes: ProcessGroup) -> dict[str, str]:
    """Return what the numbers of a run depend on besides its settings."""
    return {
        "rtdetr-cli": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu threads": str(torch.get_num_threads()),
        # Another processor may compute other last bits.
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else machine.cpu_name(),
        "processes": str(processes.size),
    }


def _processes_on_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
