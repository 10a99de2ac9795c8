"""Files and arguments that hang, crash or lie elsewhere: each ends in one sentence and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from rtdetr_cli.documents import parse_json

SECONDS = 300


@pytest.fixture(autouse=True)
def no_hang(limit_seconds: Any) -> Iterator[None]:
    with limit_seconds(SECONDS):
        yield


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (48, 32), (90, 30, 20)).save(path)
    return path


def spoiled(model: Path, to: Path, *, entry: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Copy a model file with other fields in its header, or another entry of its first tensor."""
    data = model.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    layout = json.loads(data[8:end])
    header = json.loads(layout["__metadata__"]["rtdetr"])
    for key, value in changes.items():
        table, _, inner = key.partition("__")
        if inner:
            header[table][inner] = value
        else:
            header[table] = value
    layout["__metadata__"]["rtdetr"] = json.dumps(header)
    if entry is not None:
        layout[next(name for name in layout if name != "__metadata__")] = entry
    text = json.dumps(layout).encode()
    to.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    return to


HEADERS: list[dict[str, Any]] = [
    {"architecture": [1]}, {"architecture__num_points": 3}, {"architecture__decoder_layers": 10**9},
    {"architecture__depth_mult": 1e9}, {"architecture__hidden_dim": 16_384}, {"metrics": {"AP": "x"}},
    {"metrics": [1]}, {"dataset": "x"}, {"extra": {"gate": 3}}, {"extra": {"gate": {"passed": True, "sha256": [1]}}},
    {"imgsz": [0, 0]}, {"imgsz": [10**6, 10**6]}, {"imgsz": 64}, {"layers": 10**9}, {"queries": -1}, {"queries": "9"},
    {"names": ["a", "b", "\ud800"]}, {"names": 3}, {"names": []}, {"category_ids": [1, 2, True]}, {"sampling": "x"},
    {"thresholds": {"target": "f1"}}, {"preprocessing": [[]]},
]  # fmt: skip


