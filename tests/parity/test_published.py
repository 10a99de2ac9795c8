"""Compare with the outputs of the official code, for weights that are generated from their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rtdetr_cli.model.denoising import DenoisingGroup
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.model.postprocess import select_detections
from rtdetr_cli.train.losses import compute_losses
from rtdetr_cli.weights.load import load_model

Stretched = Callable[[int, int, int], torch.Tensor]

# Float32: queries of almost equal score can swap with another number of threads, so 98 % must agree.
SCORE_TOLERANCE, BOX_TOLERANCE_PX, SHARE = 1e-4, 0.05, 0.98
# Float64: the official code is deterministic.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-7

MODELS = [("r18", "bilinear"), ("r18_discrete", "discrete"), ("deim_r18", "bilinear")]
TENSORS = {"r18": 538, "r18_discrete": 538, "deim_r18": 540}


@pytest.fixture(scope="module", params=MODELS, ids=[m[0] for m in MODELS])
def loaded(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> tuple[str, RTDETR, tuple[int, ...]]:
    name, sampling = request.param
    model, header = load_model(checkpoint(name), sampling=sampling)
    assert header.extra["tensors_loaded"] == header.extra["tensors_total"] == TENSORS[name]
    return name, model, header.category_ids


def test_detections(loaded: tuple[str, RTDETR, tuple[int, ...]], parity: Path, stretched: Stretched) -> None:
    name, model, category_ids = loaded
    with np.load(parity / f"{name}.npz") as reference:
        wanted = {key: reference[key] for key in reference}
    with torch.inference_mode():
        main = model(stretched(0, 640, 640).float()[None]).main
        labels, boxes, scores = select_detections(
            main.logits, main.boxes_cxcywh, torch.from_numpy(wanted["size"]).reshape(1, 2)
        )
    apart = np.abs(np.sort(main.logits[0].amax(-1).numpy()) - np.sort(wanted["logits"].max(-1)))
    assert np.mean(apart < SCORE_TOLERANCE) >= SHARE
    ids = np.array(category_ids)[labels[0].numpy()]  # the reference has COCO's ids
    agreed = 0
    for label, box, score in zip(wanted["det_labels"], wanted["det_boxes"], wanted["det_scores"], strict=True):
        near = np.abs(boxes[0].numpy() - box).max(-1) < BOX_TOLERANCE_PX
        agreed += bool((near & (ids == label) & (np.abs(scores[0].numpy() - score) < SCORE_TOLERANCE)).any())
    assert agreed >= SHARE * len(wanted["det_labels"])


@pytest.mark.parametrize("case", ["plain", "denoising"])
def test_losses_and_gradients(
    case: str,
    checkpoint: Callable[[str], Path],
    loaded: tuple[str, RTDETR, tuple[int, ...]],
    training: Callable[[str], tuple[dict[str, Any], dict[str, np.ndarray]]],
    stretched: Stretched,
) -> None:
    name, sampling = next(m for m in MODELS if m[0] == loaded[0])
    if name == "deim_r18":
        pytest.skip("DEIM has other losses; the references are detections only")
    model = load_model(checkpoint(name), sampling=sampling)[0].double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    document, arrays = training(name)
    wanted = document["cases"][case]
    boxes = [torch.tensor(t["boxes"], dtype=torch.float64) for t in document["targets"]]
    labels = [torch.tensor(t["labels"]) for t in document["targets"]]
    group = None
    if case == "denoising":
        groups = int(arrays["dn_num_group"])
        group = DenoisingGroup(
            class_ids=torch.from_numpy(arrays["dn_class_ids"]),
            boxes_unactivated=torch.from_numpy(arrays["dn_boxes_unactivated"]),
            attention_mask=torch.from_numpy(arrays["dn_attention_mask"]),
            positives=tuple(torch.from_numpy(arrays[f"dn_positive_{i}"]).long() for i in range(2)),
            targets=tuple(torch.arange(len(b)).repeat(groups) for b in boxes),
            num_groups=groups,
        )
    images = torch.stack([stretched(0, 320, 320), stretched(320, 640, 320)])
    terms = compute_losses(model(images, group), boxes, labels, num_boxes=4.0)
    assert terms.keys() == wanted["losses"].keys()
    for term, value in wanted["losses"].items():
        assert terms[term].item() == pytest.approx(value, rel=LOSS_TOLERANCE), term
    total = torch.stack(list(terms.values())).sum()
    assert total.item() == pytest.approx(wanted["total"], rel=LOSS_TOLERANCE)
    total.backward()
    parameters = dict(model.named_parameters())
    for parameter, norm in wanted["grad_norm"].items():
        gradient = parameters[parameter].grad
        assert gradient is not None, parameter
        assert gradient.norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE), parameter
    if sampling == "discrete":
        assert parameters["decoder.decoder.layers.0.cross_attn.sampling_offsets.weight"].grad is None


def test_given_denoising_group_has_our_mask(
    training: Callable[[str], tuple[dict[str, Any], dict[str, np.ndarray]]],
) -> None:
    from rtdetr_cli.model.denoising import attention_mask

    _, arrays = training("r18")
    ours = attention_mask(size=198, num_groups=int(arrays["dn_num_group"]), queries=300)
    assert np.array_equal(ours.numpy(), arrays["dn_attention_mask"])


def test_state_dict_has_the_published_names(parity: Path, loaded: tuple[str, RTDETR, tuple[int, ...]]) -> None:
    name, model, _ = loaded
    published = {}
    for line in (parity / "keys" / f"{name}.txt").read_text().splitlines():
        key, shape = line.split("\t")
        published[key] = tuple(int(n) for n in shape.strip("(),").split(",") if n.strip())
    computed = {"decoder.anchors", "decoder.valid_mask"}  # computed by our code
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        k: v for k, v in published.items() if k not in computed
    }
