"""Read and write the folders of transformers' RT-DETR and RT-DETRv2: `config.json`, `model.safetensors`, and
`preprocessor_config.json` with the input size. Nothing here imports transformers.

What a folder cannot say (category ids, thresholds, metrics) goes into a file of our own, `rtdetr.json`. It counts only
as long as the tensors are those that it was written for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.documents import parse_json, read_bounded
from rtdetr_cli.errors import ModelError
from rtdetr_cli.files import atomic_write, write_text
from rtdetr_cli.model.backbone import BLOCKS, resnet_depth
from rtdetr_cli.model.build import build_shapes
from rtdetr_cli.model.hgnet import LAYERS, LIGHT, SIZES, scaled_sizes
from rtdetr_cli.weights.architecture import point_scales
from rtdetr_cli.weights.class_names import COCO_CATEGORY_IDS, COCO_NAMES
from rtdetr_cli.weights.header import TRANSFORMERS_TENSORS, ModelHeader
from rtdetr_cli.weights.identity import tensors_identity
from rtdetr_cli.weights.names import from_transformers, to_transformers

CONFIG, PREPROCESSOR, OURS = "config.json", "preprocessor_config.json", "rtdetr.json"
_TYPES = {"rt_detr": True, "rt_detr_v2": False}  # whether it is v1

_FIELDS: dict[str, tuple[str, float]] = {
    "encoder_hidden_dim": ("hidden_dim", 256), "encoder_ffn_dim": ("encoder_ffn", 1024),
    "encoder_layers": ("encoder_layers", 1), "hidden_expansion": ("expansion", 1.0),
    "encoder_attention_heads": ("heads", 8), "d_model": ("decoder_dim", 256), "decoder_ffn_dim": ("decoder_ffn", 1024),
    "decoder_layers": ("decoder_layers", 6), "num_queries": ("queries", 300), "num_denoising": ("denoising", 100),
    "label_noise_ratio": ("label_noise", 0.5), "box_noise_scale": ("box_noise", 1.0),
}  # fmt: skip
"""Settings of transformers, our names of them, and what transformers assumes where a file leaves them out."""

_ASSUMED_RESNET = {"depths": [3, 4, 6, 3], "layer_type": "bottleneck", "embedding_size": 64}

# Settings that our network has no choice of, with their only value.
_FIXED: dict[str, Any] = {
    "encoder_activation_function": "gelu", "activation_function": "silu", "decoder_activation_function": "relu",
    "normalize_before": False, "positional_encoding_temperature": 10000, "feat_strides": [8, 16, 32],
    "encode_proj_layers": [2], "num_feature_levels": 3, "decoder_n_levels": 3, "with_box_refine": True,
    "learn_initial_query": False, "decoder_offset_scale": 0.5, "layer_norm_eps": 1e-5, "batch_norm_eps": 1e-5,
}  # fmt: skip
_FIXED_BACKBONE: dict[str, Any] = {
    "hidden_act": "relu", "num_channels": 3, "downsample_in_first_stage": False, "downsample_in_bottleneck": False,
    "use_learnable_affine_block": False, "out_indices": [2, 3, 4],
}  # fmt: skip
_FIXED_IMAGES: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "do_normalize": False, "do_pad": False, "resample": 2,
}  # fmt: skip


def is_transformers_folder(folder: Path) -> bool:
    """Return whether a folder looks like a model of transformers."""
    return (folder / CONFIG).is_file() and (folder / TRANSFORMERS_TENSORS).is_file()


def read_transformers(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], ModelSpec, ModelHeader, bool]:
    """Read the files beside a `model.safetensors`, and rename its tensors.

    Returns:
        The tensors under our names, the architecture, everything else that the folder says, and whether it is v1.

    Raises:
        ModelError: `config.json` is missing, or has a setting that our network cannot follow.
    """
    config_path = path.with_name(CONFIG)
    config = _read_json(config_path)
    if config is None:
        raise ModelError(
            f"{path} has the tensors of transformers, but there is no {CONFIG} beside it",
            hint=f"download {CONFIG} and {PREPROCESSOR} of the model too",
            code="model-foreign",
        )
    if config.get("model_type") not in _TYPES:
        message = f"{config_path}: model_type {config.get('model_type')!r} is neither rt_detr nor rt_detr_v2"
        raise ModelError(message, code="model-foreign")
    is_v1 = _TYPES[config["model_type"]]
    frozen = not any(n.startswith("model.backbone.") and n.endswith("num_batches_tracked") for n in tensors)
    try:
        spec = _spec(config, frozen=frozen)
        classes = int(tensors["model.enc_score_head.weight"].shape[0])
        names = _class_names(config, classes)
        imgsz = _image_size(path.with_name(PREPROCESSOR), config)
        sampling = {"default": "bilinear", "discrete": "discrete"}[config.get("decoder_method", "default")]
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        message = f"{config_path} does not describe an RT-DETR that rtdetr can load: {error}"
        raise ModelError(message, code="model-foreign") from error
    expected = build_shapes(spec, num_classes=classes).state_dict()
    state = {**point_scales(spec), **from_transformers(tensors, expected)}
    embedding = "decoder.denoising_class_embed.weight"  # absent where the model was trained without denoising
    if embedding not in state:
        state[embedding] = torch.zeros(expected[embedding].shape)
    header = ModelHeader(
        names=names,
        category_ids=COCO_CATEGORY_IDS if names == COCO_NAMES else tuple(range(classes)),
        imgsz=imgsz,
        sampling=sampling,
        queries=spec.queries,
    )
    return state, spec, _with_our_facts(header, state, path.with_name(OURS)), is_v1


def write_transformers(
    folder: Path, state: Mapping[str, Tensor], spec: ModelSpec, header: ModelHeader, *, v1: bool
) -> None:
    """Write a model as transformers does; only the decoder layers that are used, since it has no others.

    Args:
        folder: created if needed.
        state: the tensors under our names.
        spec: the architecture.
        header: names, input size, sampling, and layers and queries used.
        v1: write RT-DETR v1, whose network is the same but for the choice of sampling points.

    Raises:
        ModelError: transformers has no such network.
        RtdetrError: the folder cannot be written.
    """
    used = spec.model_copy(
        update={"decoder_layers": header.layers, "eval_layers": header.layers, "queries": header.queries}
    )
    _refuse_unsupported(used, header, v1=v1)
    kept = {n: t.detach().cpu() for n, t in state.items() if _layer_of(n) < header.layers}
    tensors = {n: t.contiguous().clone() for n, t in to_transformers(kept, v1=v1).items()}
    height, width = header.imgsz
    images = {
        "image_processor_type": "RTDetrImageProcessor", **_FIXED_IMAGES, "rescale_factor": 1 / 255,
        "size": {"height": height, "width": width},
    }  # fmt: skip
    ours = json.loads(replace(header, identity=tensors_identity(kept)).to_json())
    documents = {CONFIG: _config(used, header, v1=v1), PREPROCESSOR: images, OURS: ours}
    with atomic_write(folder / TRANSFORMERS_TENSORS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    for name, document in documents.items():
        write_text(folder / name, json.dumps(document, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is no such file."""
    try:
        document = parse_json(read_bounded(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="download it again", code="model-damaged") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path} is not a JSON object", hint="download it again", code="model-damaged")
    return document


