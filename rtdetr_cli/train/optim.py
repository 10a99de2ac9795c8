"""Parameter groups by rule, the optimizer's step without a host synchronisation, and the moving average.

Groups are made by module type and place, not by regular expressions over names: the published list names each
parameter once or more, silently, and a list in a leaf file replaces the whole of its parent's.
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
    """Sort the trainable parameters into groups of one rate and one weight decay.

    Norm parameters never decay, wherever `optim.decay_free` says so; `head-norm-bias` adds the biases of encoder and
    decoder. Backbone norms are free of decay under every rule: the published configurations either say so or freeze
    them.

    Returns:
        Groups with `params`, `names`, `lr` (the peak), `weight_decay` and `label`; empty ones are left out.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    sorted_by: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = name.startswith("backbone.")
        free = id(parameter) in norms
        if optim.decay_free == "head-norm-bias" and not backbone:
            free = free or name.endswith("bias")
        sorted_by.setdefault((backbone, free), []).append((name, parameter))
    groups = []
    for (backbone, free), members in sorted(sorted_by.items()):
        groups.append(
            {
                "params": [p for _, p in members],
                "names": [n for n, _ in members],
                "lr": lr_backbone if backbone else lr,
                "weight_decay": 0.0 if free else optim.weight_decay,
                "label": ("backbone" if backbone else "head") + (", no decay" if free else ""),
            }
        )
    return groups


class FusedAdamW:
    """AdamW whose clipping, loss scale and refusal of non-finite gradients happen inside one fused kernel.

    The fused kernel divides each gradient by `grad_scale` and does nothing at all where `found_inf` is 1. Both are
    tensors on the device: clipping by the global norm is a division by max(1, norm / clip), the loss scale is one
    too, and a step that must not happen is skipped without the host knowing of it.

    Args:
        groups: of `parameter_groups`.
        clip_norm: largest global gradient norm.
        scaled: float16 arithmetic, which needs a loss scale.
    """

    growth_interval = 2000

    def __init__(self, groups: list[dict[str, Any]], *, clip_norm: float, scaled: bool = False) -> None:
        plain = [{k: v for k, v in g.items() if k not in ("names", "label")} for g in groups]
        self.adamw = torch.optim.AdamW(plain, betas=BETAS, fused=True)
        self.peaks = [float(g["lr"]) for g in groups]
        self.parameters = [p for g in groups for p in g["params"]]
        self.clip_norm = clip_norm
        self.scaled = scaled
        device = self.parameters[0].device
        self.scale = torch.full((), 2.0**16 if scaled else 1.0, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)
        # Made now, not in the first step: then a step allocates nothing that could fail half-way.
        for parameter in self.parameters:
            self.adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def set_rate(self, share: float) -> None:
        """Set every group's rate to a share of its peak."""
        for group, peak in zip(self.adamw.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Update the parameters unless the loss or a gradient is not finite.

        Args:
            loss: () of the whole step.

        Returns:
            (found_inf, norm): () float32 on the device; 1 where the step was skipped, and the gradients' global norm
            before clipping.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) / self.scale
        found_inf = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
        # The kernel ignores the scale where found_inf is set, so that a NaN here does no harm.
        self.adamw.grad_scale = self.scale * (norm / self.clip_norm).clamp(min=1.0)  # type: ignore[attr-defined]
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self.adamw.step()
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
        """Take back what `state_dict` returned, in place."""
        for parameter, saved in zip(self.parameters, state["moments"], strict=True):
            for key, tensor in self.adamw.state[parameter].items():
                tensor.copy_(saved[key])
        self.scale.copy_(state["scale"])
        self.growth.copy_(state["growth"])


class MovingAverage:
    """An exponential moving average of a model's parameters and float buffers.

    With lerp, which leaves a constant as it is: the published v*d + (1-d)*x rounds, and drifts to 2e-4 in 50,000
    updates even where nothing moves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self._ours = list(_floats(self.module))
        self._theirs = list(_floats(model))

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """Move by `weight` towards the model as it is now."""
        torch._foreach_lerp_(self._ours, self._theirs, weight)


def _floats(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter.data
    for buffer in model.buffers():
        # Anchors hold infinities, and inf - inf is NaN: what never moves needs no average.
        if buffer.is_floating_point() and bool(torch.isfinite(buffer).all()):
            yield buffer


class NormStatistics:
    """A copy of the running statistics of a model's batch norms, to take a forward pass back."""

    def __init__(self, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        named = [getattr(m, n) for m in layers for n in ("running_mean", "running_var")]
        self._live = [t for t in named if isinstance(t, Tensor)]
        self._kept = [t.clone() for t in self._live]
        self._counts = [m.num_batches_tracked for m in layers if isinstance(m.num_batches_tracked, Tensor)]
        self._kept_counts = [t.clone() for t in self._counts]

    @torch.no_grad()
    def save(self) -> None:
        """Remember the statistics as they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)
            torch._foreach_copy_(self._kept_counts, self._counts)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to what was remembered."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)
            torch._foreach_copy_(self._counts, self._kept_counts)

    @torch.no_grad()
    def restore_where(self, found_inf: Tensor) -> None:
        """Go back where `found_inf`, () on the device, is 1, without the host knowing of it."""
        bad = found_inf > 0
        for live, kept in zip(self._live, self._kept, strict=True):
            torch.where(bad, kept, live, out=live)
