"""The network: a training step, its losses, and a prediction, beside transformers and an earlier commit of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from rtdetr_cli.batches.loader import Batch
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.model.attention import Levels, sample_bilinear
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.cpu_sampling import sample_bilinear_cpu
from rtdetr_cli.model.decoder import Prediction
from rtdetr_cli.model.detector import RTDETR, Outputs
from rtdetr_cli.train.losses import compute_losses
from rtdetr_cli.train.plan import make_plan
from rtdetr_cli.train.precision import choose_precision
from rtdetr_cli.train.step import accumulate_gradients, draw_group, to_input
from rtdetr_cli.workflows.prepare import compiled, make_learner
from tests.bench.speed.harness import ROOT, Comparison, Settings, Turn, Used, checkout

CLASSES, BOXES = 80, 8
EARLIER = "ffe60e9"  # a commit of before the work on speed


def make_batch(count: int, side: int, *, boxes: int = BOXES, classes: int = CLASSES) -> Batch:
    """Return images of noise with `boxes` boxes each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    corners = tuple(torch.rand((boxes, 4), generator=generator) * 0.3 + 0.2 for _ in range(count))
    labels = tuple(torch.randint(0, classes, (boxes,), generator=generator) for _ in range(count))
    return Batch(images, corners, labels, tuple(range(count)), ())


def our_step(
    batch: Batch,
    *,
    preset: str,
    classes: int,
    device: torch.device,
    autocast: torch.dtype | None,
    prepare: Callable[[RTDETR], None] | None = None,
) -> Turn:
    """Return one step of ours: from uint8 images to changed weights, and to the moving average.

    `prepare` changes the model before the first step.
    """
    side = batch.images.shape[-1]
    config = resolve_run({"preset": preset, "imgsz": (side, side), "effective_batch": len(batch.labels)})
    plan = make_plan(config, images=1000)
    spec = config.preset.model
    torch.manual_seed(0)
    model = build_detector(spec, num_classes=classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = make_learner(model, config, spec, plan, device, autocast)
    learner.train_mode()
    if prepare is not None:
        prepare(learner.model)
    count = 0

    def step() -> None:
        nonlocal count
        group = draw_group(learner, batch, step=count, seed=0)
        _, terms = accumulate_gradients(
            learner,
            batch,
            rows=[slice(0, len(batch.labels))],
            size=(side, side),
            group=group,
            num_boxes=float(sum(map(len, batch.labels))),
        )
        learner.optimizer.step(terms.sum())
        learner.average.update(plan.ema_weight(count + 1))
        learner.optimizer.zero_grad()
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def peer_model(device: torch.device, *, decoder_layers: int = 3) -> Any:
    """Return the detector of transformers with the sizes of r18 and random weights."""
    import transformers

    backbone = transformers.RTDetrResNetConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[64, 128, 256, 512],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=decoder_layers,
        num_labels=CLASSES,
        num_denoising=100,
        freeze_backbone_batch_norms=False,
    )
    torch.manual_seed(0)
    return transformers.RTDetrV2ForObjectDetection(config).to(device)


