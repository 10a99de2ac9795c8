"""Layouts of other makers, out and back, with transformers itself as the judge of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rtdetr_cli import load
from rtdetr_cli.config.schema import ModelSpec
from rtdetr_cli.errors import GateError, ModelError, UsageError
from rtdetr_cli.export.compare import match_images
from rtdetr_cli.export.synthetic import synthetic_image
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.model.build import build_detector
from rtdetr_cli.weights.class_names import COCO_CATEGORY_IDS, COCO_NAMES
from rtdetr_cli.weights.header import Dedupe, ModelHeader, Thresholds
from rtdetr_cli.weights.load import load_model, save_model
from rtdetr_cli.weights.transformers_files import write_transformers
from rtdetr_cli.workflows.convert import LIMITS, agrees, convert, detect
from rtdetr_cli.workflows.starting_weights import settings_from_weights
from tests.models import header_of

transformers = pytest.importorskip("transformers")

SPEC = ModelSpec(
    depth=18, width=8, hidden_dim=32, encoder_ffn=48, expansion=0.5, heads=8, decoder_dim=32, decoder_ffn=40,
    decoder_layers=3, eval_layers=3, queries=20,
)  # fmt: skip
NAMES = ("cat", "Hündin", "traffic light")


def write(path: Path, spec: ModelSpec = SPEC, **changes: Any) -> ModelHeader:
    """Write a model of ours, with weights that are not as regular as the initial ones."""
    torch.manual_seed(0)
    model = build_detector(spec, num_classes=len(NAMES))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point() and "num_points_scale" not in name:
                tensor += 0.05 * torch.randn_like(tensor)
    facts = {"category_ids": (3, 17, 21), "imgsz": (96, 96), "thresholds": Thresholds("f1", 0.4, (0.4, 0.5, 0.6))}
    return save_model(path, model.state_dict(), header_of(spec, NAMES, **{**facts, **changes}))


def state_of(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    return load_model(path, **options)[0].state_dict()


HGNET = ModelSpec(**{**SPEC.model_dump(), "backbone": "hgnetv2-l", "freeze_norm": True, "freeze_at": 0})
VARIANTS: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "plain": (SPEC, {}),
    "discrete": (SPEC, {"sampling": "discrete"}),
    "rectangle": (SPEC, {"imgsz": (96, 160)}),
    "v1": (SPEC, {"extra": {"v1": True}}),
    "bottleneck, two of three layers": (SPEC.model_copy(update={"depth": 50, "freeze_norm": True}), {"layers": 2}),
    "HGNetv2": (HGNET, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_and_back(tmp_path: Path, variant: str) -> None:
    spec, changes = VARIANTS[variant]
    source, out = tmp_path / "m.safetensors", tmp_path / "hf"
    header = write(source, spec, **changes)
    done = convert(source, "hf", out)  # raises unless transformers detects the same
    assert done.match.rows > 0
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == ("rt_detr" if variant == "v1" else "rt_detr_v2")
    assert tuple(config["id2label"].values()) == NAMES
    model, again = load_model(out / "model.safetensors")
    assert (again.names, again.category_ids, again.imgsz) == (header.names, header.category_ids, header.imgsz)
    assert (again.thresholds, again.sampling) == (header.thresholds, header.sampling)
    assert again.extra["maker"] == "transformers"
    original = state_of(source)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    path, settings = settings_from_weights(str(out)) or pytest.fail("no settings")
    assert path == out / "model.safetensors"
    assert settings["imgsz"] == header.imgsz
    assert settings.get("sampling", "bilinear") == header.sampling
    unused = {n for n in original if n not in model.state_dict()}
    assert all(".2." in n for n in unused) if header.layers == 2 else not unused


@pytest.mark.parametrize("variant", ["discrete", "v1", "HGNetv2"])
def test_the_official_layout_and_back(tmp_path: Path, variant: str) -> None:
    spec, changes = VARIANTS[variant]
    source, out = tmp_path / "m.safetensors", tmp_path / "m.pth"
    header = write(source, spec, **changes)  # v1 files do not say how many heads they have: always eight
    done = convert(source, "official", out)
    names = torch.load(out, weights_only=True)["ema"]["module"]
    assert done.tensors == len(names)
    assert ("decoder.anchors" in names) == (variant != "v1")
    assert ("decoder.enc_output.0.weight" in names) == (variant == "v1")
    assert ("backbone.stem.stem2a.conv.1.weight" in names) == (variant == "HGNetv2")
    assert ('"discrete"' in done.notes[-1]) == (variant == "discrete")
    again, original = state_of(out, sampling=header.sampling), state_of(source)
    assert again.keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.items())


def test_our_own_layout_from_each_of_the_others(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    header = write(source)
    convert(source, "hf", tmp_path / "hf")
    convert(source, "official", tmp_path / "m.pth")
    for name, other in (("a", tmp_path / "hf/model.safetensors"), ("b", tmp_path / "m.pth")):
        out = tmp_path / f"{name}.safetensors"
        assert agrees(convert(other, "safetensors", out).match)
        assert load_model(out)[1].identity == header.identity


def test_rescored_duplicates_are_left_to_us(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors", dedupe=Dedupe(8.0))
    assert "--dedupe off" in convert(tmp_path / "m.safetensors", "official", tmp_path / "m.pth").notes[0]
    assert convert(tmp_path / "m.safetensors", "safetensors", tmp_path / "again.safetensors").notes == ()
    assert load_model(tmp_path / "again.safetensors")[1].dedupe_gamma == 8


def test_deim_and_points_that_differ_go_to_the_official_layout_only(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"decoder": "deim", "num_points": (2, 4, 6)})
    source = tmp_path / "m.safetensors"
    write(source, spec)
    with pytest.raises(ModelError, match=r"DEIM and sampling points that differ by scale \(2, 4, 6\)"):
        convert(source, "hf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    convert(source, "official", tmp_path / "m.pth")
    _, header = load_model(tmp_path / "m.pth")
    assert ModelSpec(**header.architecture).num_points == (2, 4, 6)
    assert header.extra["maker"] == "DEIM"


def test_transformers_own_folder_gives_its_outputs(tmp_path: Path) -> None:
    """What `save_pretrained` writes, with names as in memory (`o_proj`) or as in files (`out_proj`)."""
    write(tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", "hf", tmp_path / "hf")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "hf")
    for folder, save in (("files", theirs.save_pretrained), ("memory", None)):
        path = tmp_path / folder
        if save:
            save(path)
        else:
            path.mkdir()
            save_file({n: t.clone().contiguous() for n, t in theirs.state_dict().items()}, path / "model.safetensors")
            theirs.config.save_pretrained(path)
        model, header = load_model(path / "model.safetensors")
        assert header.imgsz == (640, 640)  # without preprocessor_config.json
        assert header.category_ids == (0, 1, 2)
        images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, got = theirs.eval()(pixel_values=images), model(images).main
        assert torch.allclose(got.logits, expected.logits, atol=1e-5)
        assert torch.allclose(got.boxes_cxcywh, expected.pred_boxes, atol=1e-5)


def test_our_facts_do_not_outlive_other_weights(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", "hf", tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.enc_output.0.bias"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    header = load_model(path)[1]
    assert header.thresholds is None
    assert header.category_ids == (0, 1, 2)


def test_classes_of_coco_have_its_own_names_and_ids(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"decoder_layers": 2, "eval_layers": 2})
    torch.manual_seed(0)
    state = build_detector(spec, num_classes=80).state_dict()
    names = tuple({"couch": "sofa", "airplane": "aeroplane"}.get(n, n) for n in COCO_NAMES)
    header = ModelHeader(names=names, category_ids=tuple(range(80)), imgsz=(96, 96), layers=2, queries=20)
    write_transformers(tmp_path / "hf", state, spec, header, v1=False)
    (tmp_path / "hf/rtdetr.json").unlink()
    got = load_model(tmp_path / "hf/model.safetensors")[1]
    assert (got.names, got.category_ids) == (COCO_NAMES, COCO_CATEGORY_IDS)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "detr"}, "model_type 'detr' is neither"),
        ("config.json", {"activation_function": "gelu"}, "activation_function is 'gelu', and only 'silu'"),
        ("config.json", {"learn_initial_query": True}, "learn_initial_query is True"),
        ("config.json", {"d_model": "wide"}, "d_model|decoder_dim"),
        ("config.json", {"decoder_layers": 2}, "is not part of the model"),
        ("config.json", {"backbone_config": {"model_type": "resnet"}}, "backbone resnet is not supported"),
        ("config.json", None, "there is no config.json beside it"),
        ("preprocessor_config.json", {"do_normalize": True}, "do_normalize is True"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 800}}, "height"),
        ("preprocessor_config.json", [1], "not a JSON object"),
    ],
)
def test_a_folder_that_cannot_be_followed_is_refused(tmp_path: Path, file: str, change: Any, message: str) -> None:
    folder = tmp_path / "hf"
    write(tmp_path / "m.safetensors")
    model, header = load_model(tmp_path / "m.safetensors")
    write_transformers(folder, model.state_dict(), SPEC, header, v1=False)
    path = folder / file
    if change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    else:
        path.write_text(json.dumps(change))
    with pytest.raises(ModelError, match=message):
        load_model(folder / "model.safetensors")


def test_a_layout_that_detects_something_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rtdetr_cli.workflows import convert as module

    def write_wrongly(path: Path, model: Any, header: ModelHeader, *, v1: bool) -> int:
        with torch.no_grad():
            model.decoder.dec_score_head[-1].bias += 0.1
        return write_official(path, model, header, v1=v1)

    write_official = module.write_official
    monkeypatch.setattr(module, "write_official", write_wrongly)
    write(tmp_path / "m.safetensors")
    with pytest.raises(GateError, match="it has been removed"):
        convert(tmp_path / "m.safetensors", "official", tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


def test_the_comparison_sees_small_differences(tmp_path: Path) -> None:
    write(tmp_path / "m.safetensors")
    (expected,) = detect(*load_model(tmp_path / "m.safetensors"), [synthetic_image(0)])

    def same_as(found: Detections) -> bool:
        return agrees(match_images([expected], [found], LIMITS, floor=0.0))

    assert same_as(expected)
    for field, step in (("scores", 2e-4), ("boxes_xyxy_px", 0.5), ("labels", 1)):
        values = (getattr(expected, field) + step).astype(getattr(expected, field).dtype)
        assert not same_as(replace(expected, **{field: values})), field
    assert not same_as(expected.keep(np.arange(len(expected)) < 10))


def test_command(tmp_path: Path, rtdetr: Callable[..., Any]) -> None:
    source, out = tmp_path / "m.safetensors", tmp_path / "hf"
    write(source)
    ran = rtdetr("convert", source, out, "--to", "hf", "--json", code=0)
    assert ran.json["agreement"]["passed"] is True
    assert rtdetr("convert", source, out, "--to", "hf").code == 2  # exists
    assert rtdetr("convert", source, tmp_path / "x", "--to", "paddle").code == 2
    assert "must end in .pth" in rtdetr("convert", source, tmp_path / "x", "--to", "official").err
    described = rtdetr("info", out, "--json").json["model"]
    assert (described["family"]["maker"], described["family"]["version"]) == ("transformers", "RT-DETRv2")
    assert described["header"]["names"] == list(NAMES)
    assert load(out, device="cpu").names == NAMES
    with pytest.raises(UsageError):
        convert(source, "hf", out)
