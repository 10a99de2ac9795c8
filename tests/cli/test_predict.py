"""`rtdetr predict` end to end with a small trained detector."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rtdetr_cli.images.decode import read_image
from rtdetr_cli.infer.onnx_backend import OnnxBackend
from rtdetr_cli.text import counted
from tests.server import serve


def test_one_image(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    ran = rtdetr("predict", images / "shapes_00.png", "--weights", shapes_onnx, code=0)
    (line,) = ran.out.splitlines()
    assert "shapes_00.png  192x256 px  " in line
    assert line.endswith(" ms")
    assert "annotated image runs/predict-01/shapes_00.png" in ran.err
    assert "conf 0.450 to 0.550 by class (best F1), stored in the model" in ran.err
    assert ran.err.endswith(f"next: rtdetr benchmark {shapes_onnx}\n")
    drawn = read_image(here / "runs/predict-01/shapes_00.png")
    original = read_image(images / "shapes_00.png")
    assert drawn.shape == original.shape
    assert 0.005 < (drawn != original).any(axis=2).mean() < 0.5
    rtdetr("predict", images / "shapes_00.png", "--weights", shapes_onnx)
    assert (here / "runs/predict-02").is_dir()


def test_folder_in_every_format(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    ran = rtdetr(
        *("predict", images, "-w", shapes_onnx, "--batch", 3, "--out", "out"),
        *("--save-json", "--save-coco", "--save-txt", "--json", "--data", images / "shapes.json"),
        code=0,
    )
    found = ran.documents
    assert [Path(d["image"]).name for d in found] == [f"shapes_{i:02d}.png" for i in range(16)]
    assert all(d["schema_version"] == 1 for d in found)
    first = found[0]
    assert (first["width"], first["height"]) == (256, 192)
    row = first["detections"][0]
    assert set(row) == {"label", "category_id", "score", "box_xyxy"}
    assert row["category_id"] == {"tomato": 3, "leaf": 7, "plum": 20}[row["label"]]
    x1, y1, x2, y2 = row["box_xyxy"]
    assert 0 <= x1 < x2 <= 256
    assert 0 <= y1 < y2 <= 192
    assert [json.loads(line) for line in (here / "out/predictions.jsonl").read_text().splitlines()] == found
    rows = json.loads((here / "out/predictions.json").read_text())
    assert len(rows) == sum(len(d["detections"]) for d in found)
    assert {r["image_id"] for r in rows} <= set(range(1, 17))  # the dataset's ids, by file name
    assert sorted(p.name for p in (here / "out").glob("*.png")) == [f"shapes_{i:02d}.png" for i in range(16)]
    assert len(list((here / "out/labels").glob("shapes_*.txt"))) == 16
    assert (here / "out/labels/classes.txt").read_text() == "tomato\nleaf\nplum\n"
    objects = sum(len(d["detections"]) for d in found)
    counts = Counter(row["label"] for d in found for row in d["detections"]).most_common()
    by_class = ", ".join(f"{number} {name}" for name, number in counts)
    assert re.search(rf"^16 images in \d+\.\d s: {objects} objects \({by_class}\)", ran.err, re.MULTILINE)
    assert "results in out: annotated copies, predictions.jsonl, predictions.json, labels/" in ran.err


def test_summary_names_images_without_detections(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path
) -> None:
    Image.new("RGB", (64, 48)).save("black.png")
    given = ("-w", shapes_onnx, "--out", "out", "--no-save", "--save-txt", "--save-conf", "--classes", "plum")
    rtdetr("predict", images / "shapes_00.png", "black.png", *given, code=0, err="1 without detections: black.png")
    rows = [line.split() for line in (here / "out/labels/shapes_00.txt").read_text().splitlines()]
    assert rows
    assert all(len(row) == 6 and 0.4 < float(row[5]) <= 1 for row in rows)


def test_image_from_the_web(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    """It gives the same detections as the file, and the copy is named after the end of the address."""
    with serve(images) as (url, _):
        page = f"{url}/shapes_00.png?version=2"
        ran = rtdetr("predict", page, f"{url}/shapes.json", "-w", shapes_onnx, "--out", "out", "--json", code=1)
    assert f"error: {url}/shapes.json" in ran.err
    document = ran.documents[0]
    local = rtdetr("predict", images / "shapes_00.png", "-w", shapes_onnx, "--no-save", "--json").documents[0]
    assert document == {**local, "image": page}
    assert [path.name for path in (here / "out").glob("[!.]*")] == ["shapes_00.png"]


def test_interrupted_run_names_what_was_written(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = OnnxBackend.run, iter(range(5))

    def interrupted_run(self: OnnxBackend, *arguments: Any) -> Any:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(OnnxBackend, "run", interrupted_run)
    ran = rtdetr("predict", images, "-w", shapes_onnx, "--out", "out", "--save-json", "--save-coco", code=130)
    done = len(ran.out.splitlines())
    assert f"interrupted; predicted so far: {counted(done, 'image')}, of 16 images" in ran.err
    assert "results in out: annotated copies, predictions.jsonl, predictions.json" in ran.err
    assert len((here / "out/predictions.jsonl").read_text().splitlines()) == done
    assert isinstance(json.loads((here / "out/predictions.json").read_text()), list)


def test_orientation_is_applied_as_in_training(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path
) -> None:
    with Image.open(images / "shapes_02.png") as image:
        upright = image.convert("RGB")
    upright.save(here / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(here / "turned.png", exif=exif)
    a, b = rtdetr("predict", "upright.png", "turned.png", "-w", shapes_onnx, "--json").documents
    assert (a["width"], a["height"]) == (b["width"], b["height"]) == (180, 240)
    assert a["detections"] == b["detections"]
    assert read_image(here / "runs/predict-01/turned.png").shape == (240, 180, 3)  # drawn upright


def test_unreadable_images_are_skipped(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    good = (images / "shapes_00.png").read_bytes()
    (here / "in").mkdir()
    (here / "in/a.png").write_bytes(good)
    (here / "in/b.png").write_bytes(good[: len(good) // 2])
    (here / "in/c.jpg").write_text("not an image")
    (here / "in/d.png").write_bytes(good)
    (here / "in/e.mp4").write_text("not a video")
    ran = rtdetr("predict", "in", "-w", shapes_onnx, "--out", "out", "--save-json", code=1)
    assert [line.split("  ")[0] for line in ran.out.splitlines()] == ["in/a.png", "in/d.png"]
    for name in ("in/b.png", "in/c.jpg", "in/e.mp4"):
        assert f"error: {name} " in ran.err
    assert "3 of 4 images and 1 video could not be read; the others were processed" in ran.err
    assert sorted(p.name for p in (here / "out").glob("[!.]*")) == ["a.png", "d.png", "predictions.jsonl"]
    as_json = rtdetr("predict", "in", "-w", shapes_onnx, "--no-save", "--json", code=1)
    assert [sorted(d) for d in as_json.documents][-1] == ["error", "schema_version"]
    assert as_json.documents[-1]["error"]["code"] == "images-unreadable"


def test_list_on_stdin(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [images / "shapes_03.png", images / "shapes_01.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{p}\n" for p in listed)))
    ran = rtdetr("predict", "-", "-w", shapes_onnx, "--no-save", "--json", code=0)
    assert [d["image"] for d in ran.documents] == [str(p) for p in listed]


def test_video_is_written_back(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path, write_video: Callable[..., Path]
) -> None:
    import cv2

    write_video(here / "clip.mp4", read_image(images / "shapes_00.png"), 9)
    ran = rtdetr("predict", "clip.mp4", "-w", shapes_onnx, "--out", "out", "--batch", 4, "--save-json", "--save-txt")
    assert ran.code == 0, ran.err
    assert "clip.mp4  192x256 px  9 frames" in ran.out
    lines = [json.loads(line) for line in (here / "out/predictions.jsonl").read_text().splitlines()]
    assert [d["frame"] for d in lines] == list(range(9))
    assert all(d["detections"] for d in lines)
    assert len(list((here / "out/labels").glob("clip_*.txt"))) == 9
    copy = cv2.VideoCapture(str(here / "out/clip.mp4"))
    assert copy.get(cv2.CAP_PROP_FPS) == pytest.approx(12)
    read = 0
    while copy.read()[0]:
        read += 1
    assert read == 9
    assert sorted(p.name for p in (here / "out").glob("[!.]*")) == ["clip.mp4", "labels", "predictions.jsonl"]
    as_json = rtdetr("predict", "clip.mp4", "-w", shapes_onnx, "--no-save", "--json")
    assert [d["frame"] for d in as_json.documents] == list(range(9))


def test_truncated_video(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path, write_video: Callable[..., Path]
) -> None:
    """The existing frames are processed, and the exit code is 1."""
    write_video(here / "whole.avi", read_image(images / "shapes_00.png"), 12, codec="MJPG")
    whole = (here / "whole.avi").read_bytes()
    (here / "cut.avi").write_bytes(whole[: len(whole) // 2])
    given = ("-w", shapes_onnx, "--batch", 4)
    ran = rtdetr("predict", "whole.avi", *given, "--no-save", code=0)
    assert "warning" not in ran.err
    ran = rtdetr("predict", "cut.avi", *given, "--out", "out", "--save-json", code=1)
    lines = (here / "out/predictions.jsonl").read_text().splitlines()
    assert 3 <= len(lines) <= 8
    assert f"warning: cut.avi is truncated: it ends after {len(lines)} of 12 frames" in ran.err
    assert "error: 1 of 1 video is truncated" in ran.err
    assert "results in out" in ran.err
    assert f"cut.avi  192x256 px  {len(lines)} frames" in ran.out
    assert (here / "out/cut.avi").exists() or (here / "out/cut.mp4").exists()
    ran = rtdetr("predict", "cut.avi", images / "shapes_00.png", "whole.avi", *given, "--no-save", "--json", code=1)
    assert len(ran.documents) == len(lines) + 1 + 12 + 1
    assert ran.documents[-1]["error"]["code"] == "video-cut-off"
    (here / "bad.png").write_text("x")
    ran = rtdetr("predict", "cut.avi", "bad.png", *given, "--no-save", code=1)
    assert "1 of 1 image and 1 video could not be read, and 1 is truncated" in ran.err


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("gone.jpg", 3, "gone.jpg does not exist"),
        ("empty", 3, "the folder empty contains no images"),
        ("*.bmp", 3, "matches no file"),
        ("bad.jpg", 3, "bad.jpg is not an image"),
        ("ftp://127.0.0.1/a.jpg", 2, "is not a web address that can be read"),
        ("http://127.0.0.1:9/a.jpg", 3, "http://127.0.0.1:9/a.jpg cannot be read: Connection refused"),
    ],
)
def test_bad_sources(
    rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, source: str, code: int, said: str
) -> None:
    (here / "empty").mkdir()
    (here / "bad.jpg").write_text("x")
    rtdetr("predict", source, "--weights", shapes_onnx, code=code, err=said)
    assert not list(here.glob("runs/*"))


def test_originals_are_never_replaced(rtdetr: Callable[..., Any], here: Path, shapes_onnx: Path, images: Path) -> None:
    shutil.copy(images / "shapes_00.png", here)
    before = (here / "shapes_00.png").read_bytes()
    ran = rtdetr("predict", "shapes_00.png", "--weights", shapes_onnx, "--out", ".", code=2)
    assert "its annotated copy would replace" in ran.err
    assert (here / "shapes_00.png").read_bytes() == before


def test_onnx_imports_no_heavy_package(here: Path, shapes_onnx: Path, images: Path) -> None:
    heavy = {"torch", "torchvision", "pydantic", "scipy", "matplotlib", "cv2", "rich", "onnx", "jinja2", "hotcoco"}
    code = (
        "import sys; from rtdetr_cli.cli.app import run; code = run(sys.argv[1:]);"
        f"print(code, sorted({heavy} & set(sys.modules)), 'rtdetr_cli.config.schema' in sys.modules)"
    )
    arguments = ["predict", str(images / "shapes_00.png"), "--weights", str(shapes_onnx)]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "0 [] False"
    assert (here / "runs/predict-01/shapes_00.png").exists()
