"""Half precision that is half precision: a typed graph whose sensitive parts stay float32.

TensorRT 11 builds nothing but what the types of the graph say, so the precision of every tensor is decided here. The
traced program is rewritten once, and the same rewritten program is exported to ONNX and run in torch: the twin
computes with half-precision tensors, so that an overflow comes out as one, which ONNX Runtime's CPU kernels hide
because they compute most float16 operators in float32.

Why not a converter of finished ONNX files: NVIDIA's AutoCast (nvidia-modelopt 0.47, Apache-2.0, kept up) chooses its
islands by thresholds on the values of a calibration run and knows no module names, which an ONNX graph has lost; its
ONNX part pins onnx 1.21 and onnxruntime-gpu 1.24 and brings cupy, polygraphy and graphsurgeon along, which a CPU user
never needs; and it gives no twin. onnxconverter-common (MIT, small) casts by operator type alone. Here a rule may name
a module, and its weights are stored in the type that they are used in.

Which parts: measured by tests/bench/bench_half_islands.py on a `tiny` trained on blood cells (24 images, 2,347
detections). Everything in half moves scores by 4.1e-4 on average and boxes by 2.4e-3 of IoU; with the islands 1.1e-4
and 4.7e-4. The first convolution is worth most, then the score heads; norms, softmax, locations and refinement hardly
show there. Those stay float32 for their range (a sum of squares, an exponential, a logarithm near 0) and for maps
larger than the measured ones, and cost little.

How a type is decided: convolutions and matrix products are half unless an island holds them; everything else takes
the widest type of its inputs, as autocast does. What an island gives is float32, so what is computed from it stays
float32 until the next convolution or matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from rtdetr_cli.export.onnx import MAX_BATCH, quiet
from rtdetr_cli.infer.detections import Detections
from rtdetr_cli.infer.graph import finish_raw
from rtdetr_cli.weights.header import ModelHeader

HEAVY = ("conv2d", "linear", "matmul", "bmm", "addmm", "scaled_dot_product_attention")


@dataclass(frozen=True, slots=True)
class Island:
    """A part that stays float32.

    Attributes:
        name: what it is.
        why: the reason.
        holds: tells from the module's path and the operator's name whether it belongs.
    """

    name: str
    why: str
    holds: Callable[[str, str], bool]


ISLANDS = (
    Island(
        "first convolution",
        "grey levels over 255 are not exact in half, and all that follows inherits the error: the largest of all "
        "modules by ten times, for under one per cent of the work",
        lambda path, op: path.endswith("conv1.conv1_1.conv"),
    ),
    Island(
        "norms",
        "a norm sums squares over all channels; the sums before it grow beyond 65504 and lose the small terms",
        lambda path, op: op in ("layer_norm", "native_layer_norm"),
    ),
    Island(
        "softmax over points",
        "the weights of a query's points must sum to one, and exp overflows at 11",
        lambda path, op: op in ("softmax", "_softmax") and path.endswith("cross_attn"),
    ),
    Island(
        "sampling locations",
        "a location times the map's size must be right to a fraction of a pixel; half steps are 1/16 pixel at 80",
        lambda path, op: path.endswith("sampling_offsets"),
    ),
    Island(
        "inverse sigmoid",
        "log(x / (1 - x)) near 0 and 1, clipped at 1e-5, lies below what half can tell apart",
        lambda path, op: op in ("sigmoid", "log", "logit"),
    ),
    Island(
        "box refinement",
        "each layer adds to the last one's box: rounding to 11 bits adds up, a pixel in 2048 for each",
        lambda path, op: "bbox_head" in path,
    ),
    Island(
        "top-k scores",
        "thousands of nearly equal scores: rounded to half they tie, and other queries are selected",
        lambda path, op: "score_head" in path,
    ),
)


def island_of(path: str, op: str) -> Island | None:
    """Return the island that an operator belongs to."""
    return next((island for island in ISLANDS if island.holds(path, op)), None)


def stays_single(path: str, op: str) -> bool:
    """Tell whether an operator belongs to any island."""
    return island_of(path, op) is not None


def half_program(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    dynamic: bool = False,
    single: Callable[[str, str], bool] = stays_single,
) -> fx.GraphModule:
    """Rewrite a module with half-precision types.

    Args:
        module: float32, in eval mode.
        inputs: example inputs, as for `export.onnx.trace`.
        dynamic: leave the batch open.
        single: tells from the module's path and the operator's name what stays float32.

    Returns:
        A module with the same float32 inputs and outputs.
    """
    return halve(traced_program(module, inputs, dynamic=dynamic), single)


def traced_program(module: nn.Module, inputs: Sequence[Tensor], *, dynamic: bool = False) -> fx.GraphModule:
    """Trace a module into a program of plain operators that remember which module they came from."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = tuple({0: batch} for _ in inputs) if dynamic else None
    with quiet(), torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=shapes)
        return program.module(check_guards=False)


