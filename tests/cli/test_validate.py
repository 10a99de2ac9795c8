"""`rtdetr validate`: the report, the exit code, and the copies that it writes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One COCO file of six images, with two boxes that need repair."""
    folder = tmp_path / "screws"
    folder.mkdir()
    images, annotations = [], []
    for i in range(6):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(coarse).resize((96, 64)).save(folder / f"{i}.jpg")
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64})
        for k in range(4):
            box = [5 + 20 * k, 10, 16, 30]
            annotations.append({"id": 10 * i + k, "image_id": i, "category_id": 1, "bbox": box, "area": 480})
    annotations[0]["bbox"] = [5, 10, 0, 30]
    annotations[1]["bbox"] = [90, 10, 16, 30]
    path = folder / "screws.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "screw"}]}, indent=1)
    )
    return path


def add_error(data: Path) -> None:
    document = json.loads(data.read_text())
    document["annotations"][5]["category_id"] = 8
    data.write_text(json.dumps(document, indent=1))


def test_the_table_lists_findings_by_code(rtdetr: Any, data: Path) -> None:
    ran = rtdetr("validate", data, code=0)
    assert "screws (coco): 6 images (train 6), 23 boxes, 1 class\n" in ran.out
    rows = [line.split()[:3] for line in ran.out.splitlines() if line.startswith(" warning")]
    assert rows == [["warning", "box-partly-outside", "1"], ["warning", "box-zero-size", "1"]]
    assert "0 errors, 2 warnings, 1 note: ready for training" in ran.out
    assert f"hint: rtdetr validate {data} --fix screws-fixed writes a repaired copy\n" in ran.err
    assert ran.err.endswith(f"next: rtdetr train --data {data}\n")
    assert "screws.json:" in ran.out


def test_json_has_the_documented_keys(rtdetr: Any, data: Path) -> None:
    ran = rtdetr("validate", data, "--json", code=0)
    document = ran.json
    assert document["schema_version"] == 1
    assert document["counts"] == {"error": 0, "warning": 2, "info": 1}
    assert document["dataset"]["splits"] == {"train": {"pictures": 6, "boxes": 23}}
    keys = {"code", "severity", "message", "file", "line", "image_id", "annotation_id", "hint"}
    assert all(set(finding) == keys for finding in document["findings"])
    zero = next(f for f in document["findings"] if f["code"] == "box-zero-size")
    assert (zero["file"], zero["image_id"], zero["annotation_id"]) == ("screws.json", 0, 0)
    assert data.read_text().splitlines()[zero["line"] - 1].strip() == "{"


def test_errors_and_strict_warnings_exit_with_3(rtdetr: Any, data: Path) -> None:
    assert rtdetr("validate", data, "--strict").code == 3
    add_error(data)
    ran = rtdetr("validate", data, code=3)
    assert "training refuses this dataset" in ran.out


def test_fast_decodes_no_image(rtdetr: Any, data: Path) -> None:
    image = data.parent / "3.jpg"
    image.write_bytes(image.read_bytes()[:-300])
    assert rtdetr("validate", data, "--fast").code == 0
    ran = rtdetr("validate", data, "--json", code=3)
    assert "image-truncated" in {f["code"] for f in ran.json["findings"]}


def test_imgsz_decides_what_is_tiny(rtdetr: Any, data: Path) -> None:
    assert "box-below-8px" not in rtdetr("validate", data).out
    assert "box-below-8px" in rtdetr("validate", data, "--imgsz", "32").out


