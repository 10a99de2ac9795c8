"""The one declaration of every training setting: name, type, bounds, default, help and flag.

The fields of `RunSettings` are what the flags of `train` and `finetune-discrete`, their help and shown defaults, the
validation, `config.toml` and `--set` are made from (`cli/setting_flags.py`, `config/run.py`), so no text or default is
written twice. The module imports the standard library only: `rtdetr train --help` must not load pydantic. A dataclass
was chosen over a generated pydantic model so that a type checker knows the type of `config.settings.epochs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_type_hints

from rtdetr_cli.config.image_size import parse_image_size


@dataclass(frozen=True, slots=True)
class Bounds:
    """The smallest and largest value of a number."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Add the bounds to the schema of the number; pydantic calls this while it builds a validator."""
        bounds = {name: getattr(self, name) for name in ("ge", "gt", "le", "lt")}
        return handler(source) | {name: bound for name, bound in bounds.items() if bound is not None}


@dataclass(frozen=True, slots=True)
class Setting:
    """What people read and write about a setting.

    Attributes:
        help: text of the flag, and of the key in `--set` and `config.toml`.
        flag: whether there is a flag `--name`; any setting can be given with `--set`.
        short: one-letter flag.
        metavar: name of the flag's value; the type's by default.
        unset: what happens without a value, where the default is None or empty.
        is_path: the flag takes a file or folder.
        parse: turns the text of a flag, or a TOML value, into a value of the field's type; raises ValueError.
    """

    help: str
    flag: bool = True
    short: str = ""
    metavar: str | None = None
    unset: str = ""
    is_path: bool = False
    parse: Callable[[Any], Any] | None = None


def _parse_size(value: Any) -> tuple[int, int] | None:
    return None if value is None else parse_image_size(value)


def _parse_words(value: Any) -> Any:
    return tuple(word for word in value.split(",") if word) if isinstance(value, str) else value


Count = Annotated[int, Bounds(ge=0)]
Positive = Annotated[int, Bounds(gt=0)]
Rate = Annotated[float, Bounds(gt=0, lt=1)]
Fraction = Annotated[float, Bounds(ge=0, le=1)]
Share = Annotated[float, Bounds(ge=0, le=0.9)]


