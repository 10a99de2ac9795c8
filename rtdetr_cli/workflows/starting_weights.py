"""The weights that training starts from (published, a model file, a backbone), and the settings that they imply."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtdetr_cli.config.presets import load_preset, preset_names
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.config.schema import ModelSpec, Preset
from rtdetr_cli.config.settings import PUBLISHED_WEIGHTS
from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.runs import RunFolder
from rtdetr_cli.weights.architecture import size_differences
from rtdetr_cli.weights.download import ShowProgress
from rtdetr_cli.weights.header import TRANSFORMERS_TENSORS, ModelHeader, own_header
from rtdetr_cli.weights.hub import fetch
from rtdetr_cli.weights.load import load_model, published_sampling
from rtdetr_cli.weights.published import read_published
from rtdetr_cli.weights.transfer import TransferTable, load_backbone, transfer_weights
from rtdetr_cli.weights.transformers_files import is_transformers_folder


def weights_file(word: str) -> Path:
    """Return the file that `--weights` names; a run folder stands for its best model."""
    path = Path(word)
    if not path.is_dir():
        return path
    return path / TRANSFORMERS_TENSORS if is_transformers_folder(path) else RunFolder(path).best


def settings_from_weights(weights: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the file that `--weights` names and the settings that it implies: preset, input size, and its own sizes.

    None where it is not a detector's file, or is missing, which is an error later on.

    Raises:
        ModelError: the file cannot be read.
    """
    path = weights_file(weights)
    if not path.is_file():
        return None
    size: tuple[int, int] | None = None
    settings: dict[str, Any] = {}
    header = own_header(path)
    if header is not None:
        spec, name, size = header_spec(header.architecture), header.preset, header.imgsz
        if header.sampling == "discrete":
            settings = {"sampling": header.sampling, "rounding": header.rounding}
    else:
        file = read_published(path)
        spec, name = file.spec, ""
        if file.header is not None:
            size = file.header.imgsz
        if published_sampling(path, file) == "discrete":
            settings = {"sampling": "discrete"}
    if spec is None:
        return None
    preset = nearest_preset(spec, name)
    settings["preset"] = preset.name
    if size is not None and size != preset.imgsz:
        settings["imgsz"] = size
    preset_sizes = preset.model.model_dump()
    for key, value in spec.model_dump().items():
        # Freezing is decided by the preset and `--freeze`: a run from random weights froze nothing.
        if key not in ("freeze_at", "freeze_norm") and value != preset_sizes[key]:
            settings[f"model.{key}"] = value
    return path, settings


def nearest_preset(spec: ModelSpec, name: str = "") -> Preset:
    """Return the preset of that name, or else the one with the most similar sizes."""
    presets = [load_preset(known) for known in preset_names()]

    def distance(preset: Preset) -> tuple[bool, bool, int]:
        other_backbone = (preset.model.backbone, preset.model.depth) != (spec.backbone, spec.depth)
        return preset.name != name, other_backbone, len(size_differences(preset.model, spec))

    return min(presets, key=distance)


def header_spec(architecture: Mapping[str, Any]) -> ModelSpec | None:
    """Return the sizes in a header; None where they cannot be read, which is an error when the file is loaded."""
    known = {key: value for key, value in architecture.items() if key in ModelSpec.model_fields}
    try:
        return ModelSpec(**known) if "depth" in known else None
    except ValueError:
        return None


def load_starting_weights(
    model: RTDETR, config: RunConfig, train_set: Dataset, *, fetching: ShowProgress | None = None
) -> tuple[TransferTable, str]:
    """Fill an initialized model from `--weights`, matching the classes of the training set by name.

    Returns:
        Which tensors came from where, and the start in words.

    Raises:
        ModelError: the weights cannot be fetched or read, or do not fit.
    """
    weights, preset = config.settings.weights, config.preset
    if weights in PUBLISHED_WEIGHTS:
        file = getattr(preset, PUBLISHED_WEIGHTS[weights])
        assert file is not None  # `refuse_early` has checked
        try:
            path = fetch(file, progress=fetching)
        except ModelError as error:
            error.hint += "; or train without pretrained weights: --weights none"
            raise
        if weights == "imagenet":
            return load_backbone(model, path), f"ImageNet backbone {path.name}"
    else:
        path = weights_file(weights)
        if path.is_file() and own_header(path) is None and read_published(path).spec is None:
            return load_backbone(model, path), f"backbone {path.name}"
    source, header = load_model(path)
    _refuse_other_sizes(path, header, preset)
    transfer = transfer_weights(
        model, source.state_dict(), source_names=header.names, target_names=train_set.names, source=str(path)
    )
    return transfer, path.name


def _refuse_other_sizes(path: Path, header: ModelHeader, requested: Preset) -> None:
    """Refuse weights of another architecture than the requested preset's, and say which one."""
    spec = ModelSpec(**header.architecture)
    differences = size_differences(requested.model, spec)
    if not differences:
        return
    nearest = nearest_preset(spec, header.preset)
    hint = "leave out --preset and --set model.*: they are then taken from the file"
    if nearest.name != requested.name:
        message = f"{path} has the weights of preset {nearest.name}, not of {requested.name}"
        if not size_differences(nearest.model, spec):
            hint = f"--preset {nearest.name}, or {hint}"
    else:
        sizes = ", ".join(f"{key} {theirs}, not {ours}" for key, (ours, theirs) in list(differences.items())[:3])
        message = f"{path} has weights of other sizes: {sizes}"
    raise ModelError(message, hint=hint, code="model-misfit")
