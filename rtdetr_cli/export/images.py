"""Choose the images to verify an export on, and those to calibrate INT8 on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtdetr_cli.datasets.records import Dataset, image_paths
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.evaluate.source import choose_split, training_data
from rtdetr_cli.infer.sources import find_sources
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import ModelHeader

CALIBRATION_HINT = "--calibration DATA (its train split is used) or a folder of images"
VERIFY_HINT = "--verify DATA or a folder of images; or --no-gate to skip verification"


def verification_images(
    verify: Path | None, model: Path, header: ModelHeader | None, *, split: str = "val", hint: str = VERIFY_HINT
) -> tuple[Dataset | Sequence[Path], Sequence[str]]:
    """Return a split with labels, or images without, and notes on how it was chosen.

    Args:
        verify: a dataset or a folder of images; None for the dataset that the model was trained with.
        model: path of the model file.
        header: the model's; None for a file that has none.
        split: of the dataset.
        hint: of the error where there are no images: which flags name them.

    Raises:
        UsageError: there are no images.
        DataError: the dataset cannot be read.
    """
    try:
        chosen = choose_split(verify, split=split, model=model, header=header)
        return chosen.dataset, chosen.notes
    except UsageError as error:
        if error.code != "data-missing":
            raise
        raise _no_images(f"{model.name} does not record what it was trained on", "verify", hint) from None
    except DataError as error:
        if verify is None:
            raise DataError(error.message, hint=hint, code=error.code) from None
        if error.code == "empty-split":
            raise _no_images(error.message, "verify", hint) from None
        if error.code != "format-unknown" or not verify.is_dir():
            raise
    images = images_in(verify, "verify", hint)
    return images, [f"verify {verify}: {counted(len(images), 'image')} without labels, so AP is not compared"]


def calibration_images(
    calibration: Path | None,
    verify: Path | None,
    model: Path,
    header: ModelHeader | None,
    verified: Dataset | Sequence[Path] | None,
) -> tuple[list[Path], Sequence[str]]:
    """Return the images to calibrate INT8 on, and notes on how they were chosen.

    Args:
        calibration: a dataset, of which the train split is used, or a folder of images; None for the dataset that the
            model was trained with, or else `verify`.
        verify: the dataset or folder to verify on.
        model: path of the model file.
        header: the model's; None for a file that has none.
        verified: the images to verify on, which are never calibrated on.

    Raises:
        UsageError: no images are left.
        DataError: the dataset cannot be read.
    """
    source, calibrating = calibration, ("calibrate INT8", CALIBRATION_HINT)
    if source is None and training_data(model, header) is None:
        source = verify
    try:
        chosen = choose_split(source, split="train", model=model, header=header)
        images, notes = image_paths(chosen.dataset), chosen.notes
    except (UsageError, DataError) as error:
        if source is None or not source.is_dir() or error.code != "format-unknown":
            raise _no_images(error.message, *calibrating) from None
        images, notes = images_in(source, *calibrating), ()
    if verified is not None:
        excluded = {path.resolve() for path in image_paths(verified)}
        images = [path for path in images if path.resolve() not in excluded]
    if not images:
        raise _no_images(f"all images of {source} are used to verify the export", *calibrating)
    return images, notes


def images_in(folder: Path, purpose: str, hint: str) -> list[Path]:
    """Return the images in a folder and in those below it; raise UsageError where there are none."""
    try:
        sources = find_sources([str(folder)])
    except DataError:
        raise _no_images(f"the folder {folder} has no images", purpose, hint) from None
    images = [source.path for source in sources if not source.video]
    if not images:
        videos = counted(len(sources), "video")
        raise _no_images(f"the folder {folder} has {videos} and no images", purpose, hint)
    return images


def _no_images(reason: str, purpose: str, hint: str) -> UsageError:
    return UsageError(f"there are no images to {purpose} on: {reason}", hint=hint, code="no-images")
