from __future__ import annotations

import collections
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import ModelError, UsageError
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.model.decoder import anchor_table
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.catalogue import find_published
from rtdetr_cli.weights.class_names import COCO_CATEGORY_IDS, COCO_NAMES, OBJECTS365_NAMES
from rtdetr_cli.weights.header import ModelHeader
from rtdetr_cli.weights.hub import content_problem
from rtdetr_cli.weights.load import load_model, save_model
from rtdetr_cli.weights.names import to_official
from rtdetr_cli.weights.published import read_published
from tests.models import header_of

IMAGES = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def header(spec: ModelSpec, classes: int = 5, **changes: Any) -> ModelHeader:
    return header_of(spec, tuple(f"c{i}" for i in range(classes)), **changes)


def same(one: RTDETR, other: RTDETR) -> bool:
    with torch.no_grad():
        return torch.equal(one(IMAGES).main.logits, other(IMAGES).main.logits)


# ---- our own files


@pytest.mark.parametrize(("sampling", "rounding"), [("bilinear", "published"), ("discrete", "nearest")])
def test_our_file_is_read_back_unless_a_byte_has_changed(
    tmp_path: Path, make_small: Callable[..., RTDETR], small_spec: ModelSpec, sampling: str, rounding: str
) -> None:
    model = make_small()
    model.set_sampling(sampling, rounding)
    model.set_inference(layers=2, queries=9)
    path = tmp_path / "m.safetensors"
    said = header(small_spec, sampling=sampling, rounding=rounding)
    save_model(path, model.state_dict(), replace(said, layers=2, queries=9))
    loaded, got = load_model(path)
    assert same(model, loaded)
    assert (got.layers, got.queries, got.sampling, got.rounding) == (2, 9, sampling, rounding)
    assert not loaded.training
    again, got = load_model(path, layers=1, queries=3, sampling="bilinear")
    assert (got.layers, got.queries, got.sampling) == (1, 3, "bilinear")
    assert again(IMAGES).main.logits.shape[1] == 3
    with pytest.raises(UsageError):
        load_model(path, layers=4)
    with pytest.raises(UsageError):
        load_model(path, sampling="nearest")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        load_model(path)


def test_our_file_is_recognized_whatever_its_first_byte(
    tmp_path: Path, make_small: Callable[..., RTDETR], small_spec: ModelSpec
) -> None:
    # The file begins with the length of its header; in one file of 32 its first byte is that of a pickle, 0x80.
    model, path = make_small(), tmp_path / "m.safetensors"
    starts = set()
    for length in range(0, 264, 8):
        save_model(path, model.state_dict(), header(small_spec, extra={"note": "x" * length}))
        starts.add(path.read_bytes()[0])
        assert load_model(path)[1].names == header(small_spec).names
    assert 0x80 in starts


def test_loading_does_not_advance_the_random_generator(
    tmp_path: Path, make_small: Callable[..., RTDETR], small_spec: ModelSpec
) -> None:
    save_model(tmp_path / "m.safetensors", make_small().state_dict(), header(small_spec))
    state = torch.get_rng_state()
    load_model(tmp_path / "m.safetensors")
    assert torch.equal(state, torch.get_rng_state())


def test_our_file_of_another_architecture(
    tmp_path: Path, make_small: Callable[..., RTDETR], small_spec: ModelSpec
) -> None:
    path = tmp_path / "m.safetensors"
    save_model(path, make_small().state_dict(), header(small_spec.model_copy(update={"decoder_layers": 4})))
    with pytest.raises(ModelError, match=r"decoder\.decoder\.layers\.3\..* is missing.* and \d+ more"):
        load_model(path)


# ---- published