# ------------------------------------------------------------------------------------------------------------ reading


def _spec(config: Mapping[str, Any], *, frozen: bool) -> ModelSpec:
    """Return the architecture that a `config.json` describes.

    Raises:
        ValueError: a setting that our network cannot follow.
    """
    backbone = config.get("backbone_config") or {}
    _check_fixed(config, _FIXED, "")
    _check_fixed(backbone, _FIXED_BACKBONE, "backbone_config.")
    if config.get("decoder_attention_heads", 8) != config.get("encoder_attention_heads", 8):
        raise ValueError("encoder and decoder have different numbers of attention heads")
    points = int(config.get("decoder_n_points", 4))
    fields: dict[str, Any] = {ours: config.get(theirs, assumed) for theirs, (ours, assumed) in _FIELDS.items()}
    return ModelSpec(
        **fields,
        **_backbone_fields(backbone),
        freeze_norm=frozen,
        freeze_at=0 if frozen else -1,
        eval_layers=fields["decoder_layers"],
        num_points=(points, points, points),
    )


def _check_fixed(settings: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str) -> None:
    for name, only in fixed.items():
        value = settings.get(name, only)
        if value is not None and value != only:
            raise ValueError(f"{prefix}{name} is {value!r}, and only {only!r} is supported")


def _backbone_fields(backbone: Mapping[str, Any]) -> dict[str, Any]:
    if backbone.get("model_type") == "hgnet_v2":
        width = 64 * int(backbone["stage_out_channels"][-1]) // 2048
        for name in SIZES:
            wanted = _hgnet_config(ModelSpec(backbone=name, width=width))
            if all(backbone.get(key, value) == value for key, value in wanted.items() if key.startswith("st")):
                return {"backbone": name, "width": width}
        raise ValueError("backbone_config has the sizes of no published HGNetv2")
    if backbone.get("model_type", "rt_detr_resnet") != "rt_detr_resnet":
        raise ValueError(f"the backbone {backbone['model_type']} is not supported")
    sizes = {**_ASSUMED_RESNET, **{k: v for k, v in backbone.items() if k in _ASSUMED_RESNET}}
    depth = resnet_depth(sizes["depths"], bottleneck=sizes["layer_type"] == "bottleneck")
    return {"depth": depth, "width": sizes["embedding_size"]}


