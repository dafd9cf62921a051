"""How far the input gradient moves when the input does."""

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
