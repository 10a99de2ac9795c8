"""The one declaration of every training setting: name, type, bounds, default, help and flag.

The fields of `RunSettings` are what the flags of `train` and `finetune-discrete`, their help and shown defaults, the
validation, `config.toml` and `--set` are made from (`cli/setting_flags.py`, `config/run.py`), so no text or default is
written twice. The module imports the standard library only: `rtdetr train --help` must not load pydantic. A dataclass
was chosen over a generated pydantic model so that a type checker knows the type of `config.settings.epochs`.
"""
# ruff: noqa: RUF009  (the calls in the class body return `dataclasses.field`)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from rtdetr_cli.config.image_size import parse_image_size

T = TypeVar("T")

PUBLISHED_WEIGHTS = {"coco": "weights", "objects365-coco": "objects365_coco", "imagenet": "imagenet"}
"""Words of `--weights` that stand for a published file, and the field of a preset that names the file."""

DATA_HELP = "Dataset folder, file or zip: COCO, YOLO, VOC, Labelme or CSV."


@dataclass(frozen=True, slots=True)
class Bounds:
    """The smallest and largest value of a number, which pydantic reads when it builds a validator.

    Every integer has a largest value, so that a slip of the finger is refused and does not fill the memory.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        bounds = {name: getattr(self, name) for name in ("ge", "gt", "le", "lt")}
        return handler(source) | {name: bound for name, bound in bounds.items() if bound is not None}


# The published augmentation lost AP in 500 steps and gained in 598 (docs/learning.md).
RECIPE_STEPS = 500
CALM_STEPS = 200
# Learning rate with Muon from random weights: less is worse for r18, twice that for `tiny` (docs/learning.md).
MUON_RATE = 1e-3
MAX_BATCH = 65_536
MAX_EPOCHS = 100_000
MAX_LAYERS = 64
MAX_QUERIES = 10_000
MAX_SEED = 2**53

Count = Annotated[int, Bounds(ge=0, le=10**9)]
Positive = Annotated[int, Bounds(gt=0, le=10**9)]
Epochs = Annotated[int, Bounds(gt=0, le=MAX_EPOCHS)]
Batch = Annotated[int, Bounds(gt=0, le=MAX_BATCH)]
Processes = Annotated[int, Bounds(ge=0, le=256)]
Queries = Annotated[int, Bounds(gt=0, le=MAX_QUERIES)]
Rate = Annotated[float, Bounds(gt=0, lt=1)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]
Share = Annotated[float, Bounds(ge=0, le=0.9)]


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of `RunSettings`, and what people read and write about it."""

    name: str
    annotation: Any  # the type with its bounds
    kind: Any  # the type without them
    default: Any
    help: str
    flag: bool = False  # whether there is a flag `--name`; any setting can be given with `--set`
    short: str = ""
    metavar: str | None = None
    unset: str = ""  # what happens without a value, where the default is None or empty
    is_path: bool = False
    parse: Callable[[Any], Any] | None = None  # turns text or a TOML value into a value; raises ValueError


def _key(default: T, help_text: str, **details: Any) -> T:
    """Declare a setting without a flag, which only `--set` and files of settings give."""
    return field(default=default, metadata={"help": help_text, **details})


def _flag(default: T, help_text: str, **details: Any) -> T:
    """Declare a setting with a flag."""
    return _key(default, help_text, flag=True, **details)


def _parse_size(value: Any) -> tuple[int, int] | None:
    return None if value is None else parse_image_size(value)


def _parse_words(value: Any) -> Any:
    return tuple(word for word in value.split(",") if word) if isinstance(value, str) else value