@dataclass(frozen=True)
class RunSettings:
    """Every setting of a training run, in the order of the help and of `config.toml`."""

    data: Annotated[
        str | None,
        Setting("Dataset: COCO JSON, Roboflow folder, YOLO data.yaml or VOC folder.", short="-d", is_path=True),
    ] = None
    images: Annotated[
        str | None,
        Setting("Folder of the images, if they are not next to the annotations.", is_path=True),
    ] = None
    preset: Annotated[
        str, Setting("Preset: tiny, r18, r34, r50m, r50, r101, or the path of a preset file.", short="-p")
    ] = "r18"
    weights: Annotated[
        str, Setting("Weights to start from: coco, imagenet, none, or a run or model file.", short="-w")
    ] = "coco"
    epochs: Annotated[Positive, Setting("Passes over the training images.", short="-e")] = 50
    batch: Annotated[
        Positive | Literal["auto"],
        Setting("Images per forward pass, or auto.", short="-b"),
    ] = "auto"
    effective_batch: Annotated[Positive, Setting("Images per optimizer step (accumulated when they don't fit).")] = 16
    imgsz: Annotated[
        tuple[int, int] | None,
        Setting("Input size in pixels: 640, or height first 480x640.", unset="the preset's", parse=_parse_size),
    ] = None
    lr: Annotated[Rate | None, Setting("Learning rate.", unset="the preset's, scaled to the effective batch")] = None
    lr_backbone: Annotated[
        Rate | None, Setting("Learning rate of the backbone.", unset="the preset's share of --lr")
    ] = None
    aug: Annotated[
        str,
        Setting(
            "Augmentation: recipe, light, none, an Albumentations file, or auto (light in short runs, else recipe)."
        ),
    ] = "auto"
    freeze: Annotated[
        Literal["preset", "none", "stem", "backbone", "encoder"],
        Setting("Part of the network to freeze: none, stem, backbone, encoder, or preset (as the preset says)."),
    ] = "preset"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Setting("Floating-point precision: auto, fp32, bf16 or fp16.")
    ] = "auto"
    compile: Annotated[bool, Setting("Compile the backbone and the encoder.")] = False
    workers: Annotated[Count | Literal["auto"], Setting("Processes that load images, or auto.")] = "auto"
    cache: Annotated[
        Literal["none", "ram", "disk"],
        Setting("Cache decoded images: none, ram or disk (--set cache_gb=4 limits the size)."),
    ] = "none"
    cache_gb: Annotated[
        Annotated[float, Bounds(ge=0)], Setting("Largest cache in GB; 0 uses half of the free space.", flag=False)
    ] = 0.0
    device: Annotated[str, Setting("Device: auto, cpu, a GPU such as 0, or several: 0,1.")] = "auto"
    seed: Annotated[Count, Setting("Random seed.")] = 0
    deterministic: Annotated[bool, Setting("Use gather sampling and deterministic kernels on CUDA.")] = False
    patience: Annotated[
        Count, Setting("Stop after this many evaluations without a better AP; 0 never stops early.")
    ] = 0
    overfit: Annotated[Count, Setting("Overfit the first N images (sanity check); 0 trains on all.", metavar="N")] = 0
    out: Annotated[str, Setting("Folder that holds the runs.", is_path=True)] = "runs"
    name: Annotated[str, Setting("Name of the run's folder, which must not exist yet.", unset="PRESET-DATASET-NN")] = ""
    log: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        Setting("Extra loggers: tensorboard, wandb, mlflow.", unset="metrics.csv only", parse=_parse_words),
    ] = ()

    sampling: Annotated[
        Literal["bilinear", "discrete"],
        Setting("Sampling in the decoder: bilinear, or discrete (freezes the sampling offsets).", flag=False),
    ] = "bilinear"
    rounding: Annotated[
        Literal["published", "nearest"],
        Setting("Rounding of discrete sampling: published or nearest.", flag=False),
    ] = "published"
    schedule: Annotated[
        Literal["scaled", "official"],
        Setting("Schedule: scaled to the length of the run, or the official one in steps and epochs.", flag=False),
    ] = "scaled"
    warmup: Annotated[Share, Setting("Fraction of the steps used for warmup.", flag=False)] = 0.05
    flat: Annotated[
        Fraction, Setting("Fraction of the steps after which the learning rate starts to decay.", flag=False)
    ] = 0.8
    final_rate: Annotated[Fraction, Setting("Fraction of the learning rate left at the end.", flag=False)] = 0.05
    ema_age: Annotated[
        Annotated[float, Bounds(gt=0, le=0.5)],
        Setting("Mean age of the weights in the moving average, as a fraction of the run.", flag=False),
    ] = 0.03
    ema_ramp: Annotated[
        Rate,
        Setting("The same mean age early in a run, as a fraction of the steps done so far.", flag=False),
    ] = 0.15
    calm: Annotated[
        Share,
        Setting("Fraction of the epochs, at the end, without strong augmentation and multi-scale.", flag=False),
    ] = 0.1
    eval_every: Annotated[
        Positive, Setting("Epochs between evaluations; the last epoch is always evaluated.", flag=False)
    ] = 1
    val_fraction: Annotated[
        Rate,
        Setting("Fraction of the images drawn for validation if the dataset has no val split.", flag=False),
    ] = 0.2
    checkpoint_minutes: Annotated[
        Annotated[float, Bounds(gt=0)], Setting("Minutes between checkpoints within an epoch.", flag=False)
    ] = 5.0
    plots: Annotated[bool, Setting("Draw plots and write report.html.", flag=False)] = True
    checkpoint_steps: Annotated[
        Count, Setting("Steps between checkpoints within an epoch; 0 saves by time only.", flag=False)
    ] = 0


@dataclass(frozen=True, slots=True)
class Declaration:
    """One field of `RunSettings`, with its annotation resolved.

    Attributes:
        name: key of the setting.
        annotation: type with bounds and `Setting`, as `typing.Annotated`.
        kind: the type without bounds and `Setting`.
        default: value where nobody gives one.
        setting: help text and flag.
    """

    name: str
    annotation: Any
    kind: Any
    default: Any
    setting: Setting


def declarations() -> dict[str, Declaration]:
    """Return the declaration of every setting, in order."""
    annotations, kinds = get_type_hints(RunSettings, include_extras=True), get_type_hints(RunSettings)
    declared = {}
    for field in fields(RunSettings):
        annotation = annotations[field.name]
        setting = next(item for item in annotation.__metadata__ if isinstance(item, Setting))
        declared[field.name] = Declaration(field.name, annotation, kinds[field.name], field.default, setting)
    return declared
