"""How far the input gradient, and the saliency map that is made of it, moves when the input does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._checks import check_choice, check_int, check_positive
from lightning_lcnn.functional.hessian_operator import HVP_MODES, HessianOperator, input_gradient
from lightning_lcnn.functional.input_derivatives import ratio
from lightning_lcnn.functional.input_function import Adapter, InputFunction, measure
from lightning_lcnn.functional.lanczos import common_directions, safe_norm
from lightning_lcnn.functional.outputs import Output


@dataclass(frozen=True, eq=False)
class GradientStabilityResult:
    """Relative changes of the input gradients of B examples."""

    values: Tensor  # (B,) mean over the random perturbations
    worst: Tensor  # (B,) largest change found, random ones included; a lower bound of the true worst
    samples: Tensor  # (B, S) the change for each random perturbation
    perturbation: Tensor  # (B, *shape) where `worst` was found


def gradient_stability(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    radius: float,
    output: str | Output = "margin",
    num_samples: int = 8,
    num_worst_steps: int = 0,
    *,
    hvp: str = "double_backward",
    adapter: Adapter | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> GradientStabilityResult:
    """Relative change of the input gradient under perturbations of given length.

    ‖∇f(x + δ) - ∇f(x)‖₂ / ‖∇f(x)‖₂ for ‖δ‖₂ = radius; small values mean stable explanations

    The random δ are uniform on the sphere, from a private generator, and the same for every example: values do not
    depend on batches and shards, and two models are compared on equal perturbations. The worst δ is sought by
    δ ← radius · H(x+δ)d / ‖H(x+δ)d‖ with d = ∇f(x+δ) - ∇f(x), the ascent direction of ‖d‖², half of the steps from the
    worst random δ and half from the opposite of what they found; where f is quadratic that is power iteration.

    Args:
        model: module in evaluation mode, or any callable, that maps (B, …) to logits (B, K).
        x: (B, …), floating point.
        target: (B,) class indices.
        radius: ℓ₂ norm of δ in the units of ``x``.
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable, as for `input_gradient_norm`.
        num_samples: random perturbations, each one gradient.
        num_worst_steps: steps towards the worst perturbation, each one Hessian-vector product; 5 to 10 are enough on
            trained networks (ours). 0 takes the worst of the random ones.
        hvp: kind of Hessian-vector product, as for `input_hessian_norm`.
        adapter: picks the logits out of what the model returns.
        batch_size: examples at a time.
        seed: of the private generator.

    Returns:
        `GradientStabilityResult` with ``values`` and ``worst``, both (B,).

    Raises:
        ValueError: if ``radius`` is not positive; otherwise as `input_hessian_norm`.

    Source: LCNN paper (random perturbations); the worst case is ours.

    Example:
        >>> def saddle(x):  # gradient (2 x_0, -2 x_1): every δ moves it by 2‖δ‖
        ...     return x**2
        >>> result = gradient_stability(saddle, torch.tensor([[3.0, 4.0]]), torch.tensor([0]), radius=0.5)
        >>> print(f"{result.values.item():.4f} {result.worst.item():.4f}")
        0.1000 0.1000
    """
    check_positive("radius", radius)
    check_int("num_samples", num_samples)
    check_int("num_worst_steps", num_worst_steps, minimum=0)
    check_choice("hvp", hvp, HVP_MODES)

    def stability(function: InputFunction, chunk: Tensor) -> GradientStabilityResult:
        search = _Search(function, chunk, radius)
        directions = common_directions(chunk, num_samples, seed)
        samples = [search.visit(direction.expand(chunk.shape)) for direction in directions]
        search.return_to_worst()
        for step in range(num_worst_steps):
            if step == (num_worst_steps + 1) // 2:  # δ and -δ are equal to first order and differ beyond it
                search.return_to_worst()
                search.visit(-search.perturbation)
            search.ascend(hvp)
        changes = torch.stack(samples, dim=1)
        return GradientStabilityResult(changes.mean(1), search.worst, changes, search.perturbation)

    return measure(stability, model, x, target, output=output, adapter=adapter, batch_size=batch_size)


class _Search:
    """Perturbations on the sphere that have been visited, and the worst of them for each example."""

    def __init__(self, function: InputFunction, x: Tensor, radius: float) -> None:
        self.function, self.x, self.radius = function, x, radius
        self.gradient = input_gradient(function, x)
        self.gradient_norm = safe_norm(self.gradient)
        self.perturbation = torch.zeros_like(x)
        self.worst = torch.full_like(self.gradient_norm, -1.0)
        self._current = self.perturbation

    def visit(self, direction: Tensor) -> Tensor:
        """Relative change at radius * direction / ‖direction‖; an example without direction stays where it is."""
        column = (-1,) + (1,) * (self.x.ndim - 1)
        length = safe_norm(direction).view(column)
        moved = direction * (self.radius / torch.where(length == 0, 1, length))
        self._current = torch.where(length == 0, self._current, moved.to(self.x.dtype))
        change = input_gradient(self.function, self.x + self._current) - self.gradient
        relative = ratio(safe_norm(change), self.gradient_norm)
        better = relative > self.worst
        self.worst = torch.where(better, relative, self.worst)
        self.perturbation = torch.where(better.view(column), self._current, self.perturbation)
        return relative

    def return_to_worst(self) -> None:
        """Go back to the worst perturbation of each example."""
        self._current = self.perturbation

    def ascend(self, hvp: str) -> None:
        """One step along the gradient of ‖∇f(x+δ) - ∇f(x)‖²."""
        operator = HessianOperator(self.function, self.x + self._current, hvp)
        self.visit(operator(operator.gradient - self.gradient))


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
