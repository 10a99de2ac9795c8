"""Float16 graphs whose sensitive parts stay float32.

TensorRT 11 builds exactly the types of the graph, so the precision of every tensor is decided here. The traced
program is rewritten once; the result is exported to ONNX and also run in torch, as a twin that really computes with
float16 tensors. The twin shows overflows that ONNX Runtime hides, because its CPU kernels compute most float16
operators in float32.

NVIDIA's AutoCast (nvidia-modelopt 0.47) and onnxconverter-common work on finished ONNX files, which have lost the
module names, and give no twin; AutoCast also pins onnx and needs cupy.

Which parts stay float32 was measured by tests/bench/bench_half_islands.py on a `tiny` trained on blood cells (24
images, 2,347 detections): all in float16 moves scores by 4.1e-4 on average and boxes by 2.4e-3 of IoU; with the islands
below in float32, 1.1e-4 and 4.7e-4. Convolutions and matrix products are float16 unless an island contains them.
Everything else takes the widest type of its inputs, as in autocast, so what follows an island stays float32 until the
next convolution or matrix product.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from rtdetr_cli.export.onnx import batch_dimensions, quiet
from rtdetr_cli.infer.graph import GraphBackend, GraphSpec

HEAVY = ("conv2d", "linear", "matmul", "bmm", "addmm", "scaled_dot_product_attention")


@dataclass(frozen=True, slots=True)
class Island:
    """A part that stays float32; `contains` decides by the module's path and the operator's name."""

    name: str
    why: str
    contains: Callable[[str, str], bool]
    matrix_products: bool = False  # which Turing GPUs cannot compute in float32


def is_first_convolution(path: str, op: str) -> bool:
    """Return whether an operator belongs to the convolution that sees the image."""
    return path.endswith("conv1.conv1_1.conv")


ISLANDS = (
    Island(
        "first convolution",
        "gray levels divided by 255 are not exact in float16, and every later layer inherits the error: ten times "
        "the error of any other module, for under one percent of the work",
        is_first_convolution,
    ),
    Island(
        "norms",
        "a norm sums squares over all channels, which can exceed 65504 and lose small terms",
        lambda path, op: op in ("layer_norm", "native_layer_norm"),
    ),
    Island(
        "softmax over points",
        "the weights of a query's points must sum to one, and exp overflows above 11",
        lambda path, op: op in ("softmax", "_softmax") and path.endswith("cross_attn"),
    ),
    Island(
        "sampling locations",
        "a location times the map's size must be exact to a fraction of a pixel; float16 steps are 1/16 pixel at 80",
        lambda path, op: path.endswith("sampling_offsets"),
        matrix_products=True,
    ),
    Island(
        "inverse sigmoid",
        "log(x / (1 - x)) near 0 and 1, clipped at 1e-5, needs more than float16's resolution",
        lambda path, op: op in ("sigmoid", "log", "logit"),
    ),
    Island(
        "box refinement",
        "each layer adds to the box of the one before, so rounding to 11 bits accumulates: a pixel in 2048 per layer",
        lambda path, op: "bbox_head" in path,
        matrix_products=True,
    ),
    Island(
        "top-k scores",
        "thousands of scores are nearly equal: rounded to float16 they tie, and other queries are selected",
        lambda path, op: "score_head" in path,
        matrix_products=True,
    ),
)
TURING_ISLANDS = tuple(island for island in ISLANDS if not island.matrix_products)


def describe(islands: Sequence[Island]) -> list[dict[str, str]]:
    """Return what the header of a file says about its islands."""
    return [{"name": island.name, "why": island.why} for island in islands]


def stays_float32(path: str, op: str, islands: Sequence[Island]) -> bool:
    """Return whether an operator, by its module's path and its name, belongs to an island."""
    return any(island.contains(path, op) for island in islands)


def traced_program(module: nn.Module, inputs: Sequence[Tensor], *, dynamic: bool = False) -> fx.GraphModule:
    """Trace a float32 module in eval mode into a program of plain operators that record the module they come from."""
    with quiet(), torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=batch_dimensions(inputs, dynamic=dynamic))
        return program.module(check_guards=False)


