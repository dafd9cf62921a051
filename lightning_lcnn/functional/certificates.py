"""Radii of ℓ₂ balls in which a margin provably stays positive, from bounds that hold everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from lightning_lcnn._checks import check_int


def lipschitz_radius(margin: Tensor, slope: Tensor) -> Tensor:
    """Radius from a slope bound.

    r = m / L

    Args:
        margin: m at the point, any shape.
        slope: L with ‖∇m‖₂ <= L everywhere, broadcastable.

    Returns:
        Radii, shaped like the inputs together; 0 where the margin is not positive or nothing is certified, never NaN.

    Source:
        Textbook; Tsuzuku et al. (2018).

    Example:
        >>> lipschitz_radius(torch.tensor([1.0, -1.0]), torch.tensor(4.0))
        tensor([0.2500, 0.0000])
    """
    wide = exact(margin)
    return rounded_down(_cleaned(wide / exact(slope), wide), torch.promote_types(margin.dtype, slope.dtype))


def taylor_radius(margin: Tensor, gradient_norm: Tensor, curvature: Tensor) -> Tensor:
    r"""Radius from the gradient at the point and a curvature bound.

    .. math:: r = \frac{2m}{g + \sqrt{g^2 + 2Km}}, \quad\text{the root of } m - g r - K r^2 / 2 = 0

    Args:
        margin: m at the point, any shape.
        gradient_norm: g = ‖∇m‖₂ at the point, broadcastable.
        curvature: K with λ_max(-∇²m) <= K everywhere, broadcastable; infinite where there is none.

    Returns:
        Radii, shaped like the inputs together; 0 where the margin is not positive or nothing is certified, never NaN.

    Source:
        Ours; the second-order Taylor bound along the line to the perturbed point.

    Example:
        >>> taylor_radius(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([4.0, float("inf")]))
        tensor([0.5000, 0.0000])
    """
    types = (margin.dtype, gradient_norm.dtype, curvature.dtype)
    margin, gradient_norm, curvature = exact(margin), exact(gradient_norm), exact(curvature)
    root = (gradient_norm.square() + 2 * curvature * margin.clamp_min(0)).sqrt()
    radius = _cleaned(2 * margin / (gradient_norm + root), margin)
    return rounded_down(radius, reduce(torch.promote_types, types))


def second_order_dual_radius(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    negative: Tensor,
    positive: Tensor,
    num_outer: int = 8,
    num_inner: int = 6,
) -> Tensor:
    r"""Radius from the dual of the distance to the decision boundary, which convexity makes solvable.

    .. math:: \tfrac12 r^2 = \max_{0 \le η < 1/K^-}\ \min_y\ φ(y), \quad φ(y) = \tfrac12\|y - x\|^2 + η\, m(y)

    φ is (1 - ηK⁻)-strongly convex, so that every y, however far from the minimum, proves
    :math:`\min φ \ge φ(y) - \|∇φ(y)\|^2 / (2 (1 - ηK^-))`: the iterations decide how good the radius is and never
    whether it holds. η is found by bisection, y by gradient descent.

    Args:
        function: m, from (B, …) to (B,), example by example, twice differentiable.
        x: points, shape (B, …).
        negative: K⁻ with λ_max(-∇²m) <= K⁻ everywhere, shape (B,).
        positive: K⁺ with λ_max(∇²m) <= K⁺ everywhere, shape (B,); only the steps depend on it.
        num_outer: values of η.
        num_inner: gradient steps for each.

    Returns:
        Radii (B,); 0 where the margin is not positive or nothing is certified, never NaN.

    Raises:
        ValueError: when a number of steps is below 1.

    Source:
        Singla and Feizi (2020), theorem 1; the correction for an inexact minimum is ours.

    Example:
        >>> bowl = lambda y: 1 - y.square().sum(1)  # K⁻ = 2; the boundary is at distance 1
        >>> radius = second_order_dual_radius(bowl, torch.zeros(1, 2), torch.tensor([2.0]), torch.tensor([0.0]))
        >>> bool(0.99 < radius < 1)
        True
    """
    check_int("num_outer", num_outer)
    check_int("num_inner", num_inner)
    margin, gradient = _value_and_gradient(function, x)
    dtype, x, negative, positive = x.dtype, exact(x), exact(negative), exact(positive)
    # a larger K⁻ is still a bound; it limits η where K⁻ is nearly 0, at the price of 0.03 % of the radius
    flat = gradient.flatten(1).square().sum(1) / margin.clamp_min(1e-30)
    bend = torch.maximum(negative, 1e-3 * flat).clamp_min(1e-12)
    low, high = torch.zeros_like(bend), 0.999 / bend
    best, y = torch.zeros_like(bend), x
    for step in range(num_outer):
        eta = high if step == 0 else (low + high) / 2
        rate = 1 / (1 + eta * positive.clamp(0, 1e30))
        for _ in range(num_inner):
            _, gradient = _value_and_gradient(function, y.to(dtype))
            y = y - _per_example(rate, y) * (y - x + _per_example(eta, y) * gradient)
        y = exact(y.to(dtype))  # the point at which the network runs
        value, gradient = _value_and_gradient(function, y.to(dtype))
        slope = (y - x + _per_example(eta, y) * gradient).flatten(1).square().sum(1)
        dual = (y - x).flatten(1).square().sum(1) / 2 + eta * value - slope / (2 * (1 - eta * bend))
        best = torch.maximum(best, dual.nan_to_num(0.0, 0.0, 0.0))
        low, high = torch.where(value > 0, eta, low), torch.where(value > 0, high, eta)
    return rounded_down(_cleaned((2 * best).sqrt(), margin), dtype)


def _value_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return exact(value.detach()), exact(gradient)


def exact(values: Tensor) -> Tensor:
    """In float64, but for devices that have none."""
    return values.float() if values.device.type == "mps" else values.double()


def rounded_down(radius: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of a type that is not above the radius."""
    rounded = radius.to(dtype)
    below = rounded - rounded.abs() * torch.finfo(dtype).eps
    return torch.where(exact(rounded) > radius, below, rounded)


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _cleaned(radius: Tensor, margin: Tensor) -> Tensor:
    """Zero where the margin is not positive or the formula gave no number (0/0, ∞/∞)."""
    return torch.where((margin > 0) & ~radius.isnan(), radius, torch.zeros_like(radius))