@dataclass(frozen=True)
class RunSettings:
    """Every setting of a training run, in the order of the help and of `config.toml`."""

    data: str | None = _flag(None, DATA_HELP, short="-d", is_path=True)
    images: str | None = _flag(None, "Folder of the images, if they are not next to the annotations.", is_path=True)
    preset: str = _flag(
        "r18", "Preset: tiny, r18, r34, r50m, r50, r101, hgl, hgx, hgh, or the path of a preset file.", short="-p"
    )
    weights: str = _flag(
        "coco",
        "Weights to start from: coco, objects365-coco or imagenet (published, downloaded once), none, or a run or "
        "model file.",
        short="-w",
    )
    epochs: Epochs = _flag(50, "Passes over the training images.", short="-e")
    batch: Batch | Literal["auto"] = _flag("auto", "Images per forward pass, or auto.", short="-b")
    effective_batch: Batch = _flag(16, "Images per optimizer step (accumulated when they don't fit).")
    imgsz: tuple[int, int] | None = _flag(
        None, "Input size in pixels: 640, or height first 480x640.", unset="the preset's", parse=_parse_size
    )
    lr: Rate | None = _flag(
        None,
        "Learning rate.",
        unset=f"the preset's, or {MUON_RATE} from random weights; more for larger effective batches",
    )
    lr_backbone: Rate | None = _flag(
        None, "Learning rate of the backbone.", unset="the preset's share of --lr, or --lr from random weights"
    )
    aug: str = _flag(
        "auto",
        "Augmentation: recipe, light, none, an Albumentations file, or auto (light in runs of up to "
        f"{RECIPE_STEPS} steps, else recipe).",
    )
    freeze: Literal["preset", "none", "stem", "backbone", "encoder"] = _flag(
        "preset", "Part of the network to freeze: none, stem, backbone, encoder, or preset (as the preset says)."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _flag(
        "auto", "Floating-point precision: auto, fp32, bf16 or fp16."
    )
    compile: bool = _flag(False, "Compile the backbone and the encoder.")
    workers: Processes | Literal["auto"] = _flag("auto", "Processes that load images, or auto.")
    cache: Literal["none", "ram", "disk"] = _flag(
        "none", "Cache decoded images: none, ram or disk (--set cache_gb=4 limits the size)."
    )
    cache_gb: Annotated[float, Bounds(ge=0, le=1e6)] = _key(
        0.0, "Maximum cache size in GB; 0 uses half of the free space."
    )
    device: str = _flag("auto", "Device: auto, cpu, a GPU such as 0, or several: 0,1.")
    seed: Annotated[int, Bounds(ge=0, le=MAX_SEED)] = _flag(0, "Random seed.")
    deterministic: bool = _flag(False, "Use gather sampling and deterministic kernels on CUDA.")
    patience: Count = _flag(0, "Stop after this many evaluations without a better AP; 0 never stops early.")
    overfit: Count = _flag(0, "Overfit the first N images (sanity check); 0 trains on all.", metavar="N")
    out: str = _flag("runs", "Folder that holds the runs.", is_path=True)
    name: str = _flag("", "Name of the run's folder, which must not exist yet.", unset="PRESET-DATASET-NN")
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = _flag(
        (), "Extra loggers: tensorboard, wandb, mlflow.", unset="metrics.csv only", parse=_parse_words
    )

    sampling: Literal["bilinear", "discrete"] = _key(
        "bilinear", "Sampling in the decoder: bilinear, or discrete (freezes the sampling offsets)."
    )
    rounding: Literal["published", "nearest"] = _key(
        "published", "Rounding of discrete sampling: published or nearest."
    )
    schedule: Literal["scaled", "official"] = _key(
        "scaled", "Schedule: scaled to the length of the run, or the official one in steps and epochs."
    )
    optimizer: Literal["adamw", "muon"] = _key(
        "adamw",
        "Optimizer: adamw, or muon for the matrices of hidden layers; from random weights the default is muon.",
    )
    warmup: Share = _key(0.05, "Fraction of the steps used for warmup.")
    flat: Fraction = _key(0.8, "Fraction of the steps after which the learning rate starts to decay.")
    final_rate: Fraction = _key(0.05, "Fraction of the learning rate left at the end.")
    ema_age: Annotated[float, Bounds(gt=0, le=0.5)] = _key(
        0.03, "Mean age of the weights in the moving average, as a fraction of the run."
    )
    ema_ramp: Rate = _key(0.15, "The same mean age early in a run, as a fraction of the steps done so far.")
    calm: Share = _key(
        0.1,
        "Fraction of the epochs at the end without strong augmentation and multi-scale; at least "
        f"{CALM_STEPS} steps if not set.",
    )
    eval_every: Positive = _key(1, "Epochs between evaluations; the last epoch is always evaluated.")
    val_fraction: Rate = _key(
        0.2, "Fraction of train held out if the dataset has no val split; the same images in every run."
    )
    checkpoint_minutes: Annotated[float, Bounds(gt=0, le=1e6)] = _key(
        5.0, "Minutes between checkpoints within an epoch."
    )
    plots: bool = _key(True, "Draw plots and write report.html.")
    checkpoint_steps: Count = _key(0, "Steps between checkpoints within an epoch; 0 saves by time only.")


def declarations() -> dict[str, Setting]:
    """Return the declaration of every setting, in order."""
    annotations, kinds = get_type_hints(RunSettings, include_extras=True), get_type_hints(RunSettings)
    return {
        f.name: Setting(f.name, annotations[f.name], kinds[f.name], f.default, **f.metadata)
        for f in fields(RunSettings)
    }
