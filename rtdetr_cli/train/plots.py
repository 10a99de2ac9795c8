"""The plots of a run: its training data, its curves, and its predictions.

Pure functions from arrays to a figure or an image; `save` writes either. Matplotlib is used without pyplot, which
keeps global state, may open windows and is not safe with threads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.files import atomic_write
from rtdetr_cli.images.decode import ImageError, read_image
from rtdetr_cli.images.draw import css_color, draw_boxes
from rtdetr_cli.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rtdetr_cli.evaluate.table import DetectionTable

LABELS, BATCH, CURVES, PREDICTIONS = "labels.png", "batch_00.jpg", "curves.png", "predictions.jpg"
TINY_PX = 8  # the stride of the finest feature map
MAX_CLASSES = 24
MAX_POINTS = 20_000
DPI = 110
INK, FAINT, BACKGROUND = "#1f2430", "#8a90a0", "#ffffff"
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#e07b16", "#2a9d5c", "#d1403f"
GAP_PX = 6
IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG"}
MIN_DETECTIONS = 10


# ---- labels -----------------------------------------------------------------------------------------------------


def labels_figure(dataset: Dataset, imgsz: tuple[int, int]) -> Figure:
    """Draw the annotations: boxes per class, their sizes at the network's input, and their positions.

    Args:
        dataset: the training images; crowd boxes are left out, as in training.
        imgsz: height and width of the network's input in pixels.
    """
    used = ~dataset.crowd
    labels = dataset.labels[used]
    boxes = resized_boxes(dataset, imgsz)[used]
    figure = _figure(12.6, 4.5)
    left, middle, right = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.15, 1, 1]})
    counts = np.bincount(labels, minlength=len(dataset.categories))
    _draw_counts(left, counts, dataset.names)
    _draw_sizes(middle, boxes, labels, imgsz)
    _draw_positions(right, boxes, imgsz)
    empty = int(np.count_nonzero(np.diff(np.append(0, np.cumsum(used))[dataset.offsets]) == 0))
    title = f"{dataset.name}, {dataset.split}: {counted(len(dataset), 'image')}, {counted(len(labels), 'box')}"
    if empty:
        title += f", {counted(empty, 'image')} without boxes"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=INK, parse_math=False)
    return figure


def resized_boxes(dataset: Dataset, imgsz: tuple[int, int]) -> NDArray[np.float64]:
    """Return all boxes, (M, 4) xyxy, in pixels of the network's input."""
    image = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    scale = np.array([imgsz[1], imgsz[0]]) / dataset.sizes_wh.astype(np.float64).reshape(-1, 2)
    return dataset.boxes_xyxy_px * np.tile(scale, 2)[image]


def _draw_counts(axes: Axes, counts: NDArray[np.int64], names: Sequence[str]) -> None:
    order = np.argsort(-counts, kind="stable")
    shown = order[:MAX_CLASSES]
    rows = np.arange(len(shown))
    axes.barh(rows, counts[shown], color=[css_color(int(label)) for label in shown], height=0.72)
    axes.set_yticks(rows, [_short(names[int(label)]) for label in shown], parse_math=False)
    axes.invert_yaxis()
    most = max(1, int(counts.max(initial=0)))
    for row, label in enumerate(shown):
        axes.text(counts[label] + most * 0.015, row, f"{counts[label]:,}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, most * 1.18)
    title = "boxes per class"
    if len(order) > len(shown):
        rest = int(counts[order[MAX_CLASSES:]].sum())
        title += f" ({len(shown)} of {len(order)} classes; the others have {rest:,})"
    _style_axes(axes, title, grid="x")


def _draw_sizes(axes: Axes, boxes: NDArray[np.float64], labels: NDArray[np.int64], imgsz: tuple[int, int]) -> None:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.5)
    # Rare classes are drawn last, on top. Evenly thinned out, so that the same data give the same image.
    shown = np.argsort(-np.bincount(labels, minlength=1)[labels], kind="stable")
    if len(shown) > MAX_POINTS:
        shown = shown[np.linspace(0, len(shown) - 1, MAX_POINTS).astype(np.int64)]
    alpha = float(np.clip(60 / math.sqrt(max(1, len(shown))), 0.08, 0.7))
    shades = [css_color(int(label)) for label in labels[shown]]
    axes.scatter(sides[shown, 0], sides[shown, 1], s=9, c=shades or None, alpha=alpha, linewidths=0, rasterized=True)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    low = 2.0 ** math.floor(math.log2(min(float(sides.min(initial=TINY_PX)), TINY_PX / 2)))
    axes.set_xlim(low, imgsz[1] * 1.12)
    axes.set_ylim(low, imgsz[0] * 1.12)
    axes.fill_between([low, TINY_PX], low, imgsz[0] * 1.12, color=RED, alpha=0.07, linewidth=0)
    axes.fill_between([TINY_PX, imgsz[1] * 1.12], low, TINY_PX, color=RED, alpha=0.07, linewidth=0)
    tiny = int(np.count_nonzero(sides.min(1) < TINY_PX)) if len(sides) else 0
    if tiny:
        text = f"{tiny:,} ({tiny / len(sides):.1%}) with a side under {TINY_PX} px"
        axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=8, color=RED)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("width, px", fontsize=8, color=INK)
    axes.set_ylabel("height, px", fontsize=8, color=INK)
    _style_axes(axes, f"box sizes at {imgsz[0]}x{imgsz[1]}", grid="both")