def _class_names(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    labels = config.get("id2label") or {}
    names = tuple(str(labels.get(str(i), f"class {i}")) for i in range(classes))
    if classes == len(COCO_NAMES) and sum(a == b for a, b in zip(names, COCO_NAMES, strict=True)) > classes // 2:
        return COCO_NAMES  # the published folders say `sofa`, `aeroplane`... for a few classes
    if len(set(names)) < classes:
        names = tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names))
    return names


def _image_size(path: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return height and width of the input.

    Raises:
        ValueError: the images are to be prepared in another way than ours.
    """
    document = _read_json(path)
    if document is None:
        side = config.get("anchor_image_size") or (640, 640)
        return int(side[0]), int(side[1])
    _check_fixed(document, _FIXED_IMAGES, f"{PREPROCESSOR}: ")
    if abs(float(document.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-6:
        raise ValueError(f"{PREPROCESSOR}: rescale_factor is {document['rescale_factor']}, not 1/255")
    size = document.get("size") or {"height": 640, "width": 640}
    return int(size["height"]), int(size["width"])


def _with_our_facts(header: ModelHeader, state: Mapping[str, Tensor], path: Path) -> ModelHeader:
    """Return the header with what `rtdetr.json` adds, where it is about these tensors."""
    document = _read_json(path)
    if document is None:
        return header
    ours = ModelHeader.from_json(json.dumps(document), source=str(path))
    if ours.identity != tensors_identity(state) or ours.names != header.names:
        return header
    extra = {name: value for name, value in ours.extra.items() if name not in ("gate", "v1")}
    return replace(ours, imgsz=header.imgsz, sampling=header.sampling, queries=header.queries, extra=extra)


# ------------------------------------------------------------------------------------------------------------ writing


def _refuse_unsupported(spec: ModelSpec, header: ModelHeader, *, v1: bool) -> None:
    problems = []
    if spec.decoder != "rtdetrv2":
        problems.append("the decoder of DEIM")
    if len(set(spec.num_points)) > 1:
        problems.append(f"sampling points that differ by scale ({', '.join(map(str, spec.num_points))})")
    if round(3 * spec.depth_mult) != 3:
        problems.append(f"fusion blocks of {round(3 * spec.depth_mult)} layers instead of 3")
    if header.layers < 2:
        problems.append("a decoder of a single layer")
    if header.sampling == "discrete" and (v1 or header.rounding != "published"):
        problems.append(f"discrete sampling {'in RT-DETR v1' if v1 else f'with {header.rounding} rounding'}")
    if header.sampling == "discrete" and header.imgsz[0] != header.imgsz[1]:
        problems.append("discrete sampling of inputs that are no square")
    if problems:
        raise ModelError(
            f"transformers has no RT-DETR with {' and '.join(problems)}",
            hint="--to official or --to safetensors, or rtdetr export --onnx",
            code="layout",
        )


def _config(spec: ModelSpec, header: ModelHeader, *, v1: bool) -> dict[str, Any]:
    values = spec.model_dump(mode="json")
    labels = {str(i): name for i, name in enumerate(header.names)}
    backbone = _resnet_config(spec) if spec.backbone == "resnet" else _hgnet_config(spec)
    config: dict[str, Any] = {
        "architectures": ["RTDetrForObjectDetection" if v1 else "RTDetrV2ForObjectDetection"],
        "model_type": "rt_detr" if v1 else "rt_detr_v2",
        "backbone_config": backbone,
        "freeze_backbone_batch_norms": spec.freeze_norm,
        **{theirs: values[ours] for theirs, (ours, _) in _FIELDS.items()},
        "decoder_attention_heads": spec.heads,
        "encoder_in_channels": backbone["hidden_sizes"][1:],
        "decoder_in_channels": [spec.hidden_dim] * 3,
        "decoder_n_points": spec.num_points[0],
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
        "dtype": "float32",
        **_FIXED,
    }
    if v1:
        del config["decoder_offset_scale"]
    else:
        config["decoder_method"] = "discrete" if header.sampling == "discrete" else "default"
    return config


def _resnet_config(spec: ModelSpec) -> dict[str, Any]:
    bottleneck = spec.depth >= 50
    return {
        "model_type": "rt_detr_resnet",
        "embedding_size": spec.width,
        "hidden_sizes": [spec.width * 2**i * (4 if bottleneck else 1) for i in range(4)],
        "depths": list(BLOCKS[spec.depth]),
        "layer_type": "bottleneck" if bottleneck else "basic",
        "out_features": ["stage2", "stage3", "stage4"],
        "out_indices": [2, 3, 4],
    }


def _hgnet_config(spec: ModelSpec) -> dict[str, Any]:
    assert spec.backbone != "resnet"
    sizes = scaled_sizes(spec.backbone, spec.width)
    return {
        "model_type": "hgnet_v2",
        "stem_channels": [3, *sizes.stem],
        "stage_in_channels": list(sizes.in_channels),
        "stage_mid_channels": list(sizes.channels),
        "stage_out_channels": list(sizes.out_channels),
        "stage_num_blocks": list(sizes.blocks),
        "stage_downsample": [False, True, True, True],
        "stage_light_block": list(LIGHT),
        "stage_kernel_size": [5 if light else 3 for light in LIGHT],
        "stage_numb_of_layers": [LAYERS] * 4,
        "use_learnable_affine_block": False,
        "hidden_sizes": list(sizes.out_channels),
        "depths": list(sizes.blocks),
        "out_features": ["stage2", "stage3", "stage4"],
        "out_indices": [2, 3, 4],
    }


def _layer_of(name: str) -> int:
    """Return the decoder layer that a tensor belongs to, or -1."""
    found = re.match(r"decoder\.(?:decoder\.layers|dec_score_head|dec_bbox_head)\.(\d+)\.", name)
    return int(found[1]) if found else -1