def test_a_dataset_without_objects_is_an_error_as_in_train(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    document = json.loads(data.read_text())
    data.write_text(json.dumps({**document, "annotations": []}))
    ran = rtdetr("validate", data, code=3)
    assert "training refuses this dataset" in ran.out
    row = next(line for line in ran.out.splitlines() if "split-no-objects" in line)
    assert row.split()[0] == "error"
    train = ("train", "--preset", "tiny", "--weights", "none", "--data", data, "--out", tmp_path / "runs", "--json")
    refused = rtdetr(*train)
    assert (refused.code, refused.json["error"]["code"]) == (3, "split-no-objects")
    page = tmp_path / "page.html"
    assert rtdetr("validate", data, "--html", page).code == 3
    assert '<td class="severity error">error</td><td class="number">1</td>' in page.read_text()


def test_explain(rtdetr: Any) -> None:
    ran = rtdetr("validate", "--explain", "box-zero-size", code=0)
    assert ran.out.startswith("box-zero-size (warning)")
    assert "--fix" in ran.out
    assert rtdetr("validate", "--explain", "all").out.count("image-") > 20
    rtdetr("validate", "--explain", "box-zerosize", code=2, err="did you mean box-zero-size?")


def test_fix_repairs_a_copy_and_leaves_the_original_alone(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    add_error(data)
    before = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in data.parent.iterdir()}
    out = tmp_path / "fixed"
    ran = rtdetr("validate", data, "--fix", out, "--json", code=0)
    fix = ran.json["fix"]
    assert fix["changes"] == {"category-unknown": 1, "box-zero-size": 1, "box-partly-outside": 1}
    assert fix["counts"]["error"] == fix["counts"]["warning"] == 0
    assert Path(fix["patch"]).is_file()
    assert rtdetr("validate", out).code == 0
    assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in data.parent.iterdir()} == before


