"""Projected gradient descent, so that adversarial accuracy and adversarial training need no further package."""

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
from lightning_lcnn.functional.outputs import logit_margin, per_example_loss


def projected_gradient_attack(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    radius: float,
    norm: str = "l2",
    num_steps: int = 20,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    objective: str = "margin",
    random_start: bool = False,
    keep: str = "best",
) -> Tensor:
    """Adversarial examples by projected gradient descent on the margin, or ascent on the loss.

    δ ← Π(δ - a·g/‖g‖₂) for ℓ₂, δ ← Π(δ - a·sign g) for ℓ∞, g = ∇ margin or -∇ loss, Π onto ‖δ‖ <= radius and the bounds

    By default deterministic, from x, and of all points visited it returns the one of least margin. The margin's
    gradient, unlike the loss's, does not vanish for confident examples.

    Args:
        model: maps (B, …) to logits (B, K); used as it is, no state is preserved.
        x: (B, …) within ``bounds``.
        target: (B,) class indices.
        radius: largest norm of the perturbation.
        norm: ``"l2"`` or ``"linf"``.
        num_steps: gradient steps.
        step_size: a; by default 2.5 radius / num_steps (Madry et al., 2018).
        bounds: least and greatest allowed input, or None.
        objective: ``"margin"``, to be lowered, or ``"loss"``, the cross-entropy, to be raised.
        random_start: start uniformly in the ball, from torch's global generator, in place of x.
        keep: ``"best"`` of the points visited, or the ``"last"``, which saves one forward pass.

    Returns:
        (B, …), detached.

    Raises:
        ValueError: if an argument is out of range.

    Source: Madry et al. (2018); on the margin: ours.

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
    check_choice("objective", objective, _OBJECTIVES)
    check_choice("keep", keep, ("best", "last"))
    low, high = bounds or (-math.inf, math.inf)

    def function(point: Tensor) -> Tensor:
        return _OBJECTIVES[objective](logits_of(model, point, None), target)

    def project(delta: Tensor) -> Tensor:
        return (x + _into_ball(delta, radius, norm)).clamp(low, high)

    x = x.detach()
    point = project(_random_in_ball(x, radius, norm)) if random_start else x
    best, least = point, x.new_full((len(x),), torch.inf)
    for remaining in range(num_steps, -1 if keep == "best" else 0, -1):
        value, gradient = value_and_input_gradient(function, point)
        better = value < least
        best, least = torch.where(_column(better, x), point, best), torch.where(better, value, least)
        if remaining:
            point = project(point - x - step * _unit(gradient, norm))
    return best if keep == "best" else point


def _negative_log_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Least where the loss is greatest; its gradient has the loss's direction and does not underflow in float16."""
    loss = per_example_loss(logits, target)
    return -loss.clamp(min=torch.finfo(loss.dtype).tiny).log()


_OBJECTIVES = {"margin": logit_margin, "loss": _negative_log_loss}


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view((-1,) + (1,) * (x.ndim - 1))


def _into_ball(delta: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "linf":
        return delta.clamp(-radius, radius)
    return delta * _column(radius / safe_norm(delta).clamp(min=radius), delta)


def _random_in_ball(x: Tensor, radius: float, norm: str) -> Tensor:
    """Uniform in the ball of the norm."""
    if norm == "linf":
        return radius * (2 * torch.rand_like(x) - 1)
    direction = _unit(torch.randn_like(x), norm)
    dimension = x[0].numel()
    length = radius * torch.rand(len(x), device=x.device, dtype=x.dtype) ** (1 / dimension)
    return direction * _column(length, x)


def _unit(gradient: Tensor, norm: str) -> Tensor:
    """Direction of the step; zero where the gradient is."""
    if norm == "linf":
        return gradient.sign()
    length = _column(safe_norm(gradient), gradient)
    return gradient / torch.where(length == 0, 1, length)