def published_state(spec: ModelSpec, classes: int = 80, *, version: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A detector's tensors as a published file of either version holds them, for 640 pixels."""
    torch.manual_seed(seed)
    state = build_detector(spec, num_classes=classes).state_dict()
    if version == 1:
        renamed = {}
        for name, tensor in state.items():
            name = re.sub(r"^(encoder\.input_proj\.\d\.)conv\.", r"\g<1>0.", name)
            name = re.sub(r"^(encoder\.input_proj\.\d\.)norm\.", r"\g<1>1.", name)
            name = name.replace("enc_output.proj.", "enc_output.0.").replace("enc_output.norm.", "enc_output.1.")
            if not name.endswith("num_points_scale"):
                renamed[name] = tensor
        return renamed
    anchors = anchor_table([(80, 80), (40, 40), (20, 20)])
    state["decoder.anchors"] = torch.where(anchors.valid, anchors.logits, torch.inf)
    state["decoder.valid_mask"] = anchors.valid
    return dict(state)


SMALL_SQUARE = ModelSpec(
    depth=18, width=8, hidden_dim=32, encoder_ffn=48, expansion=0.5, heads=8, decoder_dim=32, decoder_ffn=40,
    decoder_layers=2, eval_layers=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("version", "layout"), [(2, "ema.module"), (1, "ema.module"), (2, "model"), (1, "bare"), (2, "wrapped")]
)
def test_published_layouts(tmp_path: Path, version: int, layout: str) -> None:
    state = published_state(SMALL_SQUARE, version=version)
    content: Any = {
        "ema.module": {"ema": {"module": state, "updates": 3}, "model": {"x": torch.zeros(1)}, "date": "2024"},
        "model": {"model": state, "last_epoch": 3, "lr_scheduler": {"milestones": collections.Counter({1000: 1})}},
        "bare": state,
        "wrapped": {f"module.{n}": t for n, t in state.items()},
    }[layout]
    torch.save(content, tmp_path / "x.pth")
    model, got = load_model(tmp_path / "x.pth")
    assert got.extra["tensors_loaded"] == got.extra["tensors_total"] == len(state)
    assert got.extra["layout"].startswith("RT-DETRv2" if version == 2 else "RT-DETR v1")
    assert got.names == COCO_NAMES
    assert got.category_ids == COCO_CATEGORY_IDS
    assert got.imgsz == (640, 640)
    assert ModelSpec(**got.architecture) == SMALL_SQUARE
    reference = build_detector(SMALL_SQUARE, num_classes=80).eval()
    v2 = published_state(SMALL_SQUARE)
    reference.load_state_dict({n: t for n, t in v2.items() if n in reference.state_dict()})
    assert same(model, reference)


@pytest.mark.parametrize(
    "name",
    ["r18", "r34", "r50m", "r50", "r101", "hgl", "hgx", "hgh", "r18-sp1", "r34-v1", "r50m-v1", "r101-objects365-coco",
     "r18-objects365"],
)  # fmt: skip
def test_every_published_architecture_is_derived(tmp_path: Path, name: str) -> None:
    entry = find_published(name)
    classes = entry.classes[-1]
    with torch.device("meta"):
        state = build_detector(entry.spec, num_classes=classes).state_dict()
    # Expanded tensors store a single value, so the file stays small.
    small = {n: torch.zeros((), dtype=t.dtype).expand(t.shape) for n, t in state.items()}
    for i in range(entry.spec.decoder_layers):
        constant = torch.full((3 * entry.points,), 1 / entry.points)
        small[f"decoder.decoder.layers.{i}.cross_attn.num_points_scale"] = constant
    torch.save({"ema": {"module": to_official(small, v1=entry.version == "v1")}}, tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 2_000_000
    file = read_published(tmp_path / "x.pth")
    assert file.spec == entry.spec
    assert {n: t.shape for n, t in file.state.items()} == {n: t.shape for n, t in state.items()}
    assert content_problem(entry, file) == ""
    for other in ("r18-v1", "r50", "hgl"):
        assert bool(content_problem(find_published(other), file)) == (other != name)


@pytest.mark.parametrize("points", [(1, 1, 1), (2, 4, 6), (3, 3, 3)])
def test_sampling_points_are_derived(tmp_path: Path, points: tuple[int, int, int]) -> None:
    spec = SMALL_SQUARE.model_copy(update={"num_points": points})
    torch.save(published_state(spec), tmp_path / "x.pth")
    assert read_published(tmp_path / "x.pth").spec == spec


@pytest.mark.parametrize(
    ("classes", "first", "ids"),
    [(365, "Person", (1, 365)), (366, "(unused)", (0, 365)), (3, "class 0", (0, 2))],
)
def test_class_names(tmp_path: Path, classes: int, first: str, ids: tuple[int, int]) -> None:
    torch.save(published_state(SMALL_SQUARE, classes), tmp_path / "x.pth")
    _, got = load_model(tmp_path / "x.pth")
    assert got.names[0] == first
    assert (got.category_ids[0], got.category_ids[-1]) == ids
    assert len(got.names) == classes
    assert len(set(OBJECTS365_NAMES)) == 365


def test_published_anchors_are_used_at_their_own_size_only(tmp_path: Path) -> None:
    state = published_state(SMALL_SQUARE)
    torch.save(state, tmp_path / "exact.pth")
    state["decoder.anchors"] = state["decoder.anchors"] + 0.05
    torch.save(state, tmp_path / "drifted.pth")
    (exact, _), (drifted, _) = load_model(tmp_path / "exact.pth"), load_model(tmp_path / "drifted.pth")
    assert same(exact, drifted)  # at 64 pixels both compute anchors
    large = torch.rand(1, 3, 640, 640)
    with torch.no_grad():
        assert not torch.equal(exact(large).main.boxes_cxcywh, drifted(large).main.boxes_cxcywh)


def test_anchors_of_another_number_are_ignored(tmp_path: Path) -> None:
    state = published_state(SMALL_SQUARE)
    state["decoder.anchors"], state["decoder.valid_mask"] = torch.zeros(1, 77, 4), torch.ones(1, 77, 1).bool()
    torch.save(state, tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth")[1].imgsz == (640, 640)


# ---- refused files


class Trap:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "ran"
    if legacy:
        (tmp_path / "x.pth").write_bytes(pickle.dumps(Trap(mark)))
    else:
        torch.save({"model": {"a": torch.zeros(1)}, "trap": Trap(mark)}, tmp_path / "x.pth")
    with pytest.raises(ModelError, match="not run") as error:
        load_model(tmp_path / "x.pth")
    assert error.value.code == "model-unsafe"
    assert not mark.exists()
    os.system(f"touch {mark}")  # the trap itself works
    assert mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_checkpoint(tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.pth"
    torch.save(published_state(SMALL_SQUARE), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError) as error:
        load_model(path)
    assert str(path) in error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"layer.weight": torch.zeros(2)}}, "not an RT-DETR checkpoint"),
        ({"a": 1}, "contains no state dict"),
        ([1, 2], "contains no state dict"),
        (torch.zeros(3), "contains no state dict"),
        ({}, "contains no state dict"),
        ({"backbone.stem.stem1.conv.weight": torch.zeros(1), "encoder.x": torch.zeros(1),
          "decoder.x": torch.zeros(1)}, "HGNetv2"),
        ({"backbone.conv1.x": torch.zeros(1), "encoder.x": torch.zeros(1), "decoder.x": torch.zeros(1)},
         "architecture cannot be derived"),
        ({"conv1.conv1_1.conv.weight": torch.zeros(32, 3, 3, 3)}, "only the weights of a backbone"),
    ],
)  # fmt: skip
def test_foreign_checkpoints(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "x.pth")


def test_a_web_page_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ModelError, match="web page"):
        load_model(tmp_path / "page.pth")
    with pytest.raises(ModelError, match="no model file"):
        load_model(tmp_path / "none.pth")
    with pytest.raises(ModelError, match="folder"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("encoder.pan_blocks.1.conv2.conv.weight", None),
        ("encoder.pan_blocks.1.conv2.conv.weight", torch.zeros(3)),
        ("decoder.extra", torch.zeros(1)),
    ],
)
def test_loading_is_strict(tmp_path: Path, name: str, tensor: Tensor | None) -> None:
    state = published_state(SMALL_SQUARE)
    state.pop(name, None)
    if tensor is not None:
        state[name] = tensor
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ModelError, match=re.escape(name)):
        load_model(tmp_path / "x.pth")


@pytest.mark.slow
def test_loading_does_not_import_the_compiler(tmp_path: Path) -> None:
    """It would take longer than everything else that a prediction does."""
    torch.save(published_state(SMALL_SQUARE), tmp_path / "x.pth")
    code = (
        "import sys; from pathlib import Path; from rtdetr_cli.weights.load import load_model\n"
        f"load_model(Path({str(tmp_path / 'x.pth')!r}))\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