def their_step(batch: Batch, device: torch.device) -> Turn:
    """Return one step of transformers: float32, its default, with fused AdamW and the same clipping; no average."""
    model = peer_model(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets = [
        {"class_labels": labels.to(device), "boxes": boxes.to(device)}
        for labels, boxes in zip(batch.labels, batch.boxes_cxcywh, strict=True)
    ]
    size = (int(batch.images.shape[-2]), int(batch.images.shape[-1]))

    def step() -> None:
        model(pixel_values=to_input(batch.images.to(device), size), labels=targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


@contextmanager
def step_sides(settings: Settings, *, own_precision: bool) -> Iterator[tuple[Turn, Turn]]:
    """Give a step of r18, in float32 or in the type that `--precision auto` takes here, and that of transformers."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    batch = make_batch(settings.batch, settings.imgsz)
    autocast = choose_precision("auto", device).dtype if own_precision else None
    yield (
        our_step(batch, preset="r18", classes=CLASSES, device=device, autocast=autocast),
        their_step(batch, device),
    )


@contextmanager
def loss_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give matching and loss with gradients, for 16 images of 60 boxes and six decoder layers."""
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    torch.set_num_threads(settings.threads)
    layers, images, queries = 6, 16, 300
    batch = make_batch(images, 8, boxes=60)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(layers + 1, images, queries, CLASSES, generator=generator).requires_grad_()
    boxes = (torch.rand(layers + 1, images, queries, 4, generator=generator) * 0.3 + 0.2).requires_grad_()
    config = peer_model(torch.device("cpu"), decoder_layers=layers).config
    targets = [
        {"class_labels": labels, "boxes": corners}
        for labels, corners in zip(batch.labels, batch.boxes_cxcywh, strict=True)
    ]

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, [logits, boxes])

    def ours() -> None:
        predictions = [Prediction(logits[i], boxes[i]) for i in range(layers + 1)]
        outputs = Outputs(main=predictions[-1], aux=tuple(predictions[1:-1]), encoder=predictions[0])
        terms = compute_losses(outputs, batch.boxes_cxcywh, batch.labels, num_boxes=float(images * 60))
        backward(torch.stack(list(terms.values())).sum())

    def theirs() -> None:
        loss, _, _ = RTDetrForObjectDetectionLoss(
            logits[-1],
            targets,
            torch.device("cpu"),
            boxes[-1],
            config,
            outputs_class=logits[1:].transpose(0, 1),
            outputs_coord=boxes[1:].transpose(0, 1),
            enc_topk_logits=logits[0],
            enc_topk_bboxes=boxes[0],
        )
        backward(loss)

    yield ours, theirs


@contextmanager
def sampling_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give the sampling of a decoder layer of r18 with its gradients, by our rows and by `grid_sample`, on the CPU."""
    torch.set_num_threads(settings.threads)
    points = (4, 4, 4)
    levels = Levels.from_shapes([(settings.imgsz // s,) * 2 for s in (8, 16, 32)], points, torch.device("cpu"))
    generator, tokens = torch.Generator().manual_seed(0), sum(h * w for h, w in levels.shapes)
    value = torch.randn(settings.batch, tokens, 8, 32, generator=generator).requires_grad_()
    centers = torch.rand(settings.batch, 500, 1, 1, 2, generator=generator)
    offsets = torch.randn(settings.batch, 500, 8, sum(points), 2, generator=generator) * 0.05
    locations = (centers + offsets).requires_grad_()
    weights = torch.rand(locations.shape[:-1], generator=generator).softmax(-1).requires_grad_()

    def turn(sample: Callable[..., Tensor]) -> None:
        torch.autograd.grad(sample(value, locations, weights, levels).sum(), [value, locations, weights])

    yield partial(turn, sample_bilinear_cpu), partial(turn, partial(sample_bilinear, num_points=points))


def our_prediction(device: torch.device) -> Turn:
    """Return a forward pass of r18 on one image of 640 px, with norms folded."""
    spec = resolve_run({"preset": "r18"}).preset.model
    model = build_detector(spec, num_classes=CLASSES).eval().fuse()
    return prediction(model.to(device, memory_format=torch.channels_last), device)  # type: ignore[call-overload]


def prediction(model: Callable[[Tensor], Any], device: torch.device) -> Turn:
    """Return a forward pass on one image of 640 px."""
    image = to_input(make_batch(1, 640).images.to(device), (640, 640))

    def predict() -> None:
        with torch.inference_mode():
            model(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return predict


@contextmanager
def prediction_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give a forward pass on one image of 640 px, as each is used to predict: ours with its norms folded."""
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    yield our_prediction(device), prediction(peer_model(device).eval(), device)


@contextmanager
def limit_sides(
    settings: Settings, *, make: Callable[[], Turn], dtype: torch.dtype | None = torch.float32
) -> Iterator[tuple[Turn, Turn]]:
    """Give a turn of ours, and as many operations in the convolution that torch computes fastest.

    The operations are the multiplications and additions of matrix products and convolutions. None as `dtype` is that of
    `--precision auto`.
    """
    torch.set_num_threads(settings.threads)
    ours = make()
    with FlopCounterMode(display=False) as counter:
        ours()
    dtype = dtype or choose_precision("auto", torch.device("cpu")).dtype or torch.float32
    channels, side, kernel = 256, 40, 3
    x = torch.rand(1, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, kernel, kernel, dtype=dtype).to(memory_format=torch.channels_last)
    times = counter.get_total_flops() / (2 * channels**2 * side**2 * kernel**2)

    @torch.inference_mode()
    def convolutions() -> None:
        for _ in range(round(times)):
            functional.conv2d(x, weight, padding=kernel // 2)

    yield ours, convolutions


@contextmanager
def tiny_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give a step of `tiny` at 192 px, batch 16, in the default precision, and that of an earlier commit of ours."""
    with (
        checkout(EARLIER) as tree,
        closing(StepServer(ROOT, _MAKE.format("tiny_step"), settings.threads)) as here,
        closing(StepServer(tree, EARLIER_STEP, settings.threads)) as there,
    ):
        yield here, there


@contextmanager
def compile_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give a step of r18 with `--compile`, whose first turn compiles, and without."""
    with (
        closing(StepServer(ROOT, _MAKE.format("compiled_step"), settings.threads)) as here,
        closing(StepServer(ROOT, _MAKE.format("default_step"), settings.threads)) as there,
    ):
        yield here, there


@contextmanager
def threads_sides(settings: Settings) -> Iterator[tuple[Turn, Turn]]:
    """Give a step of r18 with several threads, and with one."""
    with (
        closing(StepServer(ROOT, _MAKE.format("default_step"), settings.threads)) as here,
        closing(StepServer(ROOT, _MAKE.format("default_step"), 1)) as there,
    ):
        yield here, there


def tiny_step() -> Turn:
    """Return a step of `tiny`, in the precision that is chosen on this machine."""
    device = torch.device("cpu")
    autocast = choose_precision("auto", device).dtype
    return our_step(make_batch(16, 192), preset="tiny", classes=CLASSES, device=device, autocast=autocast)


def r18_step(autocast: torch.dtype | None = None, prepare: Callable[[RTDETR], None] | None = None) -> Turn:
    """Return a step of r18 at 320 px, batch 4."""
    batch, device = make_batch(4, 320), torch.device("cpu")
    return our_step(batch, preset="r18", classes=CLASSES, device=device, autocast=autocast, prepare=prepare)


def default_step(prepare: Callable[[RTDETR], None] | None = None) -> Turn:
    """Return the same in the precision that is chosen on this machine."""
    return r18_step(choose_precision("auto", torch.device("cpu")).dtype, prepare)


def compiled_step() -> Turn:
    """Return the same with `--compile`."""

    def compile_parts(model: RTDETR) -> None:
        with compiled(model, wanted=True):
            pass

    return default_step(compile_parts)


_MAKE = "from tests.bench.speed.steps import {} as make"
EARLIER_STEP = f"""
from rtdetr_cli.config.run import resolve_run
from rtdetr_cli.data.loader import Batch
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.train.loop import accumulate, step_denoising
from rtdetr_cli.train.plan import make_plan
from rtdetr_cli.train.precision import choose_precision
from rtdetr_cli.workflows.prepare import make_learner

def make():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 192, 192), dtype=torch.uint8, generator=random)
    boxes = tuple(torch.rand(({BOXES}, 4), generator=random) * 0.3 + 0.2 for _ in range(16))
    labels = tuple(torch.randint(0, {CLASSES}, ({BOXES},), generator=random) for _ in range(16))
    batch = Batch(images, boxes, labels, tuple(range(16)), ())
    config = resolve_run({{"preset": "tiny", "imgsz": (192, 192), "effective_batch": 16}})
    plan, spec = make_plan(config, pictures=1000), config.preset.model
    cpu = torch.device("cpu")
    model = build_detector(spec, num_classes={CLASSES}).to(memory_format=torch.channels_last)
    learner = make_learner(model, config, spec, plan, cpu, choose_precision("auto", cpu).dtype)
    learner.train_mode()

    def step():
        group = step_denoising(learner, batch, step=0, seed=0)
        rows, count = [slice(0, 16)], float({BOXES} * 16)
        terms = accumulate(learner, batch, rows=rows, size=(192, 192), group=group, num_boxes=count)[1]
        learner.stepper.step(terms.sum())
        learner.average.update(0.5)
        learner.stepper.zero_grad()

    return step
"""

_SERVE = """
import sys, torch
torch.set_num_threads({threads})
{code}
step = make()
for _ in sys.stdin:
    step()
    print("done", flush=True)
"""


class StepServer:
    """Steps in a process with another copy of the package; each turn is one step."""

    def __init__(self, tree: Path, code: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVE.format(threads=threads, code=code)],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.times = psutil.Process(self.process.pid).cpu_times

    def __call__(self) -> Used | None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        before, began = self.times(), time.perf_counter()
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", "the process has ended; its error is above"
        after = self.times()
        return Used(time.perf_counter() - began, after.user + after.system - before.user - before.system)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


COMPARISONS = (
    Comparison(
        name="step",
        title="training step of r18, float32",
        peer="transformers, float32",
        aim=1.2,
        sides=partial(step_sides, own_precision=False),
    ),
    Comparison(
        name="step-default",
        title="training step of r18, default precision",
        peer="transformers, its default (float32)",
        aim=2.1,
        sides=partial(step_sides, own_precision=True),
    ),
    Comparison(
        name="step-tiny",
        title="training step of tiny, 192 px, batch 16, default precision",
        peer=f"our commit {EARLIER}",
        aim=1.25,
        sides=tiny_sides,
        rounds=15,
    ),
    Comparison(
        name="loss",
        title="matching and loss of 16 images with 60 boxes, 6 layers",
        peer="transformers",
        aim=4.0,
        sides=loss_sides,
    ),
    Comparison(
        name="sampling",
        title="bilinear sampling of a decoder layer of r18 and its gradients, on a CPU",
        peer="`grid_sample`",
        aim=2.0,
        sides=sampling_sides,
        rounds=15,
    ),
    Comparison(
        name="predict-torch",
        title="prediction of r18 at 640, one image, float32",
        peer="transformers",
        aim=1.25,
        sides=prediction_sides,
        rounds=15,
    ),
    Comparison(
        name="compile",
        title="training step of r18, 320 px, batch 4, default precision, with `--compile`",
        peer="without; the lowest ratio is the first step, which compiles",
        aim=1.0,
        sides=compile_sides,
        rounds=15,
        warmup=0,
        slow=True,
    ),
    Comparison(
        name="threads",
        title="training step of r18, 320 px, batch 4, default precision, with two threads",
        peer="one thread",
        aim=1.3,
        sides=threads_sides,
        rounds=7,
    ),
    Comparison(
        name="limit-predict",
        title="prediction of r18 at 640, one image, float32",
        peer="as many operations in convolutions only",
        aim=0.8,
        sides=partial(limit_sides, make=partial(our_prediction, torch.device("cpu"))),
        rounds=5,
    ),
    Comparison(
        name="limit-step",
        title="training step of r18, 320 px, batch 4, float32",
        peer="as many operations in convolutions only",
        aim=0.7,
        sides=partial(limit_sides, make=r18_step),
        rounds=5,
    ),
    Comparison(
        name="limit-tiny",
        title="training step of tiny, 192 px, batch 16, default precision",
        peer="as many operations in convolutions only",
        aim=0.5,
        sides=partial(limit_sides, make=tiny_step, dtype=None),
        rounds=5,
    ),
)
