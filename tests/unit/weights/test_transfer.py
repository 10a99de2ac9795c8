from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rtdetr_cli.errors import ModelError
from rtdetr_cli.model.backbone import ResNet
from rtdetr_cli.model.detector import RTDETR
from rtdetr_cli.weights.transfer import load_backbone, transfer_weights

SOURCE = ("person", "traffic light", "dog", "cat", "dog")
TARGET = ("wolf", "Dog", "traffic_light")


def test_classes_are_transferred_by_name(make_small: Callable[..., RTDETR]) -> None:
    source, target = make_small(num_classes=5, seed=1), make_small(num_classes=3, seed=2)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    table = transfer_weights(target, source.state_dict(), source_names=SOURCE, target_names=TARGET)
    assert [(r.name, r.source_name, r.source_label) for r in table.classes] == [
        ("wolf", None, None), ("Dog", "dog", 2), ("traffic_light", "traffic light", 1),
    ]  # fmt: skip
    assert sum(row.source_label is not None for row in table.classes) == 2
    assert len(table.by_class) == 2 + 2 * 3 + 1
    assert table.tensors_loaded == table.tensors_total - len(table.by_class)
    for name, tensor in target.state_dict().items():
        given = source.state_dict()[name]
        if name not in table.by_class:
            assert torch.equal(tensor, given), name
            continue
        assert torch.equal(tensor[1], given[2])
        assert torch.equal(tensor[2], given[1])
        assert torch.equal(tensor[0], before[name][0])
        if "denoising" in name:
            assert torch.equal(tensor[3], before[name][3])  # the padding row


def test_everything_is_transferred_between_equal_classes(make_small: Callable[..., RTDETR]) -> None:
    source, target = make_small(seed=1), make_small(seed=2)
    names = tuple("abcde")
    table = transfer_weights(target, source.state_dict(), source_names=names, target_names=names)
    assert table.tensors_loaded == table.tensors_total
    assert table.by_class == ()
    assert all(torch.equal(t, source.state_dict()[n]) for n, t in target.state_dict().items())


def test_other_sampling_points_are_reinitialized(make_small: Callable[..., RTDETR]) -> None:
    source, names = make_small(seed=1), tuple("abcde")
    same = make_small(seed=2)
    assert transfer_weights(same, source.state_dict(), source_names=names, target_names=names).reinitialized == ()
    for points in ((3, 3, 3), (4, 4, 4)):  # the latter as many as (2, 4, 6), but others
        target = make_small(seed=2, num_points=points)
        before = {n: t.clone() for n, t in target.state_dict().items()}
        table = transfer_weights(target, source.state_dict(), source_names=names, target_names=names)
        assert len(table.reinitialized) == 3 * 5
        assert all("cross_attn" in n for n in table.reinitialized)
        assert all(torch.equal(target.state_dict()[n], before[n]) for n in table.reinitialized)


def test_another_architecture_is_refused(make_small: Callable[..., RTDETR]) -> None:
    state = make_small(decoder_layers=2, eval_layers=2).state_dict()
    with pytest.raises(ModelError, match="missing") as caught:
        transfer_weights(make_small(), state, source_names="abcde", target_names="abcde")
    wide = make_small(decoder_dim=64).state_dict()
    with pytest.raises(ModelError, match="shape"):
        transfer_weights(make_small(num_classes=3), wide, source_names="abcde", target_names="xyz")
    assert "without --preset" in caught.value.hint


@pytest.mark.parametrize("frozen", [False, True])
def test_imagenet_backbone(tmp_path: Path, make_small: Callable[..., RTDETR], frozen: bool) -> None:
    torch.manual_seed(5)
    given = ResNet(depth=10, width=8).state_dict()
    torch.save(given, tmp_path / "backbone.pth")
    model = make_small(freeze_norm=frozen)
    table = load_backbone(model, tmp_path / "backbone.pth")
    own = model.backbone.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in own.items())
    assert table.tensors_loaded == len(own)
    assert all(not n.startswith("backbone.") for n in table.reinitialized)
    with pytest.raises(ModelError, match="another model") as caught:
        load_backbone(make_small(depth=18), tmp_path / "backbone.pth")
    assert caught.value.hint == "rtdetr weights list shows the backbone of each preset"  # none has one so narrow
    torch.save(ResNet(depth=18, width=64).state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ModelError) as caught:
        load_backbone(make_small(), tmp_path / "backbone.pth")
    assert caught.value.hint == "--preset r18"
