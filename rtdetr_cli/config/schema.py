"""What a preset holds: the sizes of the model, its learning rates, and the published schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rtdetr_cli.config.settings import MAX_LAYERS, MAX_QUERIES, Bounds, Count, Fraction, Positive, Queries, Rate

Width = Annotated[int, Bounds(gt=0, le=16_384)]
Layers = Annotated[int, Bounds(gt=0, le=MAX_LAYERS)]


class Schema(BaseModel):
    """Immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(Schema):
    """The sizes of one RT-DETRv2. Field names follow the published configuration where it has one."""

    backbone: Literal["resnet", "hgnetv2-l", "hgnetv2-x", "hgnetv2-h"] = Field(
        "resnet", description="backbone: resnet (ResNet-vd) or an HGNetv2"
    )
    depth: Literal[10, 18, 34, 50, 101] = Field(
        18, description="depth of a ResNet-vd; 10 has one block per stage and is ours, for `tiny`"
    )
    width: Width = Field(64, description="scale of the backbone's channels; 64 in the published networks")
    freeze_at: int = Field(-1, ge=-1, le=4, description="-1 trains all; 0 freezes the stem; n the stem and n stages")
    freeze_norm: bool = Field(False, description="freeze the batch norms of the backbone")
    hidden_dim: Width = Field(256, description="width of the encoder")
    encoder_ffn: Width = Field(1024, description="feed-forward width of the encoder's attention layer")
    encoder_layers: Layers = Field(1, description="attention layers on the stride-32 feature map")
    expansion: float = Field(1.0, gt=0, le=1, description="hidden width of the fusion blocks, as a fraction")
    depth_mult: float = Field(1.0, gt=0, le=16, description="re-parameterized blocks per fusion block, divided by 3")
    heads: Width = Field(8, description="attention heads of encoder and decoder")
    decoder_dim: Width = Field(256, description="width of the decoder")
    decoder_ffn: Width = Field(1024, description="feed-forward width of the decoder")
    decoder: Literal["rtdetrv2", "deim"] = Field(
        "rtdetrv2", description="form of the decoder; `deim` has SiLU instead of ReLU, and three layers for positions"
    )
    decoder_layers: Layers = Field(3, description="decoder layers that are trained")
    eval_layers: Layers = Field(3, description="decoder layers used for inference")
    num_points: tuple[Layers, ...] = Field((4, 4, 4), description="sampling points per scale")
    queries: Queries = Field(300, description="object queries")
    denoising: Annotated[int, Bounds(ge=0, le=MAX_QUERIES)] = Field(
        100, description="denoising queries per image; 0 disables denoising"
    )
    label_noise: Fraction = Field(
        0.5, description="fraction of denoising labels eligible for noise; half of those change"
    )
    box_noise: float = Field(1.0, ge=0, le=100, description="noise of the denoising boxes, in half side lengths")

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        problems = []
        if self.backbone != "resnet" and self.depth != 18:
            problems.append(f"depth {self.depth} is for a ResNet; the backbone is {self.backbone}")
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
    """The learning rates and weight decay of a preset, which the recipe adapts to the size of the backbone.

    `decay_free` names the parameters without weight decay: `norm` all norm parameters, `head-norm` the norm parameters
    of encoder and decoder, `head-norm-bias` those and the biases of encoder and decoder.
    """

    lr: Rate = Field(1e-4, description="learning rate at the preset's batch")
    lr_backbone: Rate = Field(1e-4, description="learning rate of the backbone")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="weight decay of AdamW")
    decay_free: Literal["norm", "head-norm", "head-norm-bias"] = Field(
        "head-norm", description="parameters without weight decay"
    )
    batch: Positive = Field(16, description="effective batch that the learning rates belong to")
    clip_norm: float = Field(0.1, gt=0, le=1e6, description="gradients are clipped to this global norm")
    why: str = Field("", description="why these learning rates")


class OfficialSchedule(Schema):
    """The published schedule in absolute epochs and steps, for `--set schedule=official`."""

    epochs: Positive = Field(description="epochs")
    strong_augmentation_until: Positive = Field(description="first epoch without strong augmentation")
    multi_scale_until: Count = Field(0, description="first epoch without multi-scale; 0 never uses it")
    warmup_steps: int = Field(2000, description="steps of learning rate warmup")
    ema_decay: float = Field(0.9999, description="decay of the moving average")
    ema_warmup: int = Field(2000, description="steps over which that decay is approached")
    discrete_epochs: Count = Field(0, description="epochs of the second stage; 0 if none was published")
    discrete_strong_until: Count = Field(0, description="first epoch of the second stage without strong augmentation")


class Preset(Schema):
    """One TOML file under `presets/`."""

    name: str = Field(description="name of the preset")
    description: str = Field(description="what it is, in one line")
    params_m: float = Field(description="parameters in millions, with 80 classes")
    published_ap: float | None = Field(None, description="COCO val2017 AP of the published weights, from 0 to 1")
    weights: str | None = Field(None, description="file name of the published COCO weights")
    objects365_coco: str | None = Field(
        None, description="file name of the published weights pretrained on Objects365 and finetuned on COCO"
    )
    imagenet: str | None = Field(None, description="file name of the published ImageNet backbone")
    imgsz: tuple[Positive, Positive] = Field((640, 640), description="input size in pixels, height first")
    model: ModelSpec
    optim: OptimSpec
    official: OfficialSchedule
