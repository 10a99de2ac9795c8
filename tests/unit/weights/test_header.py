from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rtdetr_cli.errors import ModelError, RtdetrError
from rtdetr_cli.files import atomic_write
from rtdetr_cli.weights.header import ModelHeader, Thresholds, read_header, read_layout, rewrite_header
from rtdetr_cli.weights.load import save_model, tensors_identity

HEADER = ModelHeader(names=("cat", "Hündin"), category_ids=(3, 17), imgsz=(320, 480), architecture={"depth": 10})
TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(3),
    "c": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "mask": torch.tensor([True, False, True]),
}


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, TENSORS, HEADER)
    return path


def test_round_trip(model_file: Path) -> None:
    header = read_header(model_file)
    assert header.names == HEADER.names
    assert header.imgsz == (320, 480)
    assert header.identity == tensors_identity(load_file(model_file))
    assert len(header.identity) == 64
    assert header.version
    loaded = load_file(model_file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_identity_covers_only_the_tensors(tmp_path: Path) -> None:
    written = save_model(tmp_path / "one.safetensors", TENSORS, HEADER)
    again = save_model(tmp_path / "two.safetensors", dict(reversed(TENSORS.items())), replace(HEADER, names=("x", "y")))
    assert written.identity == again.identity
    for change in ({"a": torch.tensor(4)}, {"a": torch.tensor([3])}, {"b.weight": TENSORS["b.weight"].double()}):
        assert save_model(tmp_path / "x.safetensors", TENSORS | change, HEADER).identity != written.identity
    renamed = {("z" if name == "a" else name): tensor for name, tensor in TENSORS.items()}
    assert save_model(tmp_path / "x.safetensors", renamed, HEADER).identity != written.identity


def test_a_new_header_keeps_tensors_and_identity(model_file: Path) -> None:
    before = read_header(model_file)
    changed = replace(before, thresholds=Thresholds("f1", 0.4, (0.3, 0.5)), identity="wrong")
    returned = rewrite_header(model_file, changed)
    after = read_header(model_file)
    assert after == returned
    assert after.thresholds == Thresholds("f1", 0.4, (0.3, 0.5))
    assert after.identity == before.identity == tensors_identity(load_file(model_file))
    assert torch.equal(load_file(model_file)["b.weight"], TENSORS["b.weight"])
    assert read_layout(model_file).start % 8 == 0
    assert [p.name for p in model_file.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 20, 400, -1])
def test_truncated(model_file: Path, keep: int) -> None:
    whole = model_file.read_bytes()
    model_file.write_bytes(whole[:keep])
    with pytest.raises(ModelError) as error:
        read_header(model_file)
    assert str(model_file) in error.value.message


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html></html>" * 10, b"\0" * 100, b"PK\x03\x04" + b"x" * 100,
                                     (9).to_bytes(8, "little") + b'{"a": 12}'])  # fmt: skip
def test_foreign(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_header(path)


def test_missing_file_and_foreign_tensors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        read_header(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no rtdetr header"):
        read_header(tmp_path / "other.safetensors")


def test_damaged_header(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "m.safetensors", metadata={"rtdetr": json.dumps({"names": 3})})
    with pytest.raises(ModelError, match=r"m\.safetensors"):
        read_header(tmp_path / "m.safetensors")


def test_failure_leaves_the_old_file_and_nothing_beside_it(model_file: Path) -> None:
    before = model_file.read_bytes()

    def fail() -> None:
        with atomic_write(model_file) as aside:
            aside.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model_file.read_bytes() == before
    assert [p.name for p in model_file.parent.iterdir()] == ["model.safetensors"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RtdetrError) as error:
        save_model(tmp_path / "file" / "m.safetensors", TENSORS, HEADER)
    assert error.value.exit_code == 1


def test_permissions_follow_the_umask(model_file: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert model_file.stat().st_mode & 0o777 == 0o666 & ~mask