def halve(graph_module: fx.GraphModule, islands: Sequence[Island] = ISLANDS) -> fx.GraphModule:
    """Rewrite a program of `traced_program` with float16 types, in place; its inputs and outputs stay float32."""
    graph = graph_module.graph
    types: dict[fx.Node, torch.dtype] = {}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def cast_to(dtype: torch.dtype, node: fx.Node) -> fx.Node:
        """Return `node` in a type; weights are stored in it, activations are cast once for all users."""
        if types.get(node, dtype) == dtype:
            return node
        if (node, dtype) not in casts:
            with graph.inserting_after(node):
                if node.op == "get_attr":
                    name = "half_" + str(node.target).replace(".", "_")
                    if not hasattr(graph_module, name):
                        value = operator.attrgetter(str(node.target))(graph_module)
                        graph_module.register_buffer(name, value.detach().to(dtype))
                    cast_node = graph.get_attr(name)
                else:
                    cast_node = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
            types[cast_node] = dtype
            casts[node, dtype] = cast_node
        return casts[node, dtype]

    for node in list(graph.nodes):
        if node.op == "output":
            node.args = fx.map_arg(node.args, functools.partial(cast_to, torch.float32))
            continue
        op = operator_name(node)
        sources = [n for n in node.all_input_nodes if n in types]
        if op == "_assert_tensor_metadata":  # asserts the types that the float32 program was traced with
            graph.erase_node(node)
        elif not sources:  # an input, a weight or a constant
            if is_float(node):
                types[node] = torch.float32
        elif op == "to" and is_float(node):  # a cast of the float32 program has no say here
            types[node] = types[sources[0]]
            node.replace_all_uses_with(sources[0])
        else:
            activations = [n for n in sources if n.op != "get_attr"] or sources  # weights follow their type
            half = op in HEAVY or all(types[n] == torch.float16 for n in activations)
            dtype = torch.float16 if half and not stays_float32(module_path(node), op, islands) else torch.float32
            node.args = fx.map_arg(node.args, functools.partial(cast_to, dtype))
            node.kwargs = fx.map_arg(node.kwargs, functools.partial(cast_to, dtype))
            if is_float(node):
                types[node] = dtype
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()
    return graph_module


def is_float(node: fx.Node) -> bool:
    """Return whether a node's value, or any part of it, is float32."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        return True
    parts = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(part, Tensor) and part.dtype == torch.float32 for part in parts)


def operator_name(node: fx.Node) -> str:
    """Return the plain name of the operator that a node calls, such as `conv2d`."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(node.target, "__name__", str(node.target))


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a node comes from, such as `model.decoder.dec_score_head.2`."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


class HalfTwin(GraphBackend):
    """Run the rewritten program in torch, with tensors that really are float16.

    On a GPU every operator runs as it is. On a CPU, float16 convolutions and matrix products would take thirty times
    as long, so they accumulate in float32 and round the result, as tensor cores do. All values between operators are
    float16 either way, and overflow at 65504.
    """

    kind = "torch"

    def __init__(self, program: fx.GraphModule, spec: GraphSpec, *, device: torch.device) -> None:
        self._program, self._spec, self._device = program.to(device), spec, device
        super().__init__(Path("float16 twin"))

    def open(self, device: Any, threads: int | None) -> GraphSpec:
        """Return what is known about the program, which is open already."""
        return self._spec

    @torch.inference_mode()
    def infer(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run one batch; return every output, in the order of `spec`."""
        inputs = [torch.from_numpy(array).to(self._device) for array in feeds.values()]
        outputs = Accumulating(self._program).run(*inputs)
        return [tensor.cpu().numpy() for tensor in outputs]


class Accumulating(fx.Interpreter):
    """Run a program; on the CPU, heavy float16 operators accumulate in float32 and round once."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator."""
        if n.op != "call_function" or operator_name(n) not in HEAVY:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        halves = [a for a in args if isinstance(a, Tensor) and a.dtype == torch.float16]
        if not halves or halves[0].is_cuda:
            return super().run_node(n)
        widened = tuple(a.float() if isinstance(a, Tensor) and a.dtype == torch.float16 else a for a in args)
        return self.call_function(cast(Any, n.target), widened, kwargs).half()