def _draw_positions(axes: Axes, boxes: NDArray[np.float64], imgsz: tuple[int, int]) -> None:
    height, width = imgsz
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    cells = int(np.clip(math.sqrt(max(1, len(boxes))) / 2, 8, 40))
    counts, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=(cells, cells), range=[[0, height], [0, width]])
    shown = axes.imshow(
        counts, cmap="YlGnBu", extent=(0, width, height, 0), aspect="equal", interpolation="nearest", vmin=0
    )
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    axes.set_xlabel("x, px", fontsize=8, color=INK)
    _style_axes(axes, "box centres per cell", grid="")


# ---- curves -----------------------------------------------------------------------------------------------------


def curves_figure(rows: Sequence[Mapping[str, float | None]], *, best_epoch: int = 0) -> Figure:
    """Draw the course of training: losses, AP and learning rate per epoch.

    Args:
        rows: of `metrics.csv`: `epoch` (from 1), `loss`, `lr`, `AP`, `AP50`, `AP75` and the loss terms; None where
            there is no value.
        best_epoch: from 1; 0 for none.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(12.6, 4.1)
    loss_axes, score_axes, rate_axes = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.15, 1.15, 0.8]})
    style: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(rows) <= 30 else {}
    _draw_losses(loss_axes, rows, style)
    _draw_scores(score_axes, rows, best_epoch, style)
    _draw_rate(rate_axes, rows, style)
    epochs = _column(rows, "epoch")
    for axes in (loss_axes, score_axes, rate_axes):
        axes.set_xlabel("epoch", fontsize=8, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(rows):
            axes.set_xlim(min(0.5, float(epochs.min()) - 0.5), float(epochs.max()) + 0.5)
    return figure


def _draw_losses(axes: Axes, rows: Sequence[Mapping[str, float | None]], style: Mapping[str, Any]) -> None:
    highest = 0.0
    for key, name, shade, line in (
        ("loss", "sum over all layers", INK, 1.9),
        ("loss_vfl", "classes, last layer", BLUE, 1.3),
        ("loss_bbox", "L1, last layer", ORANGE, 1.3),
        ("loss_giou", "GIoU, last layer", GREEN, 1.3),
    ):
        values = _column(rows, key)
        if np.isfinite(values).any():
            axes.plot(_column(rows, "epoch"), values, color=shade, linewidth=line, label=name, **style)
            highest = max(highest, float(np.nanmax(values)))
    if highest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leading_digit(value) in (2, 5) else "")
        axes.tick_params(which="minor", labelsize=8, labelcolor=INK)
    _style_axes(axes, "losses (log scale)", grid="both", legend=highest > 0)


def _draw_scores(
    axes: Axes, rows: Sequence[Mapping[str, float | None]], best_epoch: int, style: Mapping[str, Any]
) -> None:
    epochs, highest = _column(rows, "epoch"), 0.0
    for key, shade, line in (("AP50", BLUE, 1.4), ("AP75", GREEN, 1.1), ("AP", INK, 2.0)):
        values = _column(rows, key)
        known = np.isfinite(values)
        if known.any():
            axes.plot(epochs[known], values[known], color=shade, linewidth=line, label=key, **style)
            highest = max(highest, float(values[known].max()))
    scores = _column(rows, "AP")
    title = "AP on the val images"
    best = np.flatnonzero((epochs == best_epoch) & np.isfinite(scores))
    if len(best):
        score = float(scores[best[-1]])
        axes.axvline(best_epoch, color=RED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot([best_epoch], [score], marker="o", markersize=7, color="none", markeredgecolor=RED, zorder=5)
        title += f": best {score:.3f} at epoch {best_epoch}"
    axes.set_ylim(0, min(1.0, max(0.05, highest * 1.12)) if highest < 0.9 else 1.0)
    _style_axes(axes, title, grid="both", legend=highest > 0)


def _draw_rate(axes: Axes, rows: Sequence[Mapping[str, float | None]], style: Mapping[str, Any]) -> None:
    rates = _column(rows, "lr")
    if np.isfinite(rates).any():
        axes.plot(_column(rows, "epoch"), rates, color=BLUE, linewidth=1.5, **style)
        axes.set_ylim(0, float(np.nanmax(rates)) * 1.12 or 1)
        axes.yaxis.set_major_formatter(lambda value, _: format_rate(value))
    _style_axes(axes, "learning rate at the end of the epoch", grid="both")


def _column(rows: Sequence[Mapping[str, float | None]], key: str) -> NDArray[np.float64]:
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else float(value) for value in values], np.float64)


def _leading_digit(value: float) -> int:
    return round(value / 10 ** math.floor(math.log10(value))) if value > 0 else 0


def format_rate(value: float) -> str:
    """Return a learning rate as people write it: `8e-5`."""
    if not value or abs(value) >= 0.001:
        return f"{value:.3g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


# ---- images ---------------------------------------------------------------------------------------------------


def batch_image(
    images: NDArray[np.uint8],
    boxes_cxcywh: Sequence[NDArray[np.floating]],
    labels: Sequence[NDArray[np.integer]],
    names: Sequence[str],
    *,
    most: int = 16,
    side: int = 400,
) -> NDArray[np.uint8]:
    """Lay out a training batch, as the network gets it, with its annotations.

    Args:
        images: (B, 3, H, W) uint8 RGB.
        boxes_cxcywh: for each image (N, 4), 0 to 1.
        labels: for each image (N,) contiguous.
        names: class names in label order.
        most: number of images shown.
        side: longest side of each in pixels.
    """
    tiles = []
    for image, boxes, classes in list(zip(images, boxes_cxcywh, labels, strict=True))[:most]:
        tile = _fitted(np.ascontiguousarray(image.transpose(1, 2, 0)), side)
        height, width = tile.shape[:2]
        centre, size = np.split(np.asarray(boxes, np.float64).reshape(-1, 4), 2, axis=1)
        xyxy = np.concatenate([centre - size / 2, centre + size / 2], 1) * np.tile([width, height], 2)
        tiles.append(draw_boxes(tile, xyxy, classes, names))
    square = max(1, math.ceil(math.sqrt(len(tiles))))
    return _grid(tiles, columns=min((square, square + 1), key=lambda columns: -len(tiles) % columns))


def choose_images(dataset: Dataset, count: int) -> list[int]:
    """Choose images to show, evenly over the split; those without boxes only if there are too few others."""
    boxes = np.diff(dataset.offsets)
    filled, empty = np.flatnonzero(boxes > 0), np.flatnonzero(boxes == 0)
    chosen = filled[np.linspace(0, len(filled) - 1, min(count, len(filled))).round().astype(np.int64)]
    return sorted(int(i) for i in np.concatenate([chosen, empty[: count - len(chosen)]]))


def predictions_image(
    dataset: Dataset,
    table: DetectionTable,
    *,
    threshold: float,
    images: Sequence[int] | None = None,
    side: int = 460,
) -> NDArray[np.uint8]:
    """Lay out images with their annotations on the left and the detections on the right.

    The detections with the highest scores are drawn: twice as many as there are annotations, and at least ten.

    Args:
        dataset: the split.
        table: detections in it.
        threshold: minimum score.
        images: indices in the split; eight chosen evenly by default. Those that cannot be read are left out.
        side: longest side of an image in pixels.
    """
    tiles = []
    for index in choose_images(dataset, 8) if images is None else images:
        try:
            full = read_image(dataset.path(index), reduce_to=(side, side))
        except ImageError:
            continue
        image = _fitted(full, side)
        scale = image.shape[1] / int(dataset.sizes_wh[index][0])
        truth = dataset.annotations(index)
        detections = table.rows(np.flatnonzero((table.image_index == index) & (table.scores >= threshold)))
        # A model that has learned little gives hundreds, which would hide the image.
        limit = max(MIN_DETECTIONS, 2 * len(truth.labels))
        detections = detections.rows(np.argsort(-detections.scores, kind="stable")[:limit])
        pair = [
            draw_boxes(image, truth.boxes_xyxy_px * scale, truth.labels, dataset.names),
            draw_boxes(
                image, detections.boxes_xyxy_px * scale, detections.labels, dataset.names, scores=detections.scores
            ),
        ]
        tiles.append(_grid([_titled(pair[0], "annotations"), _titled(pair[1], "detections")], columns=2))
    return _grid(tiles, columns=2 if len(tiles) > 1 else 1, gap=3 * GAP_PX)


def _fitted(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image whose longest side is `side`; boxes are drawn afterwards, so that they stay legible."""
    smooth = Image.Resampling.BILINEAR if max(image.shape) > side else Image.Resampling.BICUBIC
    return np.array(ImageOps.contain(Image.fromarray(image), (side, side), smooth), np.uint8)


