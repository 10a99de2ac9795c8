"""The plots of a run: its training data, its curves, and its predictions.

Pure functions from arrays to a figure or an image; `save` writes either. Matplotlib is used without pyplot, which
keeps global state, may open windows and is not safe with threads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
# Column of metrics.csv, name in the legend, color, line width.
LOSS_LINES = [
    ("loss", "sum over all layers", INK, 1.9),
    ("loss_vfl", "classes, last layer", BLUE, 1.3),
    ("loss_bbox", "L1, last layer", ORANGE, 1.3),
    ("loss_giou", "GIoU, last layer", GREEN, 1.3),
]
SAMPLE_LINES = [("train_loss", "training images", INK, 1.7), ("val_loss", "val images", RED, 1.7)]
SCORE_LINES = [("AP50", "AP50", BLUE, 1.4), ("AP75", "AP75", GREEN, 1.1), ("AP", "AP", INK, 2.0)]
MIN_DETECTIONS = 10
MAX_BATCH_IMAGES = 16


# ---- labels -----------------------------------------------------------------------------------------------------


def labels_figure(dataset: Dataset, imgsz: tuple[int, int]) -> Figure:
    """Draw the annotations: boxes per class, their sizes at the network's input, and their positions.

    Args:
        dataset: the training images; crowd boxes are left out, as in training.
        imgsz: height and width of the network's input in pixels.
    """
    used = ~dataset.crowd
    labels = dataset.labels[used]
    image = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    scale = np.array([imgsz[1], imgsz[0]]) / dataset.sizes_wh.astype(np.float64).reshape(-1, 2)
    boxes = (dataset.boxes_xyxy_px * np.tile(scale, 2)[image])[used]
    figure, (left, middle, right) = _figure(4.5, [1.15, 1, 1])
    _draw_counts(left, labels, dataset.names)
    _draw_sizes(middle, boxes, labels, imgsz)
    _draw_positions(right, boxes, imgsz)
    title = f"{dataset.name}, {dataset.split}: {counted(len(dataset), 'image')}, {counted(len(labels), 'box')}"
    if empty := len(dataset) - len(np.unique(image[used])):
        title += f", {counted(empty, 'image')} without boxes"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=INK, parse_math=False)
    return figure


def _draw_counts(axes: Axes, labels: NDArray[np.int64], names: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    largest, others = order[:MAX_CLASSES], order[MAX_CLASSES:]
    bars = axes.barh(np.arange(len(largest)), counts[largest], color=_colors(largest), height=0.72)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8, color=INK)
    axes.set_yticks(np.arange(len(largest)), [_short(names[label]) for label in largest], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1, int(counts.max(initial=0))) * 1.18)
    title = "boxes per class"
    if len(others):
        title += f" ({MAX_CLASSES} of {len(order)} classes; the others have {counts[others].sum():,})"
    _style_axes(axes, title, grid="x")


def _draw_sizes(axes: Axes, boxes: NDArray[np.float64], labels: NDArray[np.int64], imgsz: tuple[int, int]) -> None:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.5)
    # Rare classes are drawn last, on top. Evenly thinned out, so that the same data give the same image.
    drawn = np.argsort(-np.bincount(labels, minlength=1)[labels], kind="stable")
    if len(drawn) > MAX_POINTS:
        drawn = drawn[np.linspace(0, len(drawn) - 1, MAX_POINTS).astype(np.int64)]
    alpha = float(np.clip(60 / math.sqrt(max(1, len(drawn))), 0.08, 0.7))
    shades = _colors(labels[drawn])
    x, y = sides[drawn].T
    axes.scatter(x, y, s=9, c=shades or None, alpha=alpha, linewidths=0, rasterized=True)
    low = 2.0 ** math.floor(math.log2(min(float(sides.min(initial=TINY_PX)), TINY_PX / 2)))
    height, width = imgsz[0] * 1.12, imgsz[1] * 1.12
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlim=(low, width), ylim=(low, height))
    axes.fill_between([low, TINY_PX], low, height, color=RED, alpha=0.07, linewidth=0)
    axes.fill_between([TINY_PX, width], low, TINY_PX, color=RED, alpha=0.07, linewidth=0)
    if tiny := int(np.count_nonzero(sides.min(axis=1, initial=np.inf) < TINY_PX)):
        text = f"{tiny:,} ({tiny / len(sides):.1%}) with a side under {TINY_PX} px"
        axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=8, color=RED)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    _style_axes(axes, f"box sizes at {imgsz[0]}x{imgsz[1]}", grid="both", x="width, px", y="height, px")


def _draw_positions(axes: Axes, boxes: NDArray[np.float64], imgsz: tuple[int, int]) -> None:
    height, width = imgsz
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).T
    cells = int(np.clip(math.sqrt(max(1, len(boxes))) / 2, 8, 40))
    counts, _, _ = np.histogram2d(y, x, bins=cells, range=[[0, height], [0, width]])
    heatmap = axes.imshow(counts, cmap="YlGnBu", extent=(0, width, height, 0), interpolation="nearest", vmin=0)
    bar = axes.figure.colorbar(heatmap, ax=axes, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    _style_axes(axes, "box centers per cell", x="x, px")


# ---- curves -----------------------------------------------------------------------------------------------------


def curves_figure(rows: Sequence[Mapping[str, float | None]], *, best_epoch: int = 0) -> Figure:
    """Draw the course of training: losses, AP and learning rate per epoch.

    Args:
        rows: of `metrics.csv`: `epoch` (from 1), `loss`, `lr`, `AP`, `AP50`, `AP75`, the loss terms and those of the
            fixed samples, which older runs lack; None where there is no value.
        best_epoch: from 1; 0 for none.
    """
    from matplotlib.ticker import MaxNLocator

    sampled = any(row.get(key) is not None for row in rows for key, *_ in SAMPLE_LINES)
    figure, (losses, *samples, scores, rate) = _figure(4.1, [1.15, 1.15, 1.15, 0.8] if sampled else [1.15, 1.15, 0.8])
    drawn = _draw_lines(losses, rows, LOSS_LINES)
    if drawn:
        losses.set_yscale("log")
        losses.yaxis.set_major_formatter("{x:g}")
        losses.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        losses.tick_params(which="minor", labelsize=8, labelcolor=INK)
    _style_axes(losses, "losses (log scale)", grid="both", legend=bool(drawn), x="epoch")

    for axes in samples:
        axes.set_ylim(0, _draw_lines(axes, rows, SAMPLE_LINES) * 1.12)
        _style_axes(axes, "loss without augmentation", grid="both", legend=True, x="epoch")

    highest, title = _draw_lines(scores, rows, SCORE_LINES), "AP on val"
    best = next((ap for row in rows if row["epoch"] == best_epoch and (ap := row.get("AP")) is not None), None)
    if best is not None:
        scores.axvline(best_epoch, color=RED, linewidth=0.9, linestyle=(0, (4, 3)))
        scores.plot([best_epoch], [best], marker="o", markersize=7, color="none", markeredgecolor=RED, zorder=5)
        title += f": best {best:.3f} at epoch {best_epoch}"
    scores.set_ylim(0, min(1.0, max(0.05, highest * 1.12)) if highest < 0.9 else 1.0)
    _style_axes(scores, title, grid="both", legend=highest > 0, x="epoch")

    if highest := _draw_lines(rate, rows, [("lr", "", BLUE, 1.5)]):
        rate.set_ylim(0, highest * 1.12)
        rate.yaxis.set_major_formatter("{x:.3g}")
    _style_axes(rate, "learning rate", grid="both", x="epoch")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if rows:
            epochs = [row["epoch"] or 0 for row in rows]
            axes.set_xlim(min(0.5, min(epochs) - 0.5), max(epochs) + 0.5)
    return figure


def _draw_lines(
    axes: Axes, rows: Sequence[Mapping[str, float | None]], lines: Sequence[tuple[str, str, str, float]]
) -> float:
    """Draw columns of the rows, each with its name, color and width; return the largest finite value, or 0."""
    highest = 0.0
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(rows) <= 30 else {}
    for key, name, color, width in lines:
        points = [(row["epoch"], value) for row in rows if (value := row.get(key)) is not None]
        finite = [value for _, value in points if math.isfinite(value)]
        if finite:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width, label=name, **marker)
            highest = max(highest, *finite)
    return highest


# ---- images ---------------------------------------------------------------------------------------------------


def batch_image(
    images: NDArray[np.uint8],
    boxes_cxcywh: Sequence[NDArray[np.floating]],
    labels: Sequence[NDArray[np.integer]],
    names: Sequence[str],
    *,
    side: int = 400,
) -> NDArray[np.uint8]:
    """Lay out the first images of a training batch, (B, 3, H, W) RGB, with their annotations; boxes are 0 to 1."""
    tiles = []
    for image, boxes, classes in list(zip(images, boxes_cxcywh, labels, strict=True))[:MAX_BATCH_IMAGES]:
        tile = _fitted(np.ascontiguousarray(image.transpose(1, 2, 0)), side)
        centre, size = np.split(np.asarray(boxes, np.float64).reshape(-1, 4), 2, axis=1)
        xyxy = np.concatenate([centre - size / 2, centre + size / 2], 1) * np.tile(tile.shape[1::-1], 2)
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
    dataset: Dataset, table: DetectionTable, *, threshold: float, side: int = 460
) -> NDArray[np.uint8]:
    """Lay out eight images, evenly chosen, with annotations on the left and detections on the right.

    Images that cannot be read are left out. The detections with the highest scores are drawn: twice as many as there
    are annotations, and at least ten.
    """
    tiles = []
    for index in choose_images(dataset, 8):
        try:
            image = _fitted(read_image(dataset.path(index), reduce_to=(side, side)), side)
        except ImageError:
            continue
        scale = image.shape[1] / int(dataset.sizes_wh[index][0])
        truth = dataset.annotations(index)
        found = table.rows(np.flatnonzero((table.image_index == index) & (table.scores >= threshold)))
        # A model that has learned little gives hundreds, which would hide the image.
        limit = max(MIN_DETECTIONS, 2 * len(truth.labels))
        best = found.rows(np.argsort(-found.scores, kind="stable")[:limit])
        left = draw_boxes(image, truth.boxes_xyxy_px * scale, truth.labels, dataset.names)
        right = draw_boxes(image, best.boxes_xyxy_px * scale, best.labels, dataset.names, scores=best.scores)
        tiles.append(_grid([_titled(left, "annotations"), _titled(right, "detections")], columns=2))
    return _grid(tiles, columns=2, gap=3 * GAP_PX)


def _fitted(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image whose longest side is `side`; boxes are drawn afterwards, so that they stay legible."""
    smooth = Image.Resampling.BILINEAR if max(image.shape) > side else Image.Resampling.BICUBIC
    return np.array(ImageOps.contain(Image.fromarray(image), (side, side), smooth), np.uint8)


