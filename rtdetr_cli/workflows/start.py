"""What a training starts from: published weights, a model file, a backbone; and what such a file asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.schema import ModelSpec, Preset
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.hub import Watch, fetch
from rtdetr_cli.weights.published import is_ours, load_model, read_header, read_published
from rtdetr_cli.weights.transfer import TransferTable, load_backbone, transfer_weights

WORDS = ("coco", "imagenet", "none")
# These give no tensor its shape, or may differ: `transfer_weights` makes other sampling points anew.
FREE = frozenset({
    "freeze_at", "freeze_norm", "num_points", "eval_layers", "queries", "denoising", "label_noise", "box_noise",
})  # fmt: skip


def weights_file(word: str) -> Path:
    """Return the file that `--weights` names: a run stands for its best model."""
    path = Path(word)
    return path / "best.safetensors" if path.is_dir() else path


def settings_of(weights: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the settings that a file of weights asks for: its preset, its input size, and where its sizes are others.

    Args:
        weights: of `--weights`.

    Returns:
        The file and its settings; None where it is no detector's file, or is missing, which is told elsewhere.

    Raises:
        ModelError: the file cannot be read.
    """
    path = weights_file(weights)
    if weights in WORDS or not path.is_file():
        return None
    size: tuple[int, int] | None = None
    values: dict[str, Any] = {}
    if is_ours(path):
        header = read_header(path)
        spec, named, size = _spec(header.architecture), header.preset, header.imgsz
        if header.sampling == "discrete":
            values = {"sampling": header.sampling, "rounding": header.rounding}
    else:
        spec, named = read_published(path).spec, ""
    if spec is None:
        return None
    preset = preset_like(spec, named)
    values["preset"] = preset.name
    if size is not None and size != preset.imgsz:
        values["imgsz"] = size
    own, theirs = preset.model.model_dump(), spec.model_dump()
    # What is frozen is the preset's and `--freeze`'s to say: a run from random weights had frozen nothing.
    for key in theirs:
        if key not in ("freeze_at", "freeze_norm") and theirs[key] != own[key]:
            values[f"model.{key}"] = theirs[key]
    return path, values


def preset_like(spec: ModelSpec, named: str = "") -> Preset:
    """Return the preset of that name, or else the one whose sizes are nearest."""
    presets = [load_preset(name) for name in preset_names()]
    for preset in presets:
        if preset.name == named:
            return preset
    return min(presets, key=lambda p: (p.model.depth != spec.depth, len(differences(p.model, spec))))


def differences(one: ModelSpec, other: ModelSpec) -> dict[str, tuple[Any, Any]]:
    """Return the sizes in which two architectures differ, but for those that weights need not share."""
    mine, theirs = one.model_dump(), other.model_dump()
    return {k: (mine[k], theirs[k]) for k in mine if k not in FREE and mine[k] != theirs[k]}


def load_start(
    model: RTDETR, config: RunConfig, train_set: Dataset, *, fetching: Watch | None = None
) -> tuple[TransferTable, str]:
    """Fill a model from `--weights`.

    Args:
        model: initialised.
        config: of the run.
        train_set: what it is trained on; its classes are matched by name.
        fetching: shows how far a download has come.

    Returns:
        What came from where, and the start in words.

    Raises:
        ModelError: the weights cannot be had, or do not fit.
    """
    weights, preset = config.settings.weights, config.preset
    if weights == "imagenet":
        assert preset.imagenet is not None
        path = _fetched(preset.imagenet, fetching)
        return load_backbone(model, path), f"ImageNet backbone {path.name}"
    if weights == "coco":
        assert preset.weights is not None
        path = _fetched(preset.weights, fetching)
    else:
        path = weights_file(weights)
        if path.is_file() and not is_ours(path) and read_published(path).spec is None:
            return load_backbone(model, path), f"backbone {path.name}"
    source, header = load_model(path)
    _refuse_other_sizes(path, header.architecture, header.preset, preset)
    table = transfer_weights(
        model, source.state_dict(), source_names=header.names, target_names=train_set.names, source=str(path)
    )
    return table, path.name


def _fetched(file: str, fetching: Watch | None) -> Path:
    try:
        return fetch(file, progress=fetching)
    except ModelError as error:
        hint = f"{error.hint}; --weights none trains without"
        raise ModelError(error.message, hint=hint, code=error.code) from error


def _refuse_other_sizes(path: Path, architecture: Mapping[str, Any], named: str, asked: Preset) -> None:
    """Refuse weights of another architecture, and say which one.

    Raises:
        ModelError: their sizes are not those of the preset as asked.
    """
    spec = _spec(architecture)
    found = {} if spec is None else differences(asked.model, spec)
    if spec is None or not found:
        return
    like = preset_like(spec, named)
    told = ", ".join(f"{key} {theirs} and not {mine}" for key, (mine, theirs) in list(found.items())[:3])
    if like.name != asked.name:
        message = f"{path} holds weights of preset {like.name}; {asked.name} was asked"
    else:
        message = f"{path} holds weights of other sizes than asked: {told}"
    exact = like.name != asked.name and not differences(like.model, spec)
    either = "leave out --preset and --set model.*, and the file says them"
    raise ModelError(message, hint=f"--preset {like.name}, or {either}" if exact else either, code="model-misfit")


def _spec(architecture: Mapping[str, Any]) -> ModelSpec | None:
    """Return the sizes in a header; None where they cannot be read, which loading the file tells."""
    known = {key: value for key, value in architecture.items() if key in ModelSpec.model_fields}
    try:
        return ModelSpec(**known) if "depth" in known else None
    except ValueError:
        return None
