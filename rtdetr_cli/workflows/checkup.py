"""Before a run: every image is decoded and judged, where that is cheap beside the run itself.

The checks of labels cost nothing and always run, in `load_splits`. A truncated image, a copy of it in val, or a
turned one is only seen by decoding, which on a GPU with a fast disk may cost as much as an epoch. So both are
measured on a few images, and the doctor looks at all of them if that takes less than a tenth of one epoch.
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

WORTH = 0.1
SAMPLED = 8
# A step is a forward pass, and a backward pass of about twice its cost.
STEP_PER_FORWARD = 3.0


def examine_if_cheap(
    source: Path,
    train_set: Dataset,
    model: RTDETR,
    *,
    images: Path | None,
    imgsz: tuple[int, int],
    device: torch.device,
    seconds_of: Callable[[Callable[[], None]], float] | None = None,
) -> tuple[Finding, ...] | None:
    """Have the doctor look at every image, if that costs under a tenth of an epoch.

    Args:
        source: the dataset as the user named it.
        train_set: its training images.
        model: on `device`.
        images: folder of the images, where the annotations do not say it.
        imgsz: height and width of the network's input.
        device: of the training.
        seconds_of: how long a call takes; a clock by default.

    Returns:
        Every finding, or None where the look was too costly.

    Raises:
        DataError: a finding is an error.
    """
    clock = seconds_of or _seconds
    total = len(train_set)
    some = list(range(0, total, max(1, total // SAMPLED)))[:SAMPLED]

    def decode() -> None:
        for index in some:
            try:
                read_image(train_set.path(index))
            except ImageError:  # the doctor will say it, with all others of its kind
                continue

    def step() -> None:
        batch = torch.zeros(len(some), 3, *imgsz, device=device).contiguous(memory_format=torch.channels_last)
        training = model.training
        model.eval()
        with torch.no_grad():
            model(batch)
        model.train(training)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # the first one also loads kernels
    if clock(decode) > WORTH * STEP_PER_FORWARD * clock(step):
        return None
    report = examine(source, images=images, imgsz=imgsz, queries=model.queries)
    refuse_errors(report.raw)
    return tuple(report.findings)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
