"""The numbers of a run's schedule, worked out before the run starts; `explain.py` gives the reasons for them.

The published schedule is absolute: 2,000 steps of warmup and an average over the last 10,000, whatever the length of
the run. On 200 images and 24 epochs the learning rate then never passes a third of its value. Here warmup, decay,
moving average, the end of strong augmentation and of multi-scale are functions of the number of steps, and the
learning rate is a function of the effective batch. `schedule=official` gives the published values instead.

No torch here: a plan can be made, printed and tested anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rtdetr_cli.config.image_size import STRIDE
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.config.settings import CALM_STEPS, MUON_RATE, RECIPE_STEPS

# The published scales at 640 pixels, 480 to 800 in steps of 32 with 640 three times, as shares.
SCALES = tuple(s / 640 for s in (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800))
# Above twice the preset's learning rate the set prediction loss diverges before it gains.
LARGEST_RATE_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's schedule. Epochs and steps count from 0; a step is one update of the optimizer."""

    schedule: str  # `scaled` or `official`
    epochs: int
    steps_per_epoch: int  # the last batch of an epoch is filled up
    effective_batch: int
    lr: float  # peak of the head
    lr_backbone: float
    warmup_steps: int  # over which the rate rises linearly
    flat_steps: int  # step at which the rate begins to fall; the total for never
    final_rate: float  # share of the peak that is left after the fall, a half cosine
    ema_age: float  # mean age in steps of the weights in the moving average, once it has grown to it
    ema_ramp: float  # until then, the mean age as a share of the steps made so far
    ema_warmup: int  # steps over which the published formula approaches its decay; 0 for ours
    augmentation: str  # `none`, `light`, `recipe` or a user's file
    strong_until: int  # first epoch without strong augmentation
    multi_scale_until: int  # first epoch without multi-scale; 0 for no multi-scale at all
    eval_every: int  # epochs
    scales: tuple[tuple[int, int], ...]  # (height, width) that multi-scale draws from; the middle is the input size

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Return the share of the peak learning rate that a step uses."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.flat_steps:
            return 1.0
        done = min(1.0, (step + 1 - self.flat_steps) / max(1, self.total_steps - self.flat_steps))
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * done))

    def ema_weight(self, update: int) -> float:
        """Return the weight of the newest model in the moving average after update `update` (from 1).

        The published form is decay(t) = d (1 - exp(-t / ramp)). Ours follows from the mean age that is wanted: if it
        is to be a*t after t updates, then a(t + 1) = (1 - w)(a t + 1), hence w = (1 - a) / (a t + 1); and a constant
        weight w keeps the mean age at (1 - w) / w.
        """
        if self.ema_warmup:
            decay = self.ema_age / (self.ema_age + 1)
            return 1 - decay * (1 - math.exp(-update / self.ema_warmup))
        young = (1 - self.ema_ramp) / (self.ema_ramp * (update - 1) + 1)
        return max(young, 1 / (1 + self.ema_age))

    def evaluates(self, epoch: int) -> bool:
        """Return whether this epoch ends with an evaluation."""
        return (epoch + 1) % self.eval_every == 0 or epoch + 1 == self.epochs


