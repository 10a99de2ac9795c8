"""Batch norm over the images of all processes, as if one process had them all.

Not torch's SyncBatchNorm: that one makes the host wait for the device in every layer (it drops empty shares by a
mask), does not run on a CPU, and leaves the other processes waiting forever when one runs out of memory between two
layers. Here each layer makes the same number of reductions of the same size, whatever happens: a process whose step
failed makes the remaining ones with zeros (`NormSync.finish_step`), and then all of them run the step again with
smaller micro-batches.

Moments are merged from each process's mean and sum of squared deviations (Chan et al., 1979), which does not cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rtdetr_cli.train.processes import ProcessGroup


class NormSync:
    """Runs and counts the reductions of a model's synchronized norms: one in the forward pass of each, one backward."""

    def __init__(self, processes: ProcessGroup) -> None:
        self.processes = processes
        self.norms: list[SyncNorm] = []
        self._reductions = 0

    def begin_step(self) -> None:
        """Start counting the reductions of a step."""
        self._reductions = 0

    def all_gather(self, row: Tensor) -> Tensor:
        """Return every process's row, (processes, R), given this one's, (R,) float32 on the device."""
        rows = self._empty_rows(row)
        rows[self.processes.rank, : len(row)] = row
        self._all_reduce(rows)
        return rows[:, : len(row)]

    def finish_step(self, micro_batches: int) -> None:
        """Make the reductions that the others still wait for, after a step that failed in this process."""
        in_training = sum(norm.training for norm in self.norms)  # frozen norms make none
        rows = self._empty_rows(self.norms[0].weight.detach())
        while self._reductions < 2 * in_training * micro_batches:
            self._all_reduce(rows)

    def _empty_rows(self, like: Tensor) -> Tensor:
        # As wide as the widest norm needs, so that all reductions have the same size.
        width = max(norm.num_features for norm in self.norms)
        return like.new_zeros((self.processes.size, 2 * width + 1))

    def _all_reduce(self, rows: Tensor) -> None:
        self.processes.all_reduce([rows])
        self._reductions += 1


class SyncNorm(nn.BatchNorm2d):
    """A batch norm that averages over the images of all processes while it trains."""

    def __init__(self, sync: NormSync, norm: nn.BatchNorm2d) -> None:
        """Take over the parameters and buffers of `norm`."""
        super().__init__(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=False)
        self.affine = True
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.sync = sync
        sync.norms.append(self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W)."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps, self.sync)
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
        return y  # type: ignore[no-any-return]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, sync: NormSync
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        local_count = float(x.numel() // x.shape[1])
        var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(0, 2, 3), correction=0)
        rows = sync.all_gather(torch.cat([mean, var * local_count, mean.new_full((1,), local_count)]))
        means, deviations, counts = torch.split(rows, [len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = (deviations + counts * (means - mean) ** 2).sum(0) / count
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.sync = eps, sync
        ctx.mark_non_differentiable(mean, var, count)
        y = functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        x, weight, mean, var, count = ctx.saved_tensors
        if dy.stride() != x.stride():
            # With fixed statistics, torch's kernel for CPUs gives a wrong gradient for a single image if the layouts
            # differ (seen in 2.15).
            dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
        # The gradient with fixed statistics first, then the part that flows through the statistics.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, var, None, None, False, ctx.eps, (True, True, True)
        )
        rows = ctx.sync.all_gather(torch.cat([dweight.to(mean.dtype), dbias.to(mean.dtype)]))
        sum_dweight, sum_dbias = rows.sum(0).split(len(mean))
        scale = torch.rsqrt(var + ctx.eps)
        slope = weight * scale * scale * sum_dweight / count
        offset = weight * scale * sum_dbias / count - slope * mean
        shape = (1, -1, 1, 1)
        dx = dx.sub_(torch.addcmul(offset.view(shape), x, slope.view(shape)).to(dx.dtype))
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def synchronize_norms(model: nn.Module, processes: ProcessGroup) -> NormSync | None:
    """Replace the batch norms of a model that are not frozen, in place.

    Parameters and buffers stay the same objects under the same names.

    Returns:
        None if there is no such norm, or no other process.
    """
    if not processes.distributed:
        return None
    sync = NormSync(processes)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.BatchNorm2d) or isinstance(child, SyncNorm):
                continue
            if child.weight is not None and child.weight.requires_grad and child.track_running_stats:
                setattr(parent, name, SyncNorm(sync, child))
    return sync if sync.norms else None
