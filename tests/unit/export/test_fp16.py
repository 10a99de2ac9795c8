"""Float16: the types in the graph, and the twin in torch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from rtdetr_cli.export.artefacts import Artefact
from rtdetr_cli.export.fp16 import ISLANDS, Accumulating, Island, halve, traced_program


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {
        **{v.name: v.type.tensor_type.elem_type for v in values},
        **{t.name: t.data_type for t in inferred.graph.initializer},
    }


def test_types_of_the_graph(exported: dict[str, Artefact]) -> None:
    """Convolutions and most products are float16 and so are their weights; the islands are float32."""
    model = onnx.load(exported["fp16"].path)
    types = types_of(model)
    by_operator: dict[str, list[int]] = {}
    for node in model.graph.node:
        by_operator.setdefault(node.op_type, []).append(types[node.output[0]])
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    assert by_operator["Conv"].count(single) == 1  # the first
    assert by_operator["Conv"].count(half) > 20
    assert set(by_operator["LayerNormalization"]) == {single}
    assert by_operator["MatMul"].count(half) > by_operator["MatMul"].count(single)
    assert set(by_operator["TopK"]) == {single}
    assert by_operator["Softmax"].count(single) >= 2  # over points; the attention among queries may be float16
    assert set(by_operator["Log"]) == set(by_operator["Floor"]) == {single}
    assert exported["fp16"].path.stat().st_size < 0.65 * exported["onnx"].path.stat().st_size


@pytest.mark.parametrize(
    ("path", "op", "name"),
    [
        ("model.decoder.decoder.layers.0.norm2", "layer_norm", "norms"),
        ("model.decoder.decoder.layers.1.cross_attn", "softmax", "softmax over points"),
        ("model.decoder.decoder.layers.1.cross_attn.sampling_offsets", "linear", "sampling locations"),
        ("model.decoder", "log", "inverse sigmoid"),
        ("model.decoder.dec_bbox_head.1.layers.2", "linear", "box refinement"),
        ("model.decoder.enc_score_head", "linear", "top-k scores"),
        ("model.decoder.decoder.layers.1.self_attn", "softmax", None),
        ("model.backbone.conv1.conv1_1.conv", "conv2d", "first convolution"),
        ("model.backbone.conv1.conv1_2.conv", "conv2d", None),
    ],
)
def test_islands(path: str, op: str, name: str | None) -> None:
    assert next((island.name for island in ISLANDS if island.contains(path, op)), None) == name


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(self.norm(x + torch.relu(self.first(x)))),)


def test_rewritten_program() -> None:
    """Inputs and outputs stay float32, and everything does where the rule says so."""
    module = Small().eval()
    x = torch.randn(3, 8)
    expected = module(x)[0]
    half = halve(traced_program(module, (x,)))
    actual = Accumulating(half).run(x)[0]
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).abs().max() < 2e-2
    unchanged = halve(traced_program(module, (x,)), [Island("all", "", lambda path, op: True)])
    torch.testing.assert_close(Accumulating(unchanged).run(x)[0], expected, rtol=0, atol=0)
    names = {n for n, _ in half.named_buffers()}
    assert names == {"half_first_weight", "half_first_bias", "half_second_weight", "half_second_bias"}


def test_overflow() -> None:
    """Accumulating in float32 on the CPU does not hide values above 65504."""
    module = Small().eval()
    with torch.no_grad():
        module.first.weight *= 1e5
        module.norm.weight.zero_()
    x = torch.randn(3, 8)
    assert torch.isfinite(module(x)[0]).all()
    assert not np.isfinite(Accumulating(halve(traced_program(module, (x,)))).run(x)[0].detach().numpy()).all()


@pytest.mark.gpu
def test_twin_on_a_gpu() -> None:
    module = Small().eval()
    x = torch.randn(3, 8)
    expected = module(x)[0]
    program = halve(traced_program(module, (x,))).cuda()
    actual = Accumulating(program).run(x.cuda())[0].cpu()
    assert 0 < (actual - expected).abs().max() < 2e-2
