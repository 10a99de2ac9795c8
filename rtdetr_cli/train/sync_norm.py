"""Batch norm over the images of all processes, as if one process had them all.

Not torch's SyncBatchNorm: that one makes the host wait for the device in every layer (it drops empty shares by a
mask), has no CPU, and leaves the other processes waiting for ever when one runs out of memory between two layers.
Here each layer says the same number of words of the same length, whatever happens: a process whose step failed says
the rest with zeros (`NormSync.finish`), and then all run the step again with smaller micro-batches.

Moments are joined from each process's mean and sum of squared deviations (Chan et al., 1979), which does not cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.train.processes import ProcessGroup


class NormSync:
    """Counts what the layers of one model say to those of the other processes.

    Attributes:
        layers: that speak in a forward pass, and again in the backward pass.
        width: channels of the widest.
        said: since the step began.
    """

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.members: list[SyncNorm] = []
        self.said = 0

    @property
    def layers(self) -> int:
        """Layers in training mode; frozen ones are silent."""
        return sum(m.training for m in self.members)

    @property
    def width(self) -> int:
        """Channels of the widest layer."""
        return max((m.num_features for m in self.members), default=0)

    def begin(self) -> None:
        """Begin a step."""
        self.said = 0

    def join_rows(self, row: Tensor) -> Tensor:
        """Return every process's row.

        Args:
            row: (R,) float32 on the device.

        Returns:
            (processes, R).
        """
        rows = row.new_zeros((self.processes.size, 2 * self.width + 1))
        rows[self.processes.rank, : len(row)] = row
        self.processes.all_reduce([rows])
        self.said += 1
        return rows[:, : len(row)]

    def finish(self, micro_batches: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Say what the others still wait for, after a step that failed here.

        Args:
            micro_batches: of the step.
            device: of the model.
            dtype: of its norms.
        """
        silence = torch.zeros((self.processes.size, 2 * self.width + 1), device=device, dtype=dtype)
        while self.said < 2 * self.layers * micro_batches:
            self.processes.all_reduce([silence])
            self.said += 1


class SyncNorm(nn.BatchNorm2d):
    """A batch norm that averages over the images of all processes while it trains."""

    def __init__(self, norm_sync: NormSync, norm: nn.BatchNorm2d) -> None:
        """Take the place of `norm`, with its very parameters and buffers."""
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=False)
        self.affine = True
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.norm_sync = norm_sync
        norm_sync.members.append(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.norm_sync)
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
        return y  # type: ignore[no-any-return]


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm_sync: NormSync
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = float(x.numel() // x.shape[1])
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
        rows = norm_sync.join_rows(torch.cat([mean, var * own, mean.new_full((1,), own)]))
        means, spreads, counts = torch.split(rows, [len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = (spreads + counts * (means - mean) ** 2).sum(0) / count
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.norm_sync = eps, norm_sync
        ctx.mark_non_differentiable(mean, var, count)
        y = functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, weight, mean, var, count = ctx.saved_tensors
        if dy.stride() != x.stride():
            # With fixed statistics, torch's kernel for CPUs gives a wrong gradient of a single image when the
            # layouts differ (seen in 2.15).
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        # With fixed statistics first; then what the statistics themselves owe to the input.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, (True, True, True)
        )
        rows = ctx.norm_sync.join_rows(torch.cat([dweight.to(mean.dtype), dbias.to(mean.dtype)]))
        along, level = rows.sum(0).split(len(mean))
        scale = torch.rsqrt(var + ctx.eps)
        slope = weight * scale * scale * along / count
        offset = weight * scale * level / count - slope * mean
        shape = (1, -1, 1, 1)
        dx = dx.sub_(torch.addcmul(offset.view(shape), x, slope.view(shape)).to(dx.dtype))
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def synchronize_norms(model: nn.Module, processes: ProcessGroup) -> NormSync | None:
    """Replace the batch norms of a model that are not frozen, in place.

    Parameters and buffers stay the same objects, and so do the names in the state dict.

    Returns:
        What counts their words; None where there is no live norm, or nobody to speak to.
    """
    if not processes.distributed:
        return None
    norm_sync = NormSync(processes)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.BatchNorm2d) or isinstance(child, SyncNorm):
                continue
            if child.weight is not None and child.weight.requires_grad and child.track_running_stats:
                setattr(parent, name, SyncNorm(norm_sync, child))
    return norm_sync if norm_sync.members else None
