"""Parameter groups, an optimizer step that never waits for the device, and the moving average.

Groups follow from the type and the position of a module, where the official configurations list regular expressions
over names: there a parameter may match several of them, and a list in one file replaces the whole of its parent's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rtdetr_cli.config.schema import OptimSpec

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
BETAS = (0.9, 0.999)


def parameter_groups(model: nn.Module, optim: OptimSpec, *, lr: float, lr_backbone: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay; empty groups are left out.

    Norms have no weight decay; with `optim.decay_free` = `head-norm-bias`, neither have the biases of encoder and
    decoder. This includes the backbone's norms: the official configurations either say so or freeze them.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    members_by: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = name.startswith("backbone.")
        no_decay = id(parameter) in norms
        if optim.decay_free == "head-norm-bias" and not backbone:
            no_decay = no_decay or name.endswith("bias")
        members_by.setdefault((backbone, no_decay), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "lr": lr_backbone if backbone else lr,
            "weight_decay": 0.0 if no_decay else optim.weight_decay,
        }
        for (backbone, no_decay), members in sorted(members_by.items())
    ]


class FusedAdamW:
    """AdamW whose fused kernel also clips gradients, removes the loss scale and skips non-finite steps.

    The kernel divides each gradient by `grad_scale` and does nothing if `found_inf` is 1. Both are tensors on the
    device: clipping by the global norm is a division by max(1, norm / clip), removing the loss scale is another, and a
    step is skipped without a round trip to the host.

    Args:
        groups: from `parameter_groups`.
        clip_norm: largest global gradient norm.
        scaled: float16 arithmetic, which needs a loss scale.
    """

    growth_interval = 2000

    def __init__(self, groups: list[dict[str, Any]], *, clip_norm: float, scaled: bool = False, beta2: float = 0.999, muon: float = 0.0, muon_iters: int = 5, muon_skip: str = "") -> None:
        all_parameters = [p for g in groups for p in g["params"]]
        self.muon = None
        if muon:
            self.muon = Muon(groups, muon, muon_iters, muon_skip)
            chosen = self.muon.ids
            groups = [
                {**g, "params": [p for p in g["params"] if id(p) not in chosen], "names": []} for g in groups
            ]
            groups = [g for g in groups if g["params"]]
        plain = [{k: v for k, v in g.items() if k != "names"} for g in groups]
        self.adamw = torch.optim.AdamW(plain, betas=(0.9, beta2), fused=True)
        self.peaks = [float(g["lr"]) for g in groups]
        self.parameters = [p for g in groups for p in g["params"]]
        self.all_parameters = all_parameters
        self.clip_norm = clip_norm
        self.scaled = scaled
        device = self.parameters[0].device
        self.scale = torch.full((), 2.0**16 if scaled else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        # Allocated now and not in the first step, so that a step cannot run out of memory half-way.
        for parameter in self.parameters:
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def set_rate(self, share: float) -> None:
        """Set every group's learning rate to a share of its peak."""
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        if self.muon is not None:
            self.muon.share = share

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.all_parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update the parameters unless the loss or a gradient is not finite.

        Args:
            loss: () of the whole step.

        Returns:
            Two scalars () float32 on the device: found_inf, 1 if the step was skipped, and the gradients' global norm
            before clipping.
        """
        grads = [p.grad for p in self.all_parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) / self.scale
        found_inf = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
        # The kernel ignores the scale if found_inf is set, so a NaN here does no harm.
        self.adamw.grad_scale = self.scale * (norm / self.clip_norm).clamp(min=1.0)  # type: ignore[attr-defined]
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is not None:
            self.muon.step(found_inf)
        if self.scaled:
            torch._amp_update_scale_(self.scale, self.growth, found_inf, 2.0, 0.5, self.growth_interval)
        return found_inf, norm

    def state_dict(self) -> dict[str, Any]:
        """Return moments, step counts and the loss scale."""
        return {
            "moments": [dict(self.adamw.state[p].items()) for p in self.parameters],
            "scale": self.scale,
            "growth": self.growth,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in place."""
        for parameter, saved in zip(self.parameters, state["moments"], strict=True):
            for key, tensor in self.adamw.state[parameter].items():
                tensor.copy_(saved[key])
        self.scale.copy_(state["scale"])
        self.growth.copy_(state["growth"])


