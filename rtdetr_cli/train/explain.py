"""The plan of a run in words: every value with the reason for it, and what is likely to go wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.settings import CALM_STEPS, PUBLISHED_WEIGHTS, RECIPE_STEPS
from rtdetr_cli.text import abbreviate, counted
from rtdetr_cli.train.plan import (
    LARGEST_RATE_FACTOR,
    Plan,
    base_rates,
    calm_epochs,
    calm_share,
    frozen_spec,
    is_muon_from_scratch,
    keeps_published,
    rate_factor,
)
from rtdetr_cli.weights.catalogue import find_by_file
from rtdetr_cli.weights.hub import hash_kind

# What a run starts from, and the steps below which it learns little. Measured for random weights, with `tiny`: 260
# steps reach AP 0.5 on blood cells (docs/learning.md). The others are shares of that, not measured.
STARTS = {"imagenet": ("an ImageNet backbone", 200), "none": ("random weights", 250)}
PRETRAINED = "pretrained weights", 100
FEW_BOXES, RARE_SHARE = 10, 0.1  # a class with fewer boxes than this, or than this share of the median class, is rare
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
MOST_DETECTIONS = 300  # in an image, with any number of queries
QUERY_STEP = 50  # suggested numbers of queries are multiples of it


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of a plan, as people read it, and the reason for it."""

    name: str
    value: str
    reason: str


def plan_line(plan: Plan, micro_batch: int, processes: int = 1) -> str:
    """Return the plan on one line."""
    images = math.ceil(plan.effective_batch / processes)
    factors = [math.ceil(images / micro_batch), min(micro_batch, images)] + [processes] * (processes > 1)
    parts = [
        f"{counted(plan.epochs, 'epoch')} x {counted(plan.steps_per_epoch, 'step')}",
        f"effective batch {plan.effective_batch} ({' x '.join(map(str, factors))})",
        f"lr {plan.lr:.3g}",
        f"warmup {counted(plan.warmup_steps, 'step')}",
        f"{plan.augmentation} augmentation" if plan.augmentation != "none" else "no augmentation",
    ]
    return f"plan  {', '.join(parts)}"


def explain_plan(config: RunConfig, plan: Plan, *, images: int) -> tuple[Choice, ...]:
    """Return each value of a plan with its reason; `images` is the number of training images."""
    settings = config.settings
    per_epoch = f"{plan.steps_per_epoch} ({counted(images, 'image')} / {plan.effective_batch})"
    choices = [
        *_explain_model(config),
        Choice("effective batch", str(plan.effective_batch), config.source("effective_batch")),
        Choice(
            "epochs", str(plan.epochs), "published" if keeps_published(config, "epochs") else config.source("epochs")
        ),
        Choice("steps", str(plan.total_steps), f"{counted(plan.epochs, 'epoch')} x {per_epoch}"),
        *_explain_rate(config, plan),
        _explain_average(config, plan),
        *_explain_augmentation(config, plan),
    ]
    if settings.cache != "none":
        budget = f"{settings.cache_gb:g} GB" if settings.cache_gb else "half of the free space"
        choices.append(Choice("cache", f"{settings.cache}, {budget}", config.source("cache")))
    return tuple(choices)


def plan_warnings(config: RunConfig, plan: Plan, *, images: int) -> tuple[str, ...]:
    """Return warnings about what is likely to go wrong with a plan."""
    warnings = []
    total, warmup, batch = plan.total_steps, plan.warmup_steps, plan.effective_batch
    start, enough = STARTS.get(config.settings.weights, PRETRAINED)
    if total < enough:
        epochs = math.ceil(enough / plan.steps_per_epoch)
        warnings.append(
            f"{counted(total, 'step')}: too few to learn much from {start} "
            f"(use about {enough}: --epochs {epochs} or more)"
        )
    if warmup >= total:
        warnings.append(
            f"the warmup of {counted(warmup, 'step')} is longer than the run: "
            f"the learning rate never passes {total / warmup:.0%} of its value"
        )
    published_batch = config.preset.optim.batch
    if plan.schedule == "official" and batch != published_batch:
        warnings.append(
            f"the published learning rates were tuned for an effective batch of {published_batch}, not {batch}"
        )
    if batch > images:
        warnings.append(f"the effective batch of {batch} is larger than the {counted(images, 'image')}: images repeat")
    return tuple(warnings)


def explain_rare_classes(boxes: Mapping[str, int]) -> tuple[Choice, ...]:
    """Return one row that names the rare classes, given the boxes of each class; none if there is no such class."""
    least = max(FEW_BOXES, RARE_SHARE * median(boxes.values())) if boxes else 0
    rare = sorted((count, name) for name, count in boxes.items() if count < least)
    if not rare:
        return ()
    named = abbreviate([f"{name} ({counted(count, 'box')})" for count, name in rare])
    reason = f"fewer than {math.ceil(least)} boxes: not drawn more often, so annotate more images with them"
    return (Choice("rare classes", named, reason),)


def crowding_warnings(most_boxes: int, queries: int) -> tuple[str, ...]:
    """Return a warning if an image has more boxes than the model can detect objects."""
    if most_boxes <= min(queries, MOST_DETECTIONS):
        return ()
    text = f"an image has {most_boxes:,} boxes, but the model detects at most {min(queries, MOST_DETECTIONS)} objects"
    enough = min(MOST_DETECTIONS, math.ceil(most_boxes / QUERY_STEP) * QUERY_STEP)
    remedies = [f"use --set model.queries={enough}"] if enough > queries else []
    if most_boxes > MOST_DETECTIONS:
        remedies.append("cut the images into tiles")
    return (f"{text} ({' and '.join(remedies)})",)


