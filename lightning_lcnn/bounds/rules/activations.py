"""Ranges of the derivatives of our own layers, and the curve of any activation as it is now."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from lightning_lcnn.functional.bends import BENDS, Bend
from lightning_lcnn.functional.curves import Curve
from lightning_lcnn.kernels.modes import whole
from lightning_lcnn.layers.activation import CenteredSoftplus
from lightning_lcnn.layers.piecewise import PiecewiseSoftplus
from lightning_lcnn.layers.smooth import ScaledActivation, SmoothELU, SmoothHardswish, SmoothPReLU


def centered_softplus(beta: float | Tensor = 1.0) -> Curve:
    return Curve((0.0, 1.0), (0.0, beta / 4))


def piecewise_softplus(changes: tuple[float, ...], slope: float, softplus: CenteredSoftplus) -> Curve:
    steps = [slope + sum(changes[:count]) for count in range(len(changes) + 1)]
    rising = sum(change for change in changes if change > 0)
    unit = softplus.beta / 4
    return Curve((min(steps), max(steps)), (unit * (sum(changes) - rising), unit * rising))


def scaled_activation(activation: nn.Module, beta: float | Tensor) -> Curve:
    curve = curve_of_module(activation)
    if curve is None:
        raise ValueError(f"no ranges of the derivatives are known for the {type(activation).__name__} inside it")
    low, high = curve.bend
    return Curve(curve.slope, (beta * low, beta * high), curve.reason)


def smooth_prelu(weight: Tensor, softplus: CenteredSoftplus) -> Curve:
    weight = weight.detach()
    jump = (1 - weight) * softplus.beta / 4
    return Curve((weight.clamp_max(1), weight.clamp_min(1)), (jump.clamp_max(0), jump.clamp_min(0)))


def smooth_elu(alpha: float, scale: float, softplus: CenteredSoftplus) -> Curve:
    # left of 0 the slope is λαe^x + λ(1-α)σ(βx), right of it λ - λ(1-α)(1-σ(βx)); σ <= 1/2 left, <= e^x where β >= 1
    beta, half = float(softplus.beta.detach()), (1 - alpha) / 2
    left = (min(alpha, 0.0) + min(half, 0.0), max(alpha, 0.0) + max(half, 0.0))
    if alpha > 1 and beta >= 1:
        left = (0.0, alpha)
    elif 0 <= alpha <= 1:
        left = (0.0, 1.0)
    right = (min(1.0, 1 - half), max(1.0, 1 - half))
    jump = (1 - alpha) * beta / 4
    bend = (min(alpha, 0.0) + min(jump, 0.0), max(alpha, 0.0) + max(jump, 0.0))
    if alpha > 1 or alpha < 0:  # the exponential and the rounded kink bend against each other
        bend = (min(alpha, jump), max(alpha, jump))
    slope = (min(left[0], right[0]), max(left[1], right[1]))
    return Curve((scale * slope[0], scale * slope[1]), (scale * bend[0], scale * bend[1]))


def smooth_hardswish(curvature_ends: Callable[[], tuple[Tensor, Tensor]]) -> Curve:
    return Curve((-0.5, 1.5), curvature_ends())


# entries of our own layers beside those of torch's operations; looked up by exact class
OURS = (
    Bend("centered_softplus", centered_softplus, (CenteredSoftplus,)),
    Bend("piecewise_softplus", piecewise_softplus, (PiecewiseSoftplus,)),
    Bend("scaled_activation", scaled_activation, (ScaledActivation,)),
    Bend("smooth_prelu", smooth_prelu, (SmoothPReLU,)),
    Bend("smooth_elu", smooth_elu, (SmoothELU,)),
    Bend("smooth_hardswish", smooth_hardswish, (SmoothHardswish,)),
)
CURVES: dict[type[nn.Module], Callable[..., Curve]] = {
    cls: bend.curve
    for bend in (*BENDS, *OURS)
    for cls in bend.modules
    if bend.curve is not None and not bend.jumps  # what jumps has no slope and is refused
}


def curve_of(module: nn.Module, curve: Callable[..., Curve]) -> Curve:
    """Evaluate ``curve`` at the module's own attributes."""
    names = inspect.signature(curve).parameters
    values = {name: whole(getattr(module, name)) for name in names if hasattr(module, name)}
    return curve(**values)


def curve_of_module(module: nn.Module) -> Curve | None:
    """The curve of an activation as it is now, None for any other module; looked up by exact type."""
    curve = CURVES.get(type(module))
    return None if curve is None else curve_of(module, curve)