class Muon:
    """Prototype."""

    def __init__(self, groups: list[dict[str, Any]], share: float, iters: int, skip: str) -> None:
        self.iters = iters
        self.share = 1.0
        self.buckets: dict[tuple[int, int, float, float], list[Any]] = {}
        self.ids = set()
        skips = [w for w in skip.split("+") if w]
        for g in groups:
            for n, p in zip(g["names"], g["params"], strict=True):
                if p.ndim < 2 or any(w in n for w in skips):
                    continue
                parts = p.chunk(3) if n.endswith("in_proj_weight") else [p]
                rows, cols = parts[0].shape[0], parts[0].numel() // parts[0].shape[0]
                if rows < 16 or cols < 16 or "embed" in n:
                    continue
                self.ids.add(id(p))
                key = (rows, cols, g["lr"] * share, g["weight_decay"])
                self.buckets.setdefault(key, []).append([p, len(parts), torch.zeros_like(p, memory_format=torch.contiguous_format)])

    def step(self, found_inf: Tensor) -> None:
        keep = found_inf > 0
        for (rows, cols, lr, decay), members in self.buckets.items():
            mats = []
            for p, count, buf in members:
                if p.grad is None:
                    g = torch.zeros_like(buf)
                else:
                    g = torch.where(keep, torch.zeros_like(p.grad), p.grad)
                buf.lerp_(g, 0.05)
                u = g.lerp(buf, 0.95).reshape(count, rows, cols)
                mats.append(u)
            stack = orthogonalize(torch.cat(mats), self.iters)
            scale = 0.2 * max(rows, cols) ** 0.5 * lr * self.share
            scale = torch.where(keep, 0.0, scale)
            at = 0
            for p, count, _ in members:
                u = stack[at : at + count].reshape(p.shape)
                at += count
                p.data.mul_(1 - lr * self.share * decay).sub_(u * scale)


def orthogonalize(x: Tensor, iters: int) -> Tensor:
    """Newton-Schulz."""
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    x = x.to(torch.bfloat16)
    for _ in range(iters):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    x = x.float()
    return x.mT if flip else x


class MovingAverage:
    """An exponential moving average of a model's parameters and float buffers.

    It uses lerp, which leaves a constant unchanged: the official v*d + (1-d)*x rounds, and drifts by 2e-4 in 50,000
    updates even if nothing changes. torch's AveragedModel would not do: it averages all buffers or none, and the
    infinities among the anchors would become NaN.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self._averaged = list(_averaged_tensors(self.module))
        self._sources = list(_averaged_tensors(model))

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move by `weight` towards the model's present values."""
        torch._foreach_lerp_(self._averaged, self._sources, weight)


def _averaged_tensors(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter.data
    for buffer in model.buffers():
        # Anchors hold infinities, and inf - inf is NaN. They never change, so they need no average.
        if buffer.is_floating_point() and bool(torch.isfinite(buffer).all()):
            yield buffer


class NormStatistics:
    """A copy of the running statistics of a model's batch norms, to undo a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        moments = [getattr(m, name) for m in norms for name in ("running_mean", "running_var")]
        self._moments = [t for t in moments if isinstance(t, Tensor)]
        self._counts = [m.num_batches_tracked for m in norms if isinstance(m.num_batches_tracked, Tensor)]
        self._saved_moments = [t.clone() for t in self._moments]
        self._saved_counts = [t.clone() for t in self._counts]

    @torch.no_grad()
    def save(self) -> None:
        """Save the present statistics."""
        if self._moments:
            torch._foreach_copy_(self._saved_moments, self._moments)
            torch._foreach_copy_(self._saved_counts, self._counts)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the saved statistics."""
        if self._moments:
            torch._foreach_copy_(self._moments, self._saved_moments)
            torch._foreach_copy_(self._counts, self._saved_counts)

    @torch.no_grad()
    def restore_where(self, found_inf: Tensor) -> None:
        """Go back to the saved means and variances if `found_inf`, () on the device, is 1."""
        skipped = found_inf > 0
        for live, saved in zip(self._moments, self._saved_moments, strict=True):
            torch.where(skipped, saved, live, out=live)