def _explain_model(config: RunConfig) -> list[Choice]:
    settings, spec = config.settings, frozen_spec(config)
    preset = f"preset {config.preset.name}"
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
        reason = preset if spec == config.preset.model else "random weights"
    height, width = config.imgsz
    return [
        *_explain_weights(config),
        Choice("input size", f"{height}x{width}", config.source("imgsz") if settings.imgsz else preset),
        Choice("frozen", ", ".join(parts) or "nothing", reason),
    ]


def _explain_weights(config: RunConfig) -> list[Choice]:
    """Return which published file the run starts from, and where it is from; nothing for other weights."""
    field = PUBLISHED_WEIGHTS.get(config.settings.weights)
    entry = find_by_file(getattr(config.preset, field) or "") if field else None
    if entry is None:
        return []
    reason = f"from {entry.url}, sha256 {hash_kind(entry.name) or 'unknown'}"
    if entry.data == "objects365-coco":
        reason += "; a higher COCO AP does not promise a better result on your images"
    return [Choice("weights", entry.description, reason)]


def _explain_rate(config: RunConfig, plan: Plan) -> list[Choice]:
    settings, published, total = config.settings, config.preset.official, plan.total_steps
    choices = [
        Choice("optimizer", OPTIMIZERS[settings.optimizer], config.source("optimizer")),
        Choice("lr", f"{plan.lr:.3g}", _lr_reason(config)),
    ]
    if plan.lr_backbone != plan.lr:
        share = f"{plan.lr_backbone / plan.lr:.3g} x lr, as in the preset"
        reason = config.source("lr_backbone") if settings.lr_backbone is not None else share
        choices.append(Choice("backbone lr", f"{plan.lr_backbone:.3g}", reason))

    share = f"{settings.warmup:.0%} of {counted(total, 'step')}"
    if keeps_published(config, "warmup"):
        share = "published"
    elif plan.warmup_steps == published.warmup_steps < settings.warmup * total:
        share = f"the published maximum, less than {share}"
    choices.append(Choice("warmup", counted(plan.warmup_steps, "step"), share))

    if keeps_published(config, "flat", "final_rate"):
        choices.append(Choice("decay", "none", "published: a constant learning rate"))
    elif plan.flat_steps >= total:
        choices.append(Choice("decay", "none", "the run is too short"))
    else:
        value = f"from step {plan.flat_steps} to {plan.final_rate:.0%}"
        steps = counted(total - plan.flat_steps, "step")
        choices.append(Choice("decay", value, f"half a cosine over the last {steps}"))
    return choices


def _lr_reason(config: RunConfig) -> str:
    settings, batch = config.settings, config.preset.optim.batch
    if settings.lr is not None:
        return config.source("lr")
    if settings.schedule == "official":
        return "published"
    factor, rate = rate_factor(config), base_rates(config)[0]
    source = "Muon" if is_muon_from_scratch(config) else "preset"
    if factor == 1:
        return f"{source}; the same for effective batches below {batch}" if settings.effective_batch < batch else source
    if factor == LARGEST_RATE_FACTOR and settings.effective_batch > factor**2 * batch:
        return f"{source} {rate:.3g} x {factor:.3g}, the maximum"
    return f"{source} {rate:.3g} x {factor:.3g}, the square root of {settings.effective_batch}/{batch}"


def _explain_average(config: RunConfig, plan: Plan) -> Choice:
    settings, published = config.settings, config.preset.official
    if keeps_published(config, "ema_age", "ema_ramp"):
        return Choice("EMA", f"decay {published.ema_decay}, ramp {published.ema_warmup} steps", "published")
    share = f"{settings.ema_age:.1%} of the run"
    if settings.ema_age * plan.total_steps < 1:
        share = "the minimum"
    return Choice(
        "EMA",
        f"decay {plan.ema_age / (plan.ema_age + 1):.5g}",
        f"averages about the last {counted(round(plan.ema_age), 'step')} ({share}); "
        f"fewer until step {math.ceil(plan.ema_age / plan.ema_ramp)}",
    )


def _explain_augmentation(config: RunConfig, plan: Plan) -> list[Choice]:
    settings = config.settings
    if settings.aug != "auto":
        reason = config.source("aug")
    elif settings.overfit and not config.given("aug"):
        reason = "--overfit"
    elif settings.schedule == "official":
        reason = "published"
    elif plan.augmentation == "light":
        reason = f"{RECIPE_STEPS} steps or fewer: too short to gain from strong crops"
    else:
        reason = f"published; used in runs of more than {RECIPE_STEPS} steps"
    choices = [Choice("augmentation", plan.augmentation, reason)]

    if plan.augmentation not in ("none", "light"):
        calm = calm_epochs(config, plan.epochs, plan.steps_per_epoch)
        if plan.strong_until > plan.epochs - calm:
            reason = "a run this short keeps it for at least half of the epochs"
        elif keeps_published(config, "calm"):
            reason = "published"
        elif calm == calm_share(config, plan.epochs):
            reason = f"off for the last {settings.calm:.0%} of the epochs, at least two"
        else:
            reason = f"off for at least the last {CALM_STEPS} steps: a short run needs them to gain from plain images"
        choices.append(Choice("strong augmentation", f"until epoch {plan.strong_until}", reason))

    if plan.multi_scale_until:
        smallest, largest = (f"{height}x{width}" for height, width in (plan.scales[0], plan.scales[-1]))
        value = f"{smallest} to {largest} until epoch {plan.multi_scale_until}"
        choices.append(Choice("multi-scale", value, "published shares of the input size"))
    elif config.preset.official.multi_scale_until:
        choices.append(Choice("multi-scale", "none", "no augmentation"))
    else:
        choices.append(Choice("multi-scale", "none", f"preset {config.preset.name} is trained at one size"))
    return choices
