"""What a preset and a run are: they describe and validate, and never build, probe or read anything."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Schema(BaseModel):
    """Immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(Schema):
    """The sizes of one RT-DETRv2. Field names follow the published configuration where it has one."""

    depth: Literal[10, 18, 34, 50, 101] = Field(
        18, description="ResNet-vd depth; 10 is one block a stage and is ours, for `tiny`"
    )
    width: Positive = Field(64, description="channels of the first residual stage; the published nets have 64")
    freeze_at: int = Field(-1, ge=-1, le=4, description="-1 trains all; 0 freezes the stem; n the stem and n stages")
    freeze_norm: bool = Field(False, description="backbone batch norms become constants")
    hidden_dim: Positive = Field(256, description="encoder width")
    encoder_ffn: Positive = Field(1024, description="feed-forward width of the encoder's attention layer")
    encoder_layers: Positive = Field(1, description="attention layers on the stride-32 map")
    expansion: float = Field(1.0, gt=0, le=1, description="hidden share of the fusion blocks")
    depth_mult: float = Field(1.0, gt=0, description="times three re-parameterised blocks in a fusion block")
    heads: Positive = Field(8, description="attention heads, encoder and decoder")
    decoder_dim: Positive = Field(256, description="decoder width")
    decoder_ffn: Positive = Field(1024, description="feed-forward width of the decoder")
    decoder_layers: Positive = Field(3, description="decoder layers that are trained")
    eval_layers: Positive = Field(3, description="decoder layers used at inference")
    num_points: tuple[Positive, ...] = Field((4, 4, 4), description="sampling points for each scale")
    queries: Positive = Field(300, description="object queries")
    denoising: int = Field(100, ge=0, description="denoising queries wanted in an image; 0 for none")
    label_noise: Fraction = Field(0.5, description="share of denoising labels that may be changed, halved")
    box_noise: float = Field(1.0, ge=0, description="denoising box noise, in half sides")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        problems = []
        if self.eval_layers > self.decoder_layers:
            problems.append(f"eval_layers {self.eval_layers} is more than decoder_layers {self.decoder_layers}")
        if len(self.num_points) != 3:
            problems.append(f"num_points needs one number for each of the 3 scales, not {len(self.num_points)}")
        for name in ("hidden_dim", "decoder_dim"):
            if getattr(self, name) % self.heads or getattr(self, name) % 4:
                problems.append(f"{name} {getattr(self, name)} must be a multiple of heads ({self.heads}) and of 4")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class OptimSpec(Schema):
    """The learning rates and decay rule of a preset: the recipe's scale-adaptive part.

    `decay_free` names the parameters without weight decay: `norm` all norm parameters anywhere, `head-norm` those of
    encoder and decoder, `head-norm-bias` those and their biases; backbone norms then follow `backbone_norm_decay`.
    """

    lr: Rate = Field(1e-4, description="learning rate at the preset's batch")
    lr_backbone: Rate = Field(1e-4, description="learning rate of the backbone")
    weight_decay: float = Field(1e-4, ge=0)
    decay_free: Literal["norm", "head-norm", "head-norm-bias"] = "head-norm"
    batch: Positive = Field(16, description="effective batch that the learning rates belong to")
    clip_norm: float = Field(0.1, gt=0, description="largest global gradient norm")
    why: str = Field("", description="one sentence that says why these rates")


class OfficialSchedule(Schema):
    """The published, absolute schedule, for `--set schedule=official`."""

    epochs: Positive
    strong_augmentation_until: Positive = Field(description="first epoch without it")
    multi_scale_until: int = Field(0, ge=0, description="first epoch without it; 0: never multi-scale")
    warmup_steps: int = 2000
    ema_decay: float = 0.9999
    ema_warmup: int = 2000
    discrete_epochs: int = Field(0, ge=0, description="of the second stage; 0: none was published")
    discrete_strong_until: int = Field(0, ge=0)


class Preset(Schema):
    """One TOML file under `presets/`."""

    name: str
    description: str
    params_m: float = Field(description="parameters in millions, 80 classes; a test counts them")
    published_ap: float | None = Field(None, description="COCO val2017 AP of the published weights, 0 to 1")
    weights: str | None = Field(None, description="file name of the published COCO weights")
    discrete_weights: str | None = None
    imagenet: str | None = Field(None, description="file name of the published ImageNet backbone")
    imgsz: tuple[Positive, Positive] = (640, 640)
    model: ModelSpec
    optim: OptimSpec
    official: OfficialSchedule
