"""Before a run: check every image file, where that is cheap compared with the run itself.

The checks of annotations cost nothing and always run, in `load_splits`. A truncated image, a rotated one or a copy in
val can be found by decoding only, which may cost as much as an epoch on a GPU. So decoding and a forward pass are
timed on a few images, and all images are checked if that takes less than a tenth of an epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import refuse_errors
from rtdetr_cli.datasets.records import Dataset, Finding
from rtdetr_cli.images.decode import ImageError, read_image
from rtdetr_cli.model.detector import RTDETR

MAX_SHARE_OF_EPOCH = 0.1
SAMPLES = 8
STEP_PER_FORWARD = 3.0  # a backward pass costs about twice a forward pass


def check_images_if_cheap(
    source: Path,
    train_set: Dataset,
    model: RTDETR,
    *,
    images: Path | None,
    imgsz: tuple[int, int],
    device: torch.device,
    seconds_of: Callable[[Callable[[], None]], float] | None = None,
) -> tuple[Finding, ...] | None:
    """Check every image, if that costs less than a tenth of an epoch.

    Args:
        source: the dataset as the user named it.
        train_set: its training images.
        model: on `device`.
        images: folder of the images, where the annotations do not say it.
        imgsz: height and width of the network's input.
        device: of the training.
        seconds_of: measures a call; a clock by default.

    Returns:
        Every finding, or None where the check would have cost too much.

    Raises:
        DataError: a finding is an error.
    """
    clock = seconds_of or _seconds
    total = len(train_set)
    samples = list(range(0, total, max(1, total // SAMPLES)))[:SAMPLES]

    def decode() -> None:
        for index in samples:
            try:
                read_image(train_set.path(index))
            except ImageError:  # the check will report it
                continue

    def forward() -> None:
        batch = torch.zeros(len(samples), 3, *imgsz, device=device).contiguous(memory_format=torch.channels_last)
        training = model.training
        model.eval()
        with torch.no_grad():
            model(batch)
        model.train(training)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    forward()  # the first one also loads kernels
    if clock(decode) > MAX_SHARE_OF_EPOCH * STEP_PER_FORWARD * clock(forward):
        return None
    report = examine(source, images=images, imgsz=imgsz, queries=model.queries)
    refuse_errors(report.raw)
    return tuple(report.findings)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
