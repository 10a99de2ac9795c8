"""Choose the images to verify an export on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.errors import DataError, UsageError
from rtdetr_cli.evaluate.source import choose_split
from rtdetr_cli.infer.sources import find_sources
from rtdetr_cli.text import counted
from rtdetr_cli.weights.header import ModelHeader

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
    except UsageError as error:
        if error.code != "data-missing":
            raise
        raise _no_images(f"{model.name} does not record what it was trained on", hint) from None
    except DataError as error:
        if verify is None:
            raise DataError(error.message, hint=hint, code=error.code) from None
        if error.code == "empty-split":
            raise _no_images(error.message, hint) from None
        if error.code != "format-unknown" or not verify.is_dir():
            raise
    else:
        return chosen.dataset, chosen.notes
    try:
        sources = find_sources([str(verify)])
    except DataError:
        raise _no_images(f"the folder {verify} has no images", hint) from None
    images = [source.path for source in sources if not source.video]
    if not images:
        raise _no_images(f"the folder {verify} has {counted(len(sources), 'video')} and no images", hint)
    return images, [f"verify {verify}: {counted(len(images), 'image')} without labels, so AP is not compared"]


def _no_images(reason: str, hint: str) -> UsageError:
    return UsageError(f"there are no images to verify on: {reason}", hint=hint, code="no-images")
