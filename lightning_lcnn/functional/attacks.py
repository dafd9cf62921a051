"""Projected gradient descent on the logit margin, so that adversarial accuracy needs no further package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._checks import check_choice, check_int, check_positive
from lightning_lcnn.functional.hessian_operator import value_and_input_gradient
from lightning_lcnn.functional.input_function import logits_of
from lightning_lcnn.functional.lanczos import safe_norm
from lightning_lcnn.functional.outputs import logit_margin


def projected_gradient_attack(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    radius: float,
    norm: str = "l2",
    num_steps: int = 20,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """Adversarial examples by projected gradient descent on the margin.

    δ ← Π(δ - a·g/‖g‖₂) for ℓ₂, δ ← Π(δ - a·sign g) for ℓ∞, g = ∇ margin, Π onto ‖δ‖ <= radius and the bounds

    Deterministic: it starts at x. Of all points visited it returns the one of least margin. The margin's gradient,
    unlike the loss's, does not vanish for confident examples.

    Args:
        model: maps (B, …) to logits (B, K); used as it is, no state is preserved.
        x: (B, …) within ``bounds``.
        target: (B,) class indices.
        radius: largest norm of the perturbation.
        norm: ``"l2"`` or ``"linf"``.
        num_steps: gradient steps.
        step_size: a; by default 2.5 radius / num_steps (Madry et al., 2018).
        bounds: least and greatest allowed input, or None.

    Returns:
        (B, …), detached.

    Raises:
        ValueError: if an argument is out of range.

    Source: Madry et al. (2018), on the margin.

    Example:
        >>> x = torch.tensor([[0.5, 0.2]])
        >>> projected_gradient_attack(torch.nn.Identity(), x, torch.tensor([0]), radius=0.1, norm="linf")
        tensor([[0.4000, 0.3000]])
    """
    check_positive("radius", radius)
    check_choice("norm", norm, ("l2", "linf"))
    check_int("num_steps", num_steps)
    step = 2.5 * radius / num_steps if step_size is None else step_size
    check_positive("step_size", step)
    low, high = bounds or (-math.inf, math.inf)
    column = (-1,) + (1,) * (x.ndim - 1)

    def function(point: Tensor) -> Tensor:
        return logit_margin(logits_of(model, point, None), target)

    def project(point: Tensor) -> Tensor:
        delta = point - x
        if norm == "linf":
            delta = delta.clamp(-radius, radius)
        else:
            delta = delta * (radius / safe_norm(delta).clamp(min=radius)).view(column)
        return (x + delta).clamp(low, high)

    best, best_margin = x.detach(), x.new_full((len(x),), torch.inf)
    point = x.detach()
    for remaining in range(num_steps, -1, -1):
        margin, gradient = value_and_input_gradient(function, point)
        better = margin < best_margin
        best = torch.where(better.view(column), point, best)
        best_margin = torch.where(better, margin, best_margin)
        if remaining:
            length = safe_norm(gradient).view(column)
            unit = gradient.sign() if norm == "linf" else gradient / torch.where(length == 0, 1, length)
            point = project(point - step * unit)
    return best
