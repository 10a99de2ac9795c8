"""Before a run: check every image file, where that is cheap compared with the run itself.

A truncated image, a rotated one or a copy in val is found by decoding only, which may cost as much as an epoch on a
GPU. So decoding and a forward pass are timed on a few images first.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from timeit import timeit

import torch

from rtdetr_cli.checks.doctor import examine
from rtdetr_cli.checks.load import refuse_errors
from rtdetr_cli.config.run import RunConfig
from rtdetr_cli.datasets.records import Dataset, Finding
from rtdetr_cli.images.decode import ImageError, read_image
from rtdetr_cli.model.detector import RTDETR

MAX_SHARE_OF_EPOCH = 0.1
SAMPLES = 8
STEP_PER_FORWARD = 3.0  # a backward pass costs about twice a forward pass


def check_images_if_cheap(
    config: RunConfig, train_set: Dataset, model: RTDETR, device: torch.device
) -> tuple[Finding, ...] | None:
    """Check every image of a run, if that costs less than a tenth of an epoch with `model`, which is on `device`.

    Returns:
        Every finding, or None where the check would have cost too much.

    Raises:
        DataError: a finding is an error.
    """
    total = len(train_set)
    samples = list(range(0, total, max(1, total // SAMPLES)))[:SAMPLES]

    def decode() -> None:
        for index in samples:
            with suppress(ImageError):  # the check will report it
                read_image(train_set.path(index))

    def forward() -> None:
        batch = torch.zeros(len(samples), 3, *config.imgsz, device=device).contiguous(memory_format=torch.channels_last)
        training = model.training
        model.eval()
        with torch.no_grad():
            model(batch)
        model.train(training)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    forward()  # the first one also loads kernels
    if timeit(decode, number=1) > MAX_SHARE_OF_EPOCH * STEP_PER_FORWARD * timeit(forward, number=1):
        return None
    source, images = Path(str(config.settings.data)), config.settings.images
    report = examine(source, images=Path(images) if images else None, imgsz=config.imgsz, queries=model.queries)
    refuse_errors(report.raw)
    return tuple(report.findings)
