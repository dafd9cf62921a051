"""Slopes of many batch norms at once: one by one they are half the cost of a ResNet's surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.functional._sharded import scalar, whole


def batch_norm_log_slopes(layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """Logarithms of the evaluation slopes min(γ, max_c |w_c| / √(v_c + ε)), each of shape (), differentiable.

    Args:
        layers: batch norms with running statistics, torch's (γ = ∞) or ours.
    """
    if not layers:
        return ()
    first = layers[0].running_var
    dtype = torch.promote_types(first.dtype, torch.float32)
    variances = torch.cat([(layer.running_var + layer.eps).to(first.device, dtype) for layer in layers])
    weights = [torch.ones_like(m.running_var) if m.weight is None else whole(m.weight) for m in layers]
    gains = torch.cat([w.to(first.device, dtype) for w in weights]).abs() * variances.rsqrt()
    index = _layer_index(tuple(layer.num_features for layer in layers), first.device)
    slopes = gains.new_zeros(len(layers)).scatter_reduce(0, index, gains, "amax")
    log_slopes = slopes.clamp_min(torch.finfo(dtype).tiny).log()
    gammas = [getattr(layer, "log_gamma", None) for layer in layers]
    if any(gamma is not None for gamma in gammas):
        unlimited = log_slopes.new_full((), torch.inf)
        limits = [unlimited if gamma is None else scalar(gamma).to(first.device, dtype) for gamma in gammas]
        log_slopes = torch.minimum(log_slopes, torch.stack(limits))
    return log_slopes.unbind()


@lru_cache(maxsize=64)
def _layer_index(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Layer of every channel."""
    return torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)