def _titled(image: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    strip = Image.new("RGB", (image.shape[1], 22), BACKGROUND)
    ImageDraw.Draw(strip).text((2, 3), title, fill=INK, font=ImageFont.load_default(14))
    return np.concatenate([np.array(strip), image])


def _grid(tiles: Sequence[NDArray[np.uint8]], *, columns: int, gap: int = GAP_PX) -> NDArray[np.uint8]:
    """Lay tiles out in rows on white, each centered in its cell."""
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
            Image.fromarray(plot).save(partial, format=Image.registered_extensions()[path.suffix], quality=88)
        else:
            with warnings.catch_warnings():
                # A class name may have letters that the font lacks; a box in their place is no reason for a warning.
                warnings.filterwarnings("ignore", "Glyph")
                plot.savefig(partial, format=path.suffix[1:], dpi=DPI, facecolor=BACKGROUND)
    return path


# ---- style ------------------------------------------------------------------------------------------------------


def _figure(height: float, widths: Sequence[float]) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, height), layout="constrained")
    return figure, figure.subplots(1, len(widths), width_ratios=widths)


def _style_axes(
    axes: Axes,
    title: str,
    *,
    grid: Literal["x", "both", ""] = "",
    legend: bool = False,
    x: str = "",
    y: str = "",
) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    axes.tick_params(which="major", labelsize=8, colors=FAINT, labelcolor=INK)
    if grid:
        axes.grid(axis=grid, color=FAINT, alpha=0.22, linewidth=0.6)
        axes.set_axisbelow(True)
    if legend:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _colors(labels: NDArray[np.int64]) -> list[str]:
    return [css_color(int(label)) for label in labels]


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
