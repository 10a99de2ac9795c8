"""What a run will do, worked out before it does it: every derived value with the reason for it.

The published schedule is absolute: 2,000 steps of warm-up and an average over the last 10,000, whatever the length
of the run. On 200 images and 24 epochs the rate then never passes a third of its value. Here warm-up, decay,
moving average, the end of strong augmentation and of multi-scale are functions of the number of steps, and the rate
is one of the effective batch. `schedule=official` gives the published values instead.

No torch here: a plan can be made, printed and tested anywhere.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.text import counted

# The published scales at 640 pixels, 480 to 800 in steps of 32 with 640 three times, as shares.
SCALES = tuple(s / 640 for s in (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800))
# Steps below which a run from such a start learns little. Measured for random weights, with `tiny`: 260 steps reach
# AP 0.5 on blood cells (tests/bench/bench_schedules.py). The others are shares of that, not measured.
SHORT = {"coco": 100, "imagenet": 200, "none": 250}
# Steps from which on the recipe's crops and shrunken images are taken. That they cost AP in short runs is measured at
# 260 steps (tests/bench/bench_schedules.py --arm recipe:aug=recipe); where they begin to pay is not: a round number.
RECIPE_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Choice:
    """One derived value and the reason for it, as people read them."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's schedule. Epochs count from 0 here, steps too; a step is one update of the optimizer.

    Attributes:
        schedule: `scaled` or `official`.
        epochs, steps_per_epoch, effective_batch: the run's length; the last batch of an epoch is filled up.
        lr, lr_backbone: peak rates of head and backbone.
        warmup_steps: steps over which the rate rises linearly.
        flat_steps: step at which it begins to fall; the total for never.
        final_rate: share of the peak that is left at the end of the fall (a half cosine).
        ema_age: mean age in steps of what the moving average averages, once grown.
        ema_ramp: share of the steps made so far that the mean age is, until then; 0 for the published formula.
        augmentation: `none`, `light`, `recipe` or a user's file.
        strong_until: first epoch without strong augmentation.
        multi_scale_until: first epoch without multi-scale; 0 for never any.
        scales: (height, width) in pixels that multi-scale draws from.
        choices: the same for people, with reasons.
        warnings: what will go wrong.
    """

    schedule: str
    epochs: int
    steps_per_epoch: int
    effective_batch: int
    lr: float
    lr_backbone: float
    warmup_steps: int
    flat_steps: int
    final_rate: float
    ema_age: float
    ema_ramp: float
    augmentation: str
    strong_until: int
    multi_scale_until: int
    eval_every: int
    scales: tuple[tuple[int, int], ...]
    choices: tuple[Choice, ...] = field(default=(), compare=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    @property
    def total_steps(self) -> int:
        """Updates of the optimizer in the whole run."""
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate that update `step` (from 0) uses."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.flat_steps:
            return 1.0
        done = min(1.0, (step + 1 - self.flat_steps) / max(1, self.total_steps - self.flat_steps))
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))

    def ema_weight(self, update: int) -> float:
        """Return the weight of the newest model in the moving average after update `update` (from 1).

        The published form is decay(t) = d (1 - exp(-t / ramp)). Ours follows from what is wanted: if the mean age
        after t updates is to be a*t, then a(t + 1) = (1 - w)(a t + 1), hence w = (1 - a) / (a t + 1); and a constant
        weight w keeps the mean age at (1 - w) / w.
        """
        if not self.ema_ramp:
            decay = self.ema_age / (self.ema_age + 1)
            return 1 - decay * (1 - math.exp(-update / OFFICIAL_EMA_RAMP))
        young = (1 - self.ema_ramp) / (self.ema_ramp * (update - 1) + 1)
        return max(young, 1 / (1 + self.ema_age))

    def evaluates(self, epoch: int) -> bool:
        """Tell whether this epoch ends with an evaluation."""
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs

    def line(self, micro_batch: int, world_size: int = 1) -> str:
        """Return the plan on one line, in the voice of the command line."""
        parts = [f"{self.epochs} epochs x {self.steps_per_epoch} steps"]
        local = -(-self.effective_batch // world_size)
        cut = f"{-(-local // micro_batch)}x{min(micro_batch, local)}" + (f"x{world_size}" if world_size > 1 else "")
        parts.append(f"effective batch {self.effective_batch} = {cut}")
        parts += [f"{c.name} {c.value} ({c.reason})" for c in self.choices if c.name in ("lr", "warm-up")]
        strong = next((c for c in self.choices if c.name == "strong augmentation"), None)
        if strong is not None:
            parts.append(f"strong augmentation {strong.value}")
        return "plan  " + "  ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest."""
        return asdict(self)


OFFICIAL_EMA_RAMP = 2000


