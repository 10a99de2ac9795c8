"""What one training run is: every setting with its default, its meaning, and where its value came from."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rtdetr_cli.config.presets import flatten, load_preset, read_toml, suggest, validate
from rtdetr_cli.config.schema import Fraction, ModelSpec, OptimSpec, Positive, Preset, Rate, Schema
from rtdetr_cli.errors import UsageError


def _size(value: Any) -> Any:
    """Read `640`, `"480x640"` or `[480, 640]` as (height, width) in pixels."""
    if value is None:
        return None
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a size")
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, str):
        parts = value.lower().split("x")
        if len(parts) > 2 or not all(p.strip().isdecimal() for p in parts):
            raise ValueError(f"{value!r} is not a size such as 640, or height first 480x640")
        value = (int(parts[0]), int(parts[-1]))
    for side in value:
        if not isinstance(side, int) or side < 32 or side % 32 or side > 4096:
            raise ValueError(f"{side!r} is not a multiple of 32 from 32 to 4096")
    return value


Size = Annotated[tuple[int, int] | None, BeforeValidator(_size)]
Share = Annotated[float, Field(ge=0, le=0.9)]


class RunSettings(Schema):
    """Every setting of `rtdetr train`. The first part are its flags, the second is reached with `--set`."""

    data: str | None = Field(None, description="COCO JSON, Roboflow folder, YOLO data.yaml or VOC folder")
    images: str | None = Field(None, description="folder of the images, where the annotations do not say it")
    preset: str = Field("r18", description="name of a preset, or the path of one's own")
    weights: str = Field("coco", description="where training starts: coco, imagenet, none, or a model file")
    epochs: Positive = Field(50, description="passes over the training images")
    batch: Positive | Literal["auto"] = Field("auto", description="images on the device at once: the micro-batch")
    effective_batch: Positive = Field(16, description="images in one step of the optimizer")
    imgsz: Size = Field(None, description="network input in pixels, 640 or height first 480x640; the preset's if unset")
    lr: Rate | None = Field(None, description="learning rate; the preset's, scaled to the effective batch, if unset")
    lr_backbone: Rate | None = Field(None, description="learning rate of the backbone; as lr if unset")
    aug: str = Field(
        "auto", description="recipe, light, none, or an Albumentations file; auto: light in short runs, else the recipe"
    )
    freeze: Literal["preset", "none", "stem", "backbone", "encoder"] = Field(
        "preset", description="what stays as it is"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="arithmetic of the network")
    compile: bool = Field(False, description="compile backbone and encoder")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field("auto", description="processes that load images")
    cache: Literal["none", "ram", "disk"] = Field("none", description="where decoded images are kept")
    cache_gb: Annotated[float, Field(ge=0)] = Field(0.0, description="GB for the cache; 0: half of what is free")
    device: str = Field("auto", description="auto, cpu, 0, or several: 0,1")
    seed: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = Field(False, description="CUDA: gather sampling and deterministic kernels")
    patience: Annotated[int, Field(ge=0)] = Field(0, description="epochs without a better AP before stopping; 0: never")
    overfit: Annotated[int, Field(ge=0)] = Field(0, description="train and measure on the first N images only")
    out: str = Field("runs", description="folder of the runs")
    name: str = Field("", description="name of the run's folder; made from preset and dataset if empty")
    log: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), description="loggers besides the CSV file")

    sampling: Literal["bilinear", "discrete"] = Field(
        "bilinear", description="how the decoder reads the maps; discrete freezes the sampling offsets"
    )
    rounding: Literal["published", "nearest"] = Field("published", description="of discrete sampling")
    schedule: Literal["scaled", "official"] = Field(
        "scaled", description="scaled: a function of the run's length; official: the published, absolute values"
    )
    warmup: Share = Field(0.05, description="share of the steps over which the rate rises")
    flat: Fraction = Field(0.8, description="share of the steps after which the rate begins to fall")
    final_rate: Fraction = Field(0.05, description="share of the rate that is left at the end")
    ema_age: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.03, description="mean age of what the moving average averages, as a share of the run"
    )
    ema_ramp: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="the same share while the run is young: of the steps made so far"
    )
    calm: Share = Field(0.1, description="share of the epochs at the end without strong augmentation and multi-scale")
    eval_every: Positive = Field(1, description="epochs between evaluations; the last one is always evaluated")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of the images drawn for validation where the dataset has no such split"
    )
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(5.0, description="minutes between saves within an epoch")
    plots: bool = Field(True, description="draw the run's images and write its report.html")
    checkpoint_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps between saves within an epoch; 0: none")


# Settings that may name a file or folder, and the words that do not.
NAMED: dict[str, tuple[str, ...]] = {
    "data": (),
    "images": (),
    "preset": (),
    "weights": ("coco", "imagenet", "none"),
    "aug": ("auto", "recipe", "light", "none"),
}


def absolute(key: str, value: str) -> str:
    """Return the absolute path that a setting names; a word that names no file as it is."""
    if value in NAMED[key] or (key == "preset" and not value.endswith(".toml")):
        return value
    return os.path.abspath(value)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A resolved run.

    Attributes:
        settings: of the run itself.
        preset: the model, its rates and its published schedule, with every override applied.
        provenance: dotted key -> where its value came from, for all keys of both.
    """

    settings: RunSettings
    preset: Preset
    provenance: Mapping[str, str]

    @property
    def imgsz(self) -> tuple[int, int]:
        """Height and width of the network's input in pixels."""
        return self.settings.imgsz or self.preset.imgsz

    def source(self, key: str) -> str:
        """Say where the value of a dotted key came from."""
        return self.provenance.get(key, "default")

    def given(self, key: str) -> bool:
        """Tell whether somebody set this key, in whatever way."""
        return self.source(key) not in ("default", "preset")

    def anchored(self) -> RunConfig:
        """Return the same run with absolute paths, so that it can be resumed from another folder."""
        settings = self.settings
        paths = {key: absolute(key, value) for key in NAMED if (value := getattr(settings, key)) is not None}
        return replace(self, settings=settings.model_copy(update=paths))

    def to_toml(self) -> str:
        """Return the whole run as TOML; `--config` reads it back.

        Every value is there, so that nothing changes when a default does or a preset's file goes; a last table says
        which were chosen and by what, since a schedule may take another value for one that nobody chose.
        """
        lines = [f"# Resolved settings of one run of rtdetr train. preset: {self.preset.name}"]
        lines += [_toml_line(k, v, self.source(k)) for k, v in flatten(self.settings).items() if v is not None]
        for table in ("model", "optim"):
            lines += ["", f"[{table}]"]
            for key, value in flatten(getattr(self.preset, table)).items():
                lines.append(_toml_line(key, value, self.source(f"{table}.{key}")))
        rest = self.preset.model_dump(exclude={"model", "optim", "official"}, exclude_none=True)
        for table, values in {PRESET: rest, f"{PRESET}.official": self.preset.official.model_dump()}.items():
            lines += ["", f"[{table}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
        lines += ["", f"[{PROVENANCE}]"]
        lines += [f"{_toml(key)} = {_toml(source)}" for key, source in self.provenance.items() if self.given(key)]
        return "\n".join(lines) + "\n"


PROVENANCE = "provenance"
# What a preset says besides model and rates, as it was when the run began.
PRESET = "rest_of_preset"


def _toml_line(key: str, value: Any, source: str) -> str:
    return f"{key} = {_toml(value)}" + ("" if source in ("default", "preset") else f"  # {source}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    # JSON's strings and numbers are TOML's too; 1e-05 as well.
    return json.dumps(value, ensure_ascii=False)


def parse_set(words: Sequence[str]) -> dict[str, Any]:
    """Read the words of `--set`: `key=value`, the value as TOML where it is, else as a string.

    Raises:
        UsageError: a word without `=`.
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {word} is not key=value", hint="--set schedule=official", code="set-malformed")
        try:
            values[key.strip()] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text
    return values


def resolve_run(
    flags: Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    config_file: Path | None = None,
    inherited: tuple[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Put a run together: flag over `--set` over file over what is inherited over preset over default.

    Args:
        flags: setting -> value, those that were given on the command line only.
        sets: the words of `--set`; keys of `RunSettings`, or `model.*` and `optim.*` of the preset.
        config_file: TOML with the same keys.
        inherited: where settings come from that nobody wrote, and those settings, with the same keys.

    Raises:
        UsageError: an unknown key or a value that cannot be; all problems at once.
    """
    values: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    places: dict[str, str] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    chosen: dict[str, str] | None = None
    kept: dict[str, Any] = {}
    if inherited is not None:
        layers.append(inherited)
    if config_file is not None:
        document = read_toml(config_file)
        chosen = document.pop(PROVENANCE, None)
        kept = {"of": document.get("preset"), "values": document.pop(PRESET, None)}
        layers.append((f"{config_file}", _dotted(document)))
    layers.append(("--set", parse_set(sets)))
    layers.append(("flag", flags))
    for name, layer in layers:
        for key, value in layer.items():
            values[key] = value
            places[key] = _place(name, key, value)
            provenance[key] = f"--{key.replace('_', '-')}" if name == "flag" else name
            if config_file is not None and name == f"{config_file}" and chosen is not None:
                provenance[key] = chosen.get(key, "preset" if "." in key else "default")
    preset_name = str(values.get("preset", RunSettings.model_fields["preset"].default))
    if isinstance(kept.get("values"), Mapping) and kept["of"] == preset_name:
        # The tables beside it hold every value of these two.
        base = {**kept["values"], "model": ModelSpec().model_dump(), "optim": OptimSpec().model_dump()}
    else:
        base = load_preset(preset_name).model_dump()
    tables = {"model": dict(base["model"]), "optim": dict(base["optim"])}
    own: dict[str, Any] = {}
    unknown: list[str] = []
    known = [*RunSettings.model_fields, *(f"{t}.{k}" for t, keys in tables.items() for k in keys)]
    for key, value in values.items():
        table, dot, inner = key.partition(".")
        if key not in known:
            unknown.append(f"unknown key {key}{suggest(key, known)} ({provenance[key]})")
        elif dot:
            tables[table][inner] = value
        else:
            own[key] = value
    if unknown:
        strange = {key.partition(".")[0] for key in values if key not in known and not suggest(key, known)}
        near = "; ".join(f"{table}.* are {', '.join(tables[table])}" for table in tables if table in strange)
        hint = (
            f"rtdetr presets show {preset_name} shows every key of model.* and optim.*, rtdetr train --help the flags"
        )
        raise UsageError("; ".join(unknown), hint=f"{near}; {hint}" if near else hint, code="config-invalid")
    few = own.get("overfit")
    if (
        "effective_batch" not in own
        and isinstance(few, int)
        and 0 < few < RunSettings.model_fields["effective_batch"].default
    ):
        own["effective_batch"] = few
        provenance["effective_batch"] = "--overfit: a step sees each image once"
    if "weights" not in own and base.get("weights") is None:
        own["weights"] = "none"
        provenance["weights"] = f"preset {base.get('name')} has no published weights"
    faults: list[str] = []
    try:
        preset = validate(Preset, {**base, **tables}, source=f"preset {base.get('name')}", places=places)
    except UsageError as error:
        faults.append(error.message)
    try:
        settings = validate(RunSettings, own, source="settings", places=places)
    except UsageError as error:
        faults.append(error.message)
    if faults:
        raise UsageError("; ".join(faults), code="config-invalid")
    for key in tables:
        for inner in tables[key]:
            provenance.setdefault(f"{key}.{inner}", "preset")
    for key in RunSettings.model_fields:
        provenance.setdefault(key, "default")
    return RunConfig(settings, preset, provenance)


def _place(layer: str, key: str, value: Any) -> str:
    """Return how a setting was written, and where."""
    text = value if isinstance(value, str) else _toml(value)
    if layer == "flag":
        shown = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else text
        return f"--{key.replace('_', '-')} {shown}"
    return f"--set {key}={text}" if layer == "--set" else f"{layer}: {key} = {_toml(value)}"


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            flat[key] = value
    return flat