def _titled(image: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    strip = Image.new("RGB", (image.shape[1], 22), BACKGROUND)
    pen = ImageDraw.Draw(strip)
    pen.text((2, 3), title, fill=INK, font=ImageFont.load_default(14))
    return np.concatenate([np.array(strip), image])


def _grid(tiles: Sequence[NDArray[np.uint8]], *, columns: int, gap: int = GAP_PX) -> NDArray[np.uint8]:
    """Lay tiles out in rows on white, each centred in its cell."""
    if not tiles:
        return np.full((64, 64, 3), 255, np.uint8)
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, tile in enumerate(tiles):
        top = gap + index // columns * (height + gap) + (height - tile.shape[0]) // 2
        left = gap + index % columns * (width + gap) + (width - tile.shape[1]) // 2
        sheet[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return sheet


# ---- files ------------------------------------------------------------------------------------------------------


def save(plot: Figure | NDArray[np.uint8], path: Path) -> Path:
    """Write a figure or an image atomically; the suffix chooses the format."""
    with atomic_write(path) as partial:
        if isinstance(plot, np.ndarray):
            Image.fromarray(plot).save(partial, format=IMAGE_FORMATS[path.suffix], quality=88)
        else:
            with warnings.catch_warnings():
                # A class name may have letters that the font lacks; a box in their place is no reason for a warning.
                warnings.filterwarnings("ignore", "Glyph")
                plot.savefig(partial, format=path.suffix[1:], dpi=DPI, facecolor=BACKGROUND)
    return path


def read(path: Path) -> NDArray[np.uint8] | None:
    """Return a saved image, (H, W, 3) uint8 RGB; None if it cannot be read."""
    try:
        return read_image(path)
    except ImageError:
        return None


# ---- style ------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style_axes(axes: Axes, title: str, *, grid: str, legend: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(which="major", labelsize=8, colors=FAINT, labelcolor=INK)
    if grid:
        axes.grid(axis=grid, color=FAINT, alpha=0.22, linewidth=0.6)  # type: ignore[arg-type]
        axes.set_axisbelow(True)
    if legend:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