def make_plan(config: RunConfig, *, images: int) -> Plan:
    """Work out the schedule of a run.

    Args:
        config: the resolved settings and preset.
        images: training images.
    """
    settings, preset = config.settings, config.preset
    official = settings.schedule == "official"
    published = preset.official
    choices: list[Choice] = []
    warnings: list[str] = []

    height, width = config.imgsz
    size_reason = config.source("imgsz") if settings.imgsz else f"preset {preset.name}"
    choices.append(Choice("input size", f"{height}x{width}", size_reason))
    choices.append(Choice("frozen", *_frozen(config)))

    # ---- length -----------------------------------------------------------------------------------------------
    epochs, reason = settings.epochs, config.source("epochs")
    if official and not config.given("epochs"):
        epochs, reason = published.epochs, "published"
    effective = settings.effective_batch
    per_epoch = max(1, math.ceil(images / effective))
    total = epochs * per_epoch
    choices.append(Choice("effective batch", str(effective), config.source("effective_batch")))
    choices.append(Choice("epochs", str(epochs), reason))
    choices.append(Choice("steps", f"{total}", f"{epochs} epochs x {per_epoch}: {images} images / {effective}"))

    # ---- rate -------------------------------------------------------------------------------------------------
    lr, lr_backbone, lr_reason = _rates(config, official)
    choices.append(Choice("lr", f"{lr:.3g}", lr_reason))
    if lr_backbone != lr:
        ratio = f"{lr_backbone / lr:.3g} of lr, the preset's share"
        why = "--lr-backbone" if settings.lr_backbone is not None else ratio
        choices.append(Choice("backbone lr", f"{lr_backbone:.3g}", why))
    # A share that somebody set holds in the official schedule too: one may be changed and the rest kept.
    if official and not config.given("warmup"):
        warmup = published.warmup_steps
        choices.append(Choice("warm-up", counted(warmup, "step"), "published"))
    else:
        warmup = min(published.warmup_steps, max(1, round(settings.warmup * total)))
        share = f"{settings.warmup:.0%} of {total}"
        capped = warmup == published.warmup_steps and settings.warmup * total > warmup
        choices.append(
            Choice(
                "warm-up",
                counted(warmup, "step"),
                f"the published most, under {share}" if capped else share,
            )
        )
    if official and not (config.given("flat") or config.given("final_rate")):
        flat, final = total, 1.0
        choices.append(Choice("decay", "none", "published: a constant rate"))
    else:
        flat = max(warmup, round(settings.flat * total))
        final = settings.final_rate
        choices.append(
            Choice("decay", f"from step {flat} to {final:.0%}", f"half a cosine over the last {1 - flat / total:.0%}")
        )

    # ---- moving average ---------------------------------------------------------------------------------------
    if official and not (config.given("ema_age") or config.given("ema_ramp")):
        age, ramp = published.ema_decay / (1 - published.ema_decay), 0.0
        choices.append(Choice("EMA", f"decay {published.ema_decay}, ramp {published.ema_warmup} steps", "published"))
    else:
        # The ramp grows until it meets the final age; below one step there is nothing to average.
        age, ramp = max(1.0, settings.ema_age * total), settings.ema_ramp
        share = f"{settings.ema_age:.1%} of the run"
        if settings.ema_age * total < 1:
            share = f"{share} would be less"
        choices.append(
            Choice(
                "EMA",
                f"mean age {counted(round(age), 'step')} (decay {age / (age + 1):.5g})",
                f"{share}; {ramp:.0%} of the steps made until step {math.ceil(age / ramp)}",
            )
        )

    # ---- what the images go through -------------------------------------------------------------------------
    if official and not config.given("calm"):
        calm, why = published.epochs - published.strong_augmentation_until, "published"
    else:
        calm = max(2, round(settings.calm * epochs))
        why = f"off for the last {settings.calm:.0%} of the epochs, at least two"
    strong_until = max(epochs - calm, (epochs + 1) // 2)
    if strong_until > epochs - calm:
        why = "off for at most half of so few epochs"
    augmentation, aug_reason = _augmentation(config, official, total)
    choices.append(Choice("augmentation", augmentation, aug_reason))
    if augmentation == "none":
        strong_until = 0
    else:
        choices.append(Choice("strong augmentation", f"until epoch {strong_until}", why))
    multi_until = strong_until if published.multi_scale_until else 0
    if official and published.multi_scale_until:
        multi_until = max(epochs - (published.epochs - published.multi_scale_until), (epochs + 1) // 2)
    if augmentation == "none":
        multi_until = 0
    scales = tuple((_multiple(height * s), _multiple(width * s)) for s in SCALES)
    if multi_until:
        low, high = scales[0], scales[-1]
        said = f"{low[0]}x{low[1]} to {high[0]}x{high[1]} until epoch {multi_until}"
        choices.append(Choice("multi-scale", said, "published shares of the size, sides kept in proportion"))
    else:
        choices.append(Choice("multi-scale", "none", f"preset {preset.name} is trained at one size"))

    if settings.cache != "none":
        room = f"{settings.cache_gb:g} GB" if settings.cache_gb else "half of what is free"
        choices.append(Choice("cache", f"{settings.cache}, {room}", config.source("cache")))

    # ---- will it learn ----------------------------------------------------------------------------------------
    start = settings.weights if settings.weights in SHORT else "coco"
    if total < SHORT[start]:
        need = math.ceil(SHORT[start] / per_epoch)
        origin = {"coco": "pretrained weights", "imagenet": "an ImageNet backbone", "none": "random weights"}[start]
        warnings.append(
            f"{total} steps are too few to learn much from {origin} (about {SHORT[start]}): --epochs {need} or more"
        )
    if warmup >= total:
        warnings.append(
            f"the warm-up of {warmup} steps is longer than the run: "
            f"the rate never passes {total / warmup:.0%} of its value"
        )
    if official and effective != preset.optim.batch:
        warnings.append(f"the published rates belong to an effective batch of {preset.optim.batch}, not {effective}")
    if effective > images:
        warnings.append(f"the effective batch of {effective} is more than the {images} images: batches repeat them")

    return Plan(
        schedule=settings.schedule,
        epochs=epochs,
        steps_per_epoch=per_epoch,
        effective_batch=effective,
        lr=lr,
        lr_backbone=lr_backbone,
        warmup_steps=warmup,
        flat_steps=flat,
        final_rate=final,
        ema_age=age,
        ema_ramp=ramp,
        augmentation=augmentation,
        strong_until=strong_until,
        multi_scale_until=multi_until,
        eval_every=settings.eval_every,
        scales=scales,
        choices=tuple(choices),
        warnings=tuple(warnings),
    )


def frozen_spec(config: RunConfig) -> ModelSpec:
    """Return the model's sizes with what `--freeze` and random weights change of its freezing."""
    settings, spec = config.settings, config.preset.model
    if settings.freeze == "none":
        return spec.model_copy(update={"freeze_at": -1})
    if settings.freeze == "preset" and settings.weights == "none":
        return spec.model_copy(update={"freeze_at": -1, "freeze_norm": False})
    return spec


def _frozen(config: RunConfig) -> tuple[str, str]:
    """Return what does not learn, in words, and why."""
    settings, spec = config.settings, frozen_spec(config)
    parts = []
    if settings.freeze in ("backbone", "encoder"):
        parts.append("backbone" if settings.freeze == "backbone" else "backbone and encoder")
    elif settings.freeze == "stem" or spec.freeze_at == 0:
        parts.append("stem")
    elif spec.freeze_at > 0:
        parts.append(f"stem and {counted(spec.freeze_at, 'stage')}")
    if spec.freeze_norm:
        parts.append("norms of the backbone")
    if config.given("freeze"):
        reason = config.source("freeze")
    else:
        reason = f"preset {config.preset.name}" if spec == config.preset.model else "random weights"
    return ", ".join(parts) or "nothing", reason


def _augmentation(config: RunConfig, official: bool, steps: int) -> tuple[str, str]:
    """Return (name, reason).

    The recipe was published for long runs. In short ones its crops and shrunken images cost AP: they show objects at
    sizes and places that the val split does not have, before the network knows those that it has.
    """
    settings = config.settings
    if settings.overfit and not config.given("aug"):
        return "none", "--overfit"
    if settings.aug != "auto":
        return settings.aug, config.source("aug")
    if official:
        return "recipe", "published"
    if steps < RECIPE_STEPS:
        return "light", f"under {RECIPE_STEPS} steps: the recipe's crops cost AP in short runs"
    return "recipe", f"published; from {RECIPE_STEPS} steps on"


def _rates(config: RunConfig, official: bool) -> tuple[float, float, str]:
    """Return (lr, backbone lr, reason).

    The rate follows the square root of the effective batch. Adam divides by the gradient's own size, so that what a
    larger batch changes is the noise, which falls with the square root. Never more than twice the preset's rate:
    above it the set prediction loss diverges before it gains.
    """
    settings, optim = config.settings, config.preset.optim
    factor = 1.0 if official else min(2.0, math.sqrt(settings.effective_batch / optim.batch))
    scaled = (
        "preset"
        if factor == 1
        else f"preset {optim.lr:.3g} x {factor:.3g}, the root of {settings.effective_batch}/{optim.batch}"
    )
    if factor == 2.0 and settings.effective_batch > 4 * optim.batch:
        scaled = f"preset {optim.lr:.3g} x 2, the most"
    lr, reason = (optim.lr * factor, "published" if official else scaled)
    if settings.lr is not None:
        lr, reason = settings.lr, "--lr"
    lr_backbone = lr * (optim.lr_backbone / optim.lr)
    if settings.lr_backbone is not None:
        lr_backbone = settings.lr_backbone
    return lr, lr_backbone, reason


def _multiple(side: float) -> int:
    return max(32, round(side / 32) * 32)