@pytest.mark.parametrize("changes", HEADERS, ids=str)
def test_a_header_with_a_wrong_field_is_refused(
    rtdetr: Callable[..., Any], shapes_model: Path, photo: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = spoiled(shapes_model, tmp_path / "m.safetensors", **changes)
    rtdetr("predict", photo, "-w", path, "--no-save", code=4)
    assert rtdetr("info", path).code in (0, 4)


@pytest.mark.parametrize(
    "entry",
    [{"shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "data_offsets": [0, 4]}, [], {"dtype": 3},
     {"dtype": "F32", "shape": [1], "data_offsets": [0, float("inf")]}, {"dtype": "F32", "shape": [-1],
     "data_offsets": [0, 4]},
     {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}],
    ids=str,
)  # fmt: skip
def test_a_wrong_tensor_entry_is_refused(
    rtdetr: Callable[..., Any], shapes_model: Path, photo: Path, tmp_path: Path, entry: Any
) -> None:
    path = spoiled(shapes_model, tmp_path / "m.safetensors", entry=entry)
    assert rtdetr("predict", photo, "-w", path, "--no-save").code == 4
    assert rtdetr("info", path).code in (0, 4)


def test_deep_and_endless_documents_are_refused(rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path) -> None:
    for text in ("[" * 100_000, "[" * 100 + "]" * 100, "9" * 5000, "\xff"):
        with pytest.raises(ValueError, match=r"deep|digits|decode|Expecting"):
            parse_json(text)
    text = b"[" * 100_000
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert rtdetr("info", tmp_path / "m.safetensors").code == 4
    assert rtdetr("train", "--config", "/dev/zero").code == 2
    assert rtdetr("train", "--data", "x", "--set", "x=" + "[" * 3000).code == 2
    os.mkfifo(tmp_path / "m.onnx")
    assert rtdetr("info", tmp_path / "m.onnx").code == 4


@pytest.mark.parametrize(
    "flags",
    [["--seed", str(2**64)], ["--workers", "100000"], ["--epochs", "1" + 30 * "0"], ["--set", "cache_gb=inf"],
     ["--set", "model.decoder_layers=1000000000"], ["--set", "model.depth_mult=1e9"],
     ["--effective-batch",
     "1000000000"]],
    ids=str,
)  # fmt: skip
def test_a_number_beyond_all_bounds_is_refused(rtdetr: Callable[..., Any], flags: list[str]) -> None:
    rtdetr("train", "--data", "gone", *flags, code=2, err="expected")


@pytest.mark.parametrize(
    "words",
    [["compare", "{model}", "{model}", "--batch", "{digits}"], ["eval", "{model}", "--batch", "{digits}"],
     ["eval", "{model}", "--imgsz", "{digits}"], ["predict", "x.jpg", "-w", "{model}", "--classes", "{digits}"],
     ["benchmark", "{model}", "--sweep", "layers={digits}"], ["train", "--data", "x", "--device", "{digits}"],
     ["train", "--data", "x", "--device", "cpu:{digits}"], ["benchmark", "{model}", "--batch", "99999999999"],
     ["export", "{model}", "--batch", "99999999999"], ["benchmark", "{model}", "--threads", "99999999999"],
     ["predict", "x.jpg", "-w", "{model}", "--threads", "99999999999"],
     ["predict", "x.jpg", "-w", "{model}", "--batch", "99999999999"], ["demo", "x", "--epochs", "99999999999"],
     ["validate", "x", "--resplit", "0.8,0.2", "--seed", "-1"]],
    ids=lambda words: f"{words[0]} {words[-1]}",
)  # fmt: skip
def test_a_number_far_too_large_is_refused(rtdetr: Callable[..., Any], shapes_model: Path, words: list[str]) -> None:
    ran = rtdetr(*(word.format(model=shapes_model, digits="9" * 5000) for word in words))
    assert ran.code in (2, 3), ran.err
    assert "limit" not in ran.err


def test_an_input_of_one_cell_cannot_be_trained(rtdetr: Callable[..., Any], shapes_data: Path) -> None:
    ran = rtdetr("train", "--data", shapes_data, "--preset", "tiny", "--weights", "none", "--imgsz", "32", code=2)
    assert "too small for training" in ran.err


def test_a_bomb_of_aliases_is_refused(rtdetr: Callable[..., Any], tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "data.yaml").write_text("\n".join([*lines, "train: images", "names: *a11", ""]))
    ran = rtdetr("validate", tmp_path / "data.yaml", code=3)
    assert "aliases" in ran.out + ran.err


def test_a_label_line_of_5000_digits_is_read_in_no_time(rtdetr: Callable[..., Any], tmp_path: Path) -> None:
    """It took a pattern with nested repetitions hours."""
    for i in range(3):
        Image.new("RGB", (48, 32)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text("0 0" + "9" * 5000)
    assert rtdetr("validate", tmp_path).code == 3


STATES: dict[str, Callable[[torch.Tensor], Any]] = {
    "scalar": lambda t: torch.tensor(1.0),
    "empty": lambda t: torch.zeros(0),
    "complex": lambda t: t.to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "integers": lambda t: t.to(torch.int32),
    "expanded": lambda t: torch.zeros(1).expand(1 << 30),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_checkpoint_with_an_odd_tensor_is_refused(
    rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path, kind: str
) -> None:
    from safetensors.torch import load_file

    state: dict[str, Any] = {n: t.float() if t.is_floating_point() else t for n, t in load_file(shapes_model).items()}
    name = "decoder.enc_score_head.weight"
    state[name] = STATES[kind](state[name])
    torch.save({"model": state}, tmp_path / "m.pth")
    assert rtdetr("info", tmp_path / "m.pth").code == 4


def test_a_compressed_pickle_is_not_unpacked(
    rtdetr: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 MiB of zeros take 300 kB on disk, and so would 300 GiB take little."""
    torch.save({"model": {"x": torch.zeros(3)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for name in plain.namelist():
            with packed.open(name, "w") as entry:
                entry.write(plain.read(name))
                for _ in range(300 if name.endswith("/0") else 0):
                    entry.write(bytes(1 << 20))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("it was unpacked"))
    rtdetr("info", tmp_path / "m.pth", code=4, err="truncated or damaged")


@pytest.mark.parametrize("text", [b"lr = [", b"", b"epochs = 'many'\n", b"nonsense = 3\n", b"\xff"])
def test_a_run_with_broken_settings_says_what_is_still_usable(
    rtdetr: Callable[..., Any], shapes_model: Path, tmp_path: Path, text: bytes
) -> None:
    run = tmp_path / "r"
    run.mkdir()
    shutil.copy(shapes_model, run / "best.safetensors")
    (run / "manifest.json").write_text('{"finished": null}')
    (run / "config.toml").write_bytes(text)
    for command in ("train", "finetune-discrete"):
        ran = rtdetr(command, "--resume", run, code=4)
        assert str(run / "config.toml") in ran.err
        assert f"{run / 'best.safetensors'} is still usable" in ran.err


def write_graph(path: Path, *, image: tuple[int, ...] = (1, 3, 64, 64), **outputs: Any) -> Path:
    """Write a graph of the published contract with constant outputs, some replaced."""
    constants = {
        "labels": np.array([[0, 1]], np.int64),
        "boxes": np.array([[[2, 3, 20, 22], [5, 5, 30, 28]]], np.float32),
        "scores": np.array([[0.9, 0.8]], np.float32),
    } | outputs
    nodes, infos = [], []
    for name, array in constants.items():
        nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name)))
        infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, image),
        helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, (1, 2)),
    ]
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, infos), opset_imports=opset, ir_version=8), path)
    return path


def test_a_graph_that_keeps_the_contract_runs(rtdetr: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    ran = rtdetr("predict", photo, "-w", write_graph(tmp_path / "m.onnx"), "--no-save", "--json", code=0)
    assert [d["label"] for d in ran.json["detections"]] == ["class 0", "class 1"]


@pytest.mark.parametrize(
    "changes",
    [{"labels": np.array(["a", "b"], object)}, {"scores": np.float32(0.5) * np.ones((), np.float32)},
     {"boxes": np.ones((1, 2, 3), np.float32)}, {"boxes": np.ones((1, 3, 4), np.float32)},
     {"labels": np.ones((2,), np.int64)}, {"scores": np.ones((1, 3), np.float32)}, {"image": (1, 3, 10**6, 10**6)},
     {"image": (10**6, 3, 64, 64)}, {"image": (1, 1, 64, 64)}],
    ids=str,
)  # fmt: skip
def test_a_graph_that_breaks_the_contract_is_refused(
    rtdetr: Callable[..., Any], photo: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = write_graph(tmp_path / "m.onnx", **changes)
    rtdetr("predict", photo, "-w", path, "--no-save", code=4)
    assert rtdetr("info", path).code == 0


def test_a_graph_that_does_not_open_leaves_no_colors_of_the_runtime(
    rtdetr: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    """ONNX Runtime writes its own log to the terminal, past Python."""
    path = write_graph(tmp_path / "m.onnx", **{"": np.zeros((1, 2), np.float32)})
    ran = rtdetr("predict", photo, "-w", path, "--no-save", code=4)
    assert "\x1b" not in ran.err


@pytest.mark.parametrize("label", [2, -1])
@pytest.mark.parametrize("command", ["predict", "eval"])
def test_a_label_out_of_range_is_the_models_fault(
    rtdetr: Callable[..., Any], photo: Path, shapes_data: Path, tmp_path: Path, label: int, command: str
) -> None:
    names = [category["name"] for category in json.loads(shapes_data.read_text())["categories"]]
    graph = write_graph(tmp_path / "m.onnx", labels=np.array([[0, len(names) + 1 if label > 0 else label]], np.int64))
    model = onnx.load(graph)
    header = {"names": names, "category_ids": list(range(len(names))), "imgsz": [64, 64]}
    onnx.helper.set_model_props(model, {"rtdetr": json.dumps(header)})
    onnx.save(model, graph)
    words = [photo, "-w", graph, "--no-save"] if command == "predict" else [graph, "--data", shapes_data]
    rtdetr(command, *words, code=4, err=f"out of range ({len(names)} classes: 0-{len(names) - 1})")


def test_a_graph_cannot_read_a_file_outside_its_folder(rtdetr: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "model").mkdir()
    path = write_graph(tmp_path / "model/m.onnx")
    graph = onnx.load(path)
    tensor = helper.make_tensor("outside", TensorProto.FLOAT, [2], bytes(8), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    graph.graph.initializer.append(tensor)
    graph.graph.node.append(helper.make_node("Identity", ["outside"], ["copied"]))
    graph.graph.output.append(helper.make_tensor_value_info("copied", TensorProto.FLOAT, [2]))
    path.write_bytes(graph.SerializeToString())
    rtdetr("predict", photo, "-w", path, "--no-save", code=4, err="secret")


def test_pipes_lists_and_odd_names_do_not_stop_a_folder(
    rtdetr: Callable[..., Any], photo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph = write_graph(tmp_path / "m.onnx")
    shots = tmp_path / "shots"
    shots.mkdir()
    os.mkfifo(shots / "pipe.jpg")
    (shots / "list.mkv").write_text(f"ffconcat version 1.0\nfile {photo}\n")
    odd = os.fsdecode(b"\xff\x1b[2J\n\x7f.jpg")
    for name in (odd, "last.jpg"):
        (shots / name).write_bytes(photo.read_bytes())
    found = [str(path) for path in sorted(shots.iterdir())]
    ran = rtdetr("predict", *found, "-w", graph, "--out", tmp_path / "out", "--save-json", "--save-txt", code=1)
    assert "pipe.jpg is a pipe" in ran.err
    assert "list.mkv is not a video" in ran.err
    assert ran.out.count("2 detections") + ran.out.count("class") >= 2
    assert "\x1b" not in ran.out + ran.err
    assert (tmp_path / "out" / odd).is_file()
    lines = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    assert {Path(json.loads(line)["image"]).name for line in lines} == {odd, "last.jpg"}
    assert rtdetr("predict", shots / "pipe.jpg", "-w", graph).code == 3


def test_results_do_not_replace_each_other_or_files_of_others(
    rtdetr: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    graph = write_graph(tmp_path / "m.onnx")
    named = photo.with_name("classes.jpg")
    named.write_bytes(photo.read_bytes())
    out = tmp_path / "out"
    assert rtdetr("predict", named, "-w", graph, "--save-txt", "--out", out).code == 0
    assert sorted(path.name for path in (out / "labels").iterdir()) == ["classes_2.txt"]
    assert rtdetr("predict", named, "-w", graph, "--save-txt", "--out", out).code == 0, "our own results are replaced"

    other = tmp_path / "other"
    other.mkdir()
    (other / "photo.jpg").write_text("mine")
    rtdetr("predict", photo, "-w", graph, "--out", other, code=2, err="did not write")
    assert (other / "photo.jpg").read_text() == "mine"


@pytest.mark.parametrize("link", ["labels", "in", "labels/in"])
def test_results_are_not_written_through_a_link(
    rtdetr: Callable[..., Any], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    graph = write_graph(tmp_path / "m.onnx")
    (tmp_path / "shots/in").mkdir(parents=True)
    shutil.copy(photo, tmp_path / "shots/in/a.jpg")
    shutil.copy(photo, tmp_path / "shots/b.jpg")
    words = ("predict", tmp_path / "shots", "-w", graph, "--save-txt", "--out", tmp_path / "out")
    assert rtdetr(*words).code == 0
    linked, elsewhere = tmp_path / "out" / link, tmp_path / "elsewhere"
    shutil.move(linked, elsewhere)
    linked.symlink_to(elsewhere)
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}
    rtdetr(*words, code=2, err=f"{linked} is a link")
    assert {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")} == before


@pytest.fixture
def clip(tmp_path: Path, write_video: Callable[..., Path]) -> Path:
    return write_video(tmp_path / "clip.mp4", np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), 6)


@pytest.mark.parametrize("text", ["{clip}", "ffconcat version 1.0\nfile {clip}\n", "#EXTM3U\n{clip}\n"])
def test_a_text_called_mkv_does_not_play_another_video(
    rtdetr: Callable[..., Any], shapes_model: Path, clip: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "list.mkv").write_text(text.format(clip=clip))
    ran = rtdetr("predict", tmp_path / "list.mkv", "-w", shapes_model, "--out", tmp_path / "out")
    assert ran.code in (1, 3)
    assert "is not a video" in ran.out + ran.err
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_a_damaged_video_brings_no_messages_of_ffmpeg(clip: Path, tmp_path: Path) -> None:
    """In a process of its own, since FFmpeg decides with the first video how much it says."""
    data = clip.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])  # without the index at its end
    (tmp_path / "spoiled.mp4").write_bytes(data[:60] + bytes(200) + data[260:])
    program = """import sys
from rtdetr_cli.images.decode import ImageError
from rtdetr_cli.infer.video import Video
for path in sys.argv[1:]:
    try:
        video = Video(__import__("pathlib").Path(path))
        while video.read() is not None:
            pass
    except ImageError as error:
        print(error)
"""
    paths = [str(tmp_path / name) for name in ("cut.mp4", "spoiled.mp4")]
    ran = subprocess.run([sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True)
    assert "cut.mp4 does not decode as a video" in ran.stdout
    assert not ran.stderr


def test_frames_of_a_video_and_images_get_different_names(tmp_path: Path) -> None:
    from rtdetr_cli.infer.sources import find_sources

    for order in (("clip.mp4", "clip_000000.jpg"), ("clip_000000.jpg", "clip.mp4")):
        names = [str(source.name) for source in find_sources([str(tmp_path / name) for name in order])]
        frames = {f"{name}_000000" for name, file in zip(names, order, strict=True) if file == "clip.mp4"}
        assert not frames & set(names)
