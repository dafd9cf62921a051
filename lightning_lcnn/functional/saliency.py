"""Input gradients as explanations, and how far two explanations agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._checks import check_positive
from lightning_lcnn.functional.hessian_operator import input_gradient
from lightning_lcnn.functional.input_function import Adapter, InputFunction, measure
from lightning_lcnn.functional.lanczos import common_directions, safe_norm
from lightning_lcnn.functional.outputs import Output


@dataclass(frozen=True, eq=False)
class SaliencyResult:
    """Input gradients of B examples at x and at x + δ."""

    clean: Tensor  # (B, …) ∇f(x)
    noisy: Tensor  # (B, …) ∇f(x + δ)
    noise: Tensor  # (1, …) δ, the same for every example


def saliency_under_noise(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    radius: float,
    output: str | Output = "margin",
    *,
    adapter: Adapter | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> SaliencyResult:
    """Input gradients of each example without and with one random perturbation: two saliency maps to compare.

    ∇f(x) and ∇f(x + δ), ‖δ‖₂ = radius

    δ is that of `gradient_stability` with ``num_samples=1`` and the same seed; the margin's rival class is that of x.

    Args:
        model: module in evaluation mode, or any callable, that maps (B, …) to logits (B, K).
        x: (B, …), floating point.
        target: (B,) class indices.
        radius: ℓ₂ norm of δ in the units of ``x``.
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable, as for `input_gradient_norm`.
        adapter: picks the logits out of what the model returns.
        batch_size: examples at a time.
        seed: of the private generator.

    Returns:
        `SaliencyResult` with ``clean`` and ``noisy`` of the shape of ``x``.

    Raises:
        ValueError: if ``radius`` is not positive; otherwise as `input_gradient_norm`.

    Source: gradient saliency, Simonyan et al. (2014); ours in the pairing.

    Example:
        >>> result = saliency_under_noise(lambda x: x**2, torch.tensor([[3.0, 4.0]]), torch.tensor([0]), radius=0.5)
        >>> result.clean
        tensor([[ 6., -8.]])
        >>> print(f"{(result.noisy - result.clean).norm().item():.4f}")
        1.0000
    """
    check_positive("radius", radius)
    noise = common_directions(x, 1, seed)
    noise = noise * (radius / safe_norm(noise).view((1,) * x.ndim))

    def pair(function: InputFunction, chunk: Tensor) -> Tensor:
        clean = input_gradient(function, chunk)
        return torch.stack([clean, input_gradient(function, chunk + noise.to(chunk.dtype))], dim=1)

    both = measure(pair, model, x, target, output=output, adapter=adapter, batch_size=batch_size)
    return SaliencyResult(both[:, 0], both[:, 1], noise)


def cosine_agreement(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two explanations of each example.

    ⟨a, b⟩ / (‖a‖₂ ‖b‖₂)

    Args:
        a: (B, …).
        b: (B, …).

    Returns:
        (B,) in [-1, 1]; 1 where both vanish, 0 where one does.

    Raises:
        ValueError: if the shapes differ.

    Source: ours.

    Example:
        >>> cosine_agreement(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 3.0]]))
        tensor([0.7071])
    """
    _check_shapes(a, b)
    lengths = [safe_norm(x) for x in (a, b)]
    column = (-1,) + (1,) * (a.ndim - 1)
    units = [x / torch.where(n == 0, 1, n).view(column) for x, n in zip((a, b), lengths, strict=True)]
    cosine = (units[0] * units[1]).flatten(1).sum(1).clamp(-1, 1)
    return torch.where((lengths[0] == 0) & (lengths[1] == 0), 1.0, cosine)


def top_k_agreement(a: Tensor, b: Tensor, fraction: float = 0.1) -> Tensor:
    """Share of the most important entries that two explanations of each example have in common.

    ``|top_k(|a|) ∩ top_k(|b|)| / k`` with k = fraction of the entries, at least one

    Two unrelated explanations share ``fraction`` on average.

    Args:
        a: (B, …).
        b: (B, …).
        fraction: of the entries that count as most important, in (0, 1].

    Returns:
        (B,) in [0, 1].

    Raises:
        ValueError: if the shapes differ or ``fraction`` is outside (0, 1].

    Source: Ghorbani et al. (2019), their top-k intersection.

    Example:
        >>> a, b = torch.tensor([[4.0, -3.0, 1.0, 0.0]]), torch.tensor([[-4.0, 0.0, 1.0, 0.0]])
        >>> top_k_agreement(a, b, fraction=0.5)
        tensor([0.5000])
    """
    _check_shapes(a, b)
    check_positive("fraction", fraction)
    if fraction > 1:
        raise ValueError(f"`fraction` must be at most 1, got {fraction}.")
    a, b = a.flatten(1).abs(), b.flatten(1).abs()
    k = max(1, round(fraction * a.shape[1]))
    chosen = [torch.zeros_like(x, dtype=torch.bool).scatter(1, x.topk(k, dim=1).indices, True) for x in (a, b)]
    return (chosen[0] & chosen[1]).sum(1) / k


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"`a` and `b` must have one shape (B, …), got {tuple(a.shape)} and {tuple(b.shape)}.")