def halve(graph_module: fx.GraphModule, single: Callable[[str, str], bool] = stays_single) -> fx.GraphModule:
    """Rewrite a traced program with half-precision types, in place.

    Args:
        graph_module: made by `traced_program`.
        single: tells from the module's path and the operator's name what stays float32.
    """
    graph = graph_module.graph
    types: dict[fx.Node, torch.dtype] = {}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def typed(node: fx.Node, wanted: torch.dtype) -> fx.Node:
        """Return `node` in the wanted type; weights are stored in it, activations are cast once for all readers."""
        if types.get(node, wanted) == wanted:
            return node
        if (node, wanted) not in casts:
            with graph.inserting_after(node):
                if node.op == "get_attr":
                    made = graph.get_attr(stored(node, wanted))
                else:
                    made = graph.call_function(torch.ops.aten.to.dtype, (node, wanted))
            types[made] = wanted
            casts[node, wanted] = made
        return casts[node, wanted]

    def stored(node: fx.Node, wanted: torch.dtype) -> str:
        value = attribute(graph_module, str(node.target)).detach()
        name = "half_" + str(node.target).replace(".", "_")
        if not hasattr(graph_module, name):
            graph_module.register_buffer(name, value.to(wanted))
        return name

    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            if is_float(node):
                types[node] = torch.float32
            continue
        if node.op == "output":
            node.args = fx.map_arg(node.args, lambda n: typed(n, torch.float32) if n in types else n)
            continue
        sources = [n for n in node.all_input_nodes if n in types]
        op = operator_name(node)
        if op == "_assert_tensor_metadata":  # holds a cast of the float32 program to the types it was traced with
            graph.erase_node(node)
            continue
        if op == "to" and sources and is_float(node):
            # A cast of the float32 program: the types are decided here, not there.
            types[node] = types[sources[0]]
            node.replace_all_uses_with(sources[0])
            continue
        if not sources:
            if is_float(node):
                types[node] = torch.float32
            continue
        if single(module_path(node), op):
            wanted = torch.float32
        elif op in HEAVY or all(types[n] == torch.float16 for n in activations(sources)):
            wanted = torch.float16
        else:
            wanted = torch.float32
        node.args = fx.map_arg(node.args, lambda n: typed(n, wanted) if n in types else n)  # noqa: B023
        node.kwargs = fx.map_arg(node.kwargs, lambda n: typed(n, wanted) if n in types else n)  # noqa: B023
        if is_float(node):
            types[node] = wanted
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()
    return graph_module


def activations(sources: list[fx.Node]) -> list[fx.Node]:
    """Return the inputs that decide a type: weights and tables are cast to whatever they meet."""
    return [n for n in sources if n.op != "get_attr"] or sources


def is_float(node: fx.Node) -> bool:
    """Tell whether a node's value, or any part of it, is float32."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        return True
    parts = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(part, Tensor) and part.dtype == torch.float32 for part in parts)


def attribute(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its dotted name."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return cast(Tensor, found)


def operator_name(node: fx.Node) -> str:
    """Return the plain name of the operator that a node calls, such as `conv2d`."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(node.target, "__name__", str(node.target))


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a node comes from, such as `model.decoder.dec_score_head.2`."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


class HalfTwin:
    """Run the rewritten program in torch, with tensors that really are half precision.

    On a GPU every operator runs as it is. On a CPU convolutions and matrix products would take thirty times as long,
    so they add up in float32 and round the result to half, which is what tensor cores do; everything between two
    operators is half either way, and overflows at 65504.
    """

    kind = "torch"
    fixed_batch: int | None

    def __init__(
        self, program: fx.GraphModule, header: ModelHeader, *, imgsz: tuple[int, int], fixed_batch: int | None
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.program = program.to(self.device)
        self.header = header
        self.imgsz = imgsz
        self.fixed_batch = fixed_batch

    @torch.inference_mode()
    def run(self, images: NDArray[np.uint8], sizes_wh: NDArray[np.int64]) -> list[Detections]:
        """Detect objects; see `infer.backend.Backend.run`."""
        found: list[Detections] = []
        step = self.fixed_batch or len(images)
        for start in range(0, len(images), step):
            rows = np.arange(start, start + step).clip(max=len(images) - 1)
            real = min(step, len(images) - start)
            scaled = torch.from_numpy(np.ascontiguousarray(images[rows])).to(self.device)
            scaled = scaled.permute(0, 3, 1, 2).float().contiguous() / 255
            sizes = torch.from_numpy(np.asarray(sizes_wh[rows], np.int64)).to(self.device)
            takes_sizes = sum(node.op == "placeholder" for node in self.program.graph.nodes) > 1
            inputs = (scaled, sizes) if takes_sizes else (scaled,)
            outputs = [t.cpu().numpy() for t in Accumulating(self.program).run(*inputs)]
            labels, boxes, scores = outputs if takes_sizes else finish_raw(outputs[0], outputs[1], sizes_wh[rows])
            found.extend(
                Detections(
                    boxes[i],
                    scores[i],
                    labels[i],
                    (int(sizes_wh[start + i, 0]), int(sizes_wh[start + i, 1])),
                    self.header.names,
                    self.header.category_ids,
                )
                for i in range(real)
            )
        return found


class Accumulating(fx.Interpreter):
    """Run a program; on the CPU, heavy half-precision operators add up in float32 and round once."""

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