def make_plan(config: RunConfig, *, images: int) -> Plan:
    """Work out the schedule of a run on so many training images."""
    settings, published = config.settings, config.preset.official
    epochs = published.epochs if keeps_published(config, "epochs") else settings.epochs
    per_epoch = max(1, math.ceil(images / settings.effective_batch))
    total = epochs * per_epoch
    rate, rate_backbone = base_rates(config)
    lr = settings.lr if settings.lr is not None else rate * rate_factor(config)
    lr_backbone = settings.lr_backbone if settings.lr_backbone is not None else lr * (rate_backbone / rate)

    if keeps_published(config, "warmup"):
        warmup = published.warmup_steps
    else:
        warmup = min(published.warmup_steps, max(1, round(settings.warmup * total)))
    if keeps_published(config, "flat", "final_rate"):
        flat, final_rate = total, 1.0
    else:
        flat, final_rate = max(warmup, round(settings.flat * total)), settings.final_rate
    if keeps_published(config, "ema_age", "ema_ramp"):
        age, ramp, ema_warmup = published.ema_decay / (1 - published.ema_decay), 0.0, published.ema_warmup
    else:
        # Below one step there is nothing to average.
        age, ramp, ema_warmup = max(1.0, settings.ema_age * total), settings.ema_ramp, 0

    augmentation = _augmentation(config, total)
    half = (epochs + 1) // 2  # the calm epochs at the end are never more than half of the run
    strong_until = max(epochs - calm_epochs(config, epochs, per_epoch), half)
    multi_scale_until = strong_until if published.multi_scale_until else 0
    if settings.schedule == "official" and published.multi_scale_until:
        multi_scale_until = max(epochs - (published.epochs - published.multi_scale_until), half)
    if augmentation == "none":
        strong_until = multi_scale_until = 0
    # The sides of each scale are multiples of the stride.
    scales = [[max(STRIDE, round(side * share / STRIDE) * STRIDE) for side in config.imgsz] for share in SCALES]
    return Plan(
        schedule=settings.schedule,
        epochs=epochs,
        steps_per_epoch=per_epoch,
        effective_batch=settings.effective_batch,
        lr=lr,
        lr_backbone=lr_backbone,
        warmup_steps=warmup,
        flat_steps=flat,
        final_rate=final_rate,
        ema_age=age,
        ema_ramp=ramp,
        ema_warmup=ema_warmup,
        augmentation=augmentation,
        strong_until=strong_until,
        multi_scale_until=multi_scale_until,
        eval_every=settings.eval_every,
        scales=tuple((height, width) for height, width in scales),
    )


def keeps_published(config: RunConfig, *keys: str) -> bool:
    """Return whether the official schedule decides these settings, because none of them was given."""
    return config.settings.schedule == "official" and not any(map(config.given, keys))


def base_rates(config: RunConfig) -> tuple[float, float]:
    """Return the learning rates of head and backbone for the preset's batch.

    The presets' rates protect pretrained weights, which random ones do not need (docs/learning.md).
    """
    if is_muon_from_scratch(config):
        return MUON_RATE, MUON_RATE
    return config.preset.optim.lr, config.preset.optim.lr_backbone


def is_muon_from_scratch(config: RunConfig) -> bool:
    """Return whether Muon trains random weights at its own rate: no published one, and none given in the preset."""
    settings = config.settings
    if settings.schedule == "official" or config.given("optim.lr") or config.given("optim.lr_backbone"):
        return False
    return settings.optimizer == "muon" and settings.weights == "none"


def rate_factor(config: RunConfig) -> float:
    """Return the factor on the preset's learning rate.

    Above the preset's batch it is the square root of the effective batch's: Adam divides by the gradient's own size, so
    what a larger batch changes is the noise, which falls with the square root. Below it the rate stays: a short run on
    few images loses more by learning slowly than by the noise (docs/learning.md).
    """
    if config.settings.schedule == "official":
        return 1.0
    root = math.sqrt(config.settings.effective_batch / config.preset.optim.batch)
    return min(LARGEST_RATE_FACTOR, max(1.0, root))


def calm_epochs(config: RunConfig, epochs: int, per_epoch: int) -> int:
    """Return the epochs at the end of a run that should go without strong augmentation; an epoch has `per_epoch` steps.

    A tenth of a short run is too little to gain from plain images (docs/learning.md).
    """
    published = config.preset.official
    if keeps_published(config, "calm"):
        return published.epochs - published.strong_augmentation_until
    share = calm_share(config, epochs)
    return share if config.given("calm") else max(share, math.ceil(CALM_STEPS / per_epoch))


def calm_share(config: RunConfig, epochs: int) -> int:
    """Return the epochs that the setting `calm` is, at least two."""
    return max(2, round(config.settings.calm * epochs))


def frozen_spec(config: RunConfig) -> ModelSpec:
    """Return the model's sizes with the changes that `--freeze` and random weights make to its freezing."""
    settings, spec = config.settings, config.preset.model
    if settings.freeze == "none":
        return spec.model_copy(update={"freeze_at": -1})
    if settings.freeze == "preset" and settings.weights == "none":
        return spec.model_copy(update={"freeze_at": -1, "freeze_norm": False})
    return spec


def _augmentation(config: RunConfig, steps: int) -> str:
    """Return the augmentation.

    The recipe was published for long runs. In short ones its crops and shrunken images cost AP: they show objects at
    sizes and positions that the val split does not have, before the network knows those that it has.
    """
    settings = config.settings
    if settings.overfit and not config.given("aug"):
        return "none"
    if settings.aug != "auto":
        return settings.aug
    return "recipe" if settings.schedule == "official" or steps > RECIPE_STEPS else "light"
