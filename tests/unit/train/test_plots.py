"""The plots of a run: the numbers in them, no global state, and atomic files."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rtdetr_cli.datasets.records import Dataset
from rtdetr_cli.evaluate.table import DetectionTable
from rtdetr_cli.images.draw import class_color
from rtdetr_cli.train import plots


def make_dataset(
    make: Any, root: Path, boxes: list[list[list[float]]], labels: list[list[int]], names: list[str]
) -> Dataset:
    """Images of 200 x 100 pixels with the corners of their boxes."""
    flat = np.array([b for own in boxes for b in own], np.float64).reshape(-1, 4)
    dataset = make.dataset(
        images=len(boxes),
        names=tuple(names),
        image_index=np.repeat(np.arange(len(boxes)), [len(own) for own in boxes]),
        labels=[k for own in labels for k in own],
        boxes_xywh=np.concatenate([flat[:, :2], flat[:, 2:] - flat[:, :2]], axis=1),
        size_wh=(200, 100),
    )
    return replace(dataset, root=root)


@pytest.fixture
def small(tmp_path: Path, make: Any) -> Dataset:
    for index in range(3):
        Image.new("RGB", (200, 100), (40 * index, 90, 120)).save(tmp_path / f"{index:04d}.jpg")
    boxes = [[[10, 10, 50, 60], [60, 10, 64, 14]], [], [[100, 20, 180, 90]]]
    return make_dataset(make, tmp_path, boxes, [[0, 1], [], [1]], ["cat", "dog $x$ 猫", "never seen"])


def texts(figure: object) -> list[str]:
    from matplotlib.text import Text

    return [t.get_text() for t in figure.findobj(Text) if t.get_text()]  # type: ignore[attr-defined]


def test_labels_figure_counts_images_and_boxes(small: Dataset, tmp_path: Path) -> None:
    figure = plots.labels_figure(small, (320, 640))
    found = texts(figure)
    assert "made, val: 3 images, 3 boxes, 1 image without boxes" in found
    assert "1 (33.3%) with a side under 8 px" not in found  # 4 px of 200 are 12.8 of 640, 4 of 100 are 12.8 of 320
    assert "1 (33.3%) with a side under 8 px" in texts(plots.labels_figure(small, (160, 320)))
    path = plots.save(figure, tmp_path / "plots" / "labels.png")
    with Image.open(path) as image:
        assert image.width > 1000
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_box_sizes_are_those_at_the_network_input(small: Dataset) -> None:
    (points,) = plots.labels_figure(small, (320, 640)).axes[1].collections[:1]
    np.testing.assert_allclose(sorted(map(tuple, points.get_offsets())), [(12.8, 12.8), (128, 160), (256, 224)])


def test_crowd_boxes_are_left_out(small: Dataset) -> None:
    small.crowd[2] = True
    assert "made, val: 3 images, 2 boxes, 2 images without boxes" in texts(plots.labels_figure(small, (320, 640)))


def test_empty_input_can_be_drawn(tmp_path: Path, make: Any) -> None:
    empty = make_dataset(make, tmp_path, [[], []], [[], []], ["a"])
    plots.save(plots.labels_figure(empty, (64, 64)), tmp_path / "labels.png")
    plots.save(plots.curves_figure([]), tmp_path / "curves.png")
    nothing = plots.predictions_image(empty, DetectionTable.empty(), threshold=0.5)
    plots.save(nothing, tmp_path / "predictions.jpg")
    assert nothing.shape[2] == 3


def test_too_many_classes_are_summarized(tmp_path: Path, make: Any) -> None:
    names = [f"class {i}" for i in range(40)]
    boxes = [[[i, 0, i + 9, 9] for i in range(40)]]
    figure = plots.labels_figure(make_dataset(make, tmp_path, boxes, [list(range(40))], names), (64, 64))
    assert "boxes per class (24 of 40 classes; the others have 16)" in texts(figure)


def rows(count: int) -> list[dict[str, float | None]]:
    return [
        {"epoch": n + 1, "loss": 20 / (n + 1), "loss_vfl": 1.0, "lr": 1e-4, "AP": [0.1 * n, None][n % 2], "AP50": 0.5}
        for n in range(count)
    ]


def test_curves_mark_the_best_epoch(tmp_path: Path) -> None:
    figure = plots.curves_figure(rows(6), best_epoch=5)
    assert "AP on val: best 0.400 at epoch 5" in texts(figure)
    loss, score, rate = figure.axes
    ap = next(line for line in score.lines if line.get_label() == "AP")
    assert list(ap.get_xdata()) == [1, 3, 5]  # epochs without an evaluation are bridged
    assert "AP75" not in texts(figure)
    assert [line.get_label() for line in loss.lines] == ["sum over all layers", "classes, last layer"]
    assert len(rate.lines) == 1
    plots.save(figure, tmp_path / "curves.png")


def test_the_losses_of_training_and_val_images_are_drawn_side_by_side() -> None:
    sampled = [row | {"train_loss": 1 / n, "val_loss": 2.0} for n, row in enumerate(rows(4), 1)]
    _, samples, _, _ = plots.curves_figure(sampled).axes
    assert [line.get_label() for line in samples.lines] == ["training images", "val images"]
    assert list(samples.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3, 1 / 4]


def test_a_nan_loss_leaves_a_gap(tmp_path: Path) -> None:
    broken = rows(4)
    broken[1]["loss"] = math.nan
    plots.save(plots.curves_figure(broken, best_epoch=0), tmp_path / "curves.png")


def test_the_batch_shows_each_image_with_its_boxes() -> None:
    images = np.zeros((3, 3, 64, 64), np.uint8)
    box = np.array([[0.5, 0.5, 0.5, 0.5]], np.float32)
    none = np.zeros((0, 4), np.float32)
    sheet = plots.batch_image(
        images, [box, none, box], [np.array([0]), np.zeros(0, np.int64), np.array([1])], ["a", "b"], side=64
    )
    gap = plots.GAP_PX
    assert sheet.shape == (64 + 2 * gap, 3 * 64 + 4 * gap, 3)
    first, second, third = (sheet[gap:-gap, gap + i * (64 + gap) : gap + i * (64 + gap) + 64] for i in range(3))
    assert tuple(first[32, 16]) == class_color(0)
    assert tuple(third[32, 47]) == class_color(1)
    assert not second.any()


def test_detections_are_drawn_next_to_the_annotations(small: Dataset) -> None:
    table = DetectionTable(
        np.array([0, 0, 2]), np.array([0, 1, 1]), np.array([0.9, 0.1, 0.8]), small.boxes_xyxy_px.copy()
    )
    sheet = plots.predictions_image(small, table, threshold=0.5, side=200)
    gap, strip = plots.GAP_PX, 22
    pair = sheet[3 * gap :, 3 * gap :]
    truth, prediction = pair[gap + strip :, gap : gap + 200], pair[gap + strip :, 200 + 2 * gap :][:, :200]
    assert tuple(truth[40, 10]) == tuple(prediction[40, 10]) == class_color(0)
    outlines = [np.all(part[:100] == class_color(1), axis=2).sum() for part in (truth, prediction)]
    assert outlines[0] > 0
    assert outlines[1] == 0  # its score is under the threshold


def test_unreadable_images_are_left_out(small: Dataset) -> None:
    small.path(0).write_bytes(b"no image")
    sheet = plots.predictions_image(small, DetectionTable.empty(), threshold=0.5, side=200)
    alone = plots.predictions_image(small.subset([1, 2]), DetectionTable.empty(), threshold=0.5, side=200)
    assert np.array_equal(sheet, alone)


def test_images_are_chosen_evenly_and_those_without_boxes_last(small: Dataset) -> None:
    assert plots.choose_images(small, 2) == [0, 2]
    assert plots.choose_images(small, 8) == [0, 1, 2]
    assert plots.choose_images(small, 1) == [0]


def test_pyplot_is_never_loaded(small: Dataset, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rtdetr_cli.train import plots; "
        "plots.save(plots.curves_figure([{'epoch': 1, 'loss': 2.0}]), Path(sys.argv[1])); "
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c.png")], check=True)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "curves.png"
    plots.save(np.zeros((4, 4, 3), np.uint8), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        plots.save(np.zeros((4, 4, 9), np.uint8), path)
    assert path.read_bytes() == before