def test_fix_keeps_truncated_images_by_choice(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    image = data.parent / "3.jpg"
    image.write_bytes(image.read_bytes()[:-20])
    dropped = rtdetr("validate", data, "--fix", tmp_path / "dropped")
    assert "3.jpg (train, 4 boxes): image-truncated" in dropped.out
    assert "hint: --keep-truncated keeps" in dropped.err
    kept = rtdetr("validate", data, "--fix", tmp_path / "kept", "--keep-truncated", code=0)
    assert "left out" not in kept.out
    assert "image-truncated" in kept.out.split("changes: ")[1].splitlines()[0]
    assert rtdetr("validate", data, "--keep-truncated").code == 2


def test_resplit(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    words = ("validate", data, "--resplit", "0.5,0.5", "--to")
    assert "(coco; train 3, val 3)\n" in rtdetr(*words, tmp_path / "alone").out
    shutil.copy(data.parent / "0.jpg", data.parent / "5.jpg")
    together = "(coco; train 3, val 3; 1 group of related images kept in one split)\n"
    assert together in rtdetr(*words, tmp_path / "together").out
    for seed in (0, 1, 2):
        to = tmp_path / f"to{seed}"
        written = rtdetr(*words, to, "--seed", seed, "--json", code=0).json["written"]
        assert sum(written["splits"].values()) == 6
        assert (written["clusters"], written["largest_cluster"]) == (5, 2)
        train = {p.name for p in (to / "train").iterdir()}
        assert ("0.jpg" in train) == ("5.jpg" in train)
        rtdetr("validate", to, code=0)


def test_fix_is_suggested_only_where_it_helps(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "fixed"
    assert "--fix" in rtdetr("validate", data).err
    fixed = rtdetr("validate", data, "--fix", out)
    assert "--fix" not in fixed.err, "the user is doing it already"
    assert fixed.err.endswith(f"next: rtdetr train --data {out / 'screws.json'}\n")
    again = rtdetr("validate", out)
    assert "0 errors, 0 warnings" in again.out
    assert "--fix" not in again.err
    data.write_text(data.read_text()[:-300])
    cut = rtdetr("validate", data, code=3)
    assert "the file is truncated" in cut.out
    assert "--explain file-malformed" in cut.err
    assert "--fix" not in cut.err


def test_repair_is_the_next_step_after_errors(rtdetr: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_error(data)
    monkeypatch.chdir(data.parent)
    (data.parent.parent / "screws-fixed").mkdir()
    ran = rtdetr("validate", "screws.json", code=3)
    assert ran.err.endswith("next: rtdetr validate screws.json --fix ../screws-fixed1\n"), "a new folder, not inside"
    assert rtdetr("validate", "screws.json", "--fix", "../screws-fixed1").code == 0


@pytest.mark.parametrize("how", [["--convert", "yolo"], ["--resplit", "0.5,0.5"]])
def test_the_copy_is_the_next_thing_to_train_on(rtdetr: Any, data: Path, tmp_path: Path, how: list[str]) -> None:
    ran = rtdetr("validate", data, *how, "--to", tmp_path / "my copy")
    assert ran.err.splitlines()[-1].startswith(f"next: rtdetr train --data '{tmp_path / 'my copy'}")


def test_the_hint_keeps_the_folder_of_the_images(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    moved = shutil.copy(data, tmp_path / "moved.json")
    ran = rtdetr("validate", moved, "--images", data.parent)
    assert f"rtdetr validate {moved} --images {data.parent} --fix moved-fixed" in ran.err
    assert ran.err.endswith(f"next: rtdetr train --data {moved} --images {data.parent}\n")


@pytest.fixture
def unlabelled(rtdetr: Any, data: Path, tmp_path: Path) -> Path:
    """A YOLO dataset of three train and three val images, of which one each has no label file."""
    folder = tmp_path / "washers"
    assert rtdetr("validate", data, "--resplit", "0.5,0.5", "--convert", "yolo", "--to", folder).code == 0
    for split in ("train", "val"):
        next((folder / "labels" / split).iterdir()).unlink()
    return folder


def test_missing_labels_are_not_taken_for_empty_ones(rtdetr: Any, unlabelled: Path, tmp_path: Path) -> None:
    ran = rtdetr("validate", unlabelled, code=0)
    assert "2 images have no label file: either they contain no objects, or they were never labelled" in ran.err
    fixed = rtdetr("validate", unlabelled, "--fix", tmp_path / "fixed")
    assert "left out: 2 images with 0 boxes\n" in fixed.out
    assert (
        len(list((tmp_path / "fixed/labels").rglob("*.txt"))) == len(list((tmp_path / "fixed/images").rglob("*"))) - 2
    )
    empty = rtdetr("validate", unlabelled, "--fix", tmp_path / "empty", "--missing-labels", "empty", "--json").json
    assert (empty["fix"]["changes"], empty["fix"]["left_out"]) == ({"label-missing": 2}, [])
    assert sum(not path.read_text() for path in (tmp_path / "empty/labels").rglob("*.txt")) == 2


@pytest.mark.parametrize(("choice", "images"), [([], 4), (["--missing-labels", "empty"], 6)])
@pytest.mark.parametrize("how", [["--convert", "coco"], ["--resplit", "0.5,0.5"]])
def test_no_copy_declares_unlabelled_images_empty_by_itself(
    rtdetr: Any, unlabelled: Path, tmp_path: Path, how: list[str], choice: list[str], images: int
) -> None:
    ran = rtdetr("validate", unlabelled, *how, *choice, "--to", tmp_path / "to", code=0)
    assert ("left out: 2 images without a label file\n" in ran.out) == (images == 4)
    assert rtdetr("validate", tmp_path / "to", "--json").json["dataset"]["pictures"] == images


def test_fix_drops_a_split_that_has_no_labels_at_all(rtdetr: Any, unlabelled: Path, tmp_path: Path) -> None:
    shutil.rmtree(unlabelled / "labels/val")
    rtdetr("validate", unlabelled, "--fix", tmp_path / "fixed", "--json", code=0)
    assert rtdetr("validate", tmp_path / "fixed", "--json").json["dataset"]["splits"].keys() == {"train"}


@pytest.mark.parametrize("how", [["--convert", "voc"], ["--resplit", "0.5,0.5"]])
def test_dropped_and_clipped_boxes_are_reported(rtdetr: Any, data: Path, tmp_path: Path, how: list[str]) -> None:
    ran = rtdetr("validate", data, *how, "--to", tmp_path / "to")
    assert "left out: 1 box (box-zero-size)\n" in ran.out
    assert "clipped: 1 box (box-partly-outside)\n" in ran.out
    written = rtdetr("validate", data, *how, "--to", tmp_path / "again", "--json").json["written"]
    assert (written["left_out"], written["clipped"]) == ({"box-zero-size": 1}, {"box-partly-outside": 1})
    ran = rtdetr("validate", tmp_path / "to", *how, "--to", tmp_path / "third")
    assert "left out:" not in ran.out
    assert "clipped:" not in ran.out


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_convert(rtdetr: Any, data: Path, tmp_path: Path, form: str) -> None:
    ran = rtdetr("validate", data, "--convert", form, "--to", tmp_path / "to", "--json", code=0)
    again = rtdetr("validate", ran.json["written"]["data"], "--json").json
    assert again["dataset"]["boxes"] == 23
    assert again["dataset"]["format"] == form
    assert not again["counts"]["error"]


def test_convert_refuses_errors(rtdetr: Any, data: Path, tmp_path: Path) -> None:
    add_error(data)
    ran = rtdetr("validate", data, "--convert", "yolo", "--to", tmp_path / "to", "--json", code=3)
    assert ran.json["error"]["code"] == "category-unknown"
    assert "--fix" in ran.json["error"]["hint"]
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--convert", "csv", "--to", "x"], "--convert csv"),
        (["--convert", "coco"], "--to DIR"),
        (["--to", "x"], "--to needs"),
        (["--resplit", "0.9", "--to", "x"], "--resplit 0.9"),
        (["--resplit", "0.9,0.9", "--to", "x"], "add up to 1"),
        (["--convert", "coco", "--to", "x", "--fix", "y"], "--fix cannot be combined"),
        (["--fix", "x", "--missing-labels", "guess"], "expected drop or empty"),
        (["--imgsz", "100"], "multiple of 32"),
        (["--fix", "."], "is not empty"),
        (["--allow-outside"], "needs --fix, --convert or --resplit"),
        (["--html", "."], "is a folder"),
    ],
)
def test_clashing_flags_are_refused_first(
    rtdetr: Any, data: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.chdir(data.parent)
    ran = rtdetr("validate", data, *flags, code=2)
    assert words in ran.err
    assert "hint:" in ran.err


def test_a_report_that_cannot_be_written_is_refused_first(rtdetr: Any, data: Path) -> None:
    ran = rtdetr("validate", data, "--html", data / "page.html", code=1)
    assert f"{data} is a file, not a folder" in ran.err
    assert not ran.out, "the dataset must not have been read"


def test_the_help_gives_the_limits_of_the_html_report(rtdetr: Any) -> None:
    from rtdetr_cli.checks.page import MAX_FINDINGS, MAX_IMAGES

    text = " ".join(rtdetr("validate", "--help").out.split())
    assert f"up to {MAX_IMAGES} images and {MAX_FINDINGS:,} findings" in text


def test_missing_dataset(rtdetr: Any, tmp_path: Path) -> None:
    assert rtdetr("validate", tmp_path / "nothing").code == 3
    assert rtdetr("validate").code == 2


def test_torch_is_never_loaded(data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from rtdetr_cli.cli.app import run; "
        f"c = run(['validate', {str(data)!r}, '--html', {str(tmp_path / 'page.html')!r}, "
        f"'--resplit', '0.5,0.5', '--to', {str(tmp_path / 'to')!r}]); "
        "heavy = {'torch', 'torchvision', 'cv2', 'albumentations', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    help_ = (
        "import sys; import rtdetr_cli.cli.validate; "
        "heavy = {'numpy', 'PIL', 'yaml', 'rich', 'jinja2', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    assert subprocess.run([sys.executable, "-c", help_], check=False).returncode == 0


def test_bccd(rtdetr: Any, bccd: Path) -> None:
    document = rtdetr("validate", bccd, "--json").json
    found = sorted({f["code"] for f in document["findings"]})
    assert found == ["box-duplicate", "box-zero-size", "image-near-leak", "voc-folder"]
    assert document["dataset"]["splits"]["train"] == {"pictures": 205, "boxes": 2804}
