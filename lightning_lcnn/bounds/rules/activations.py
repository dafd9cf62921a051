"""True ranges of the first and second derivative of every elementwise activation that torch offers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.kernels.modes import whole
from lightning_lcnn.layers.activation import CenteredSoftplus
from lightning_lcnn.layers.piecewise import PiecewiseSoftplus
from lightning_lcnn.layers.smooth import ScaledActivation, SmoothELU, SmoothHardswish, SmoothPReLU

_KINK = "has a kink: its slope jumps, so its second derivative is unbounded"


@dataclass(frozen=True)
class Curve:
    r"""Ranges of the derivatives of a scalar function s over the whole line.

    Args:
        slope: (inf s', sup s').
        bend: (inf s'', sup s''), infinite where s' jumps; each end a number, or a tensor of shape (C,) where
            every channel has its own.
        reason: why an end is infinite, or "".
    """

    slope: tuple[float | Tensor, float | Tensor]
    bend: tuple[float | Tensor, float | Tensor]
    reason: str = ""


# sup and inf rounded outwards in the last digit; tests/test_activation_curves.py compares with mpmath
def tanh() -> Curve:
    return Curve((0.0, 1.0), (-0.7698003589196, 0.7698003589196))


def sigmoid() -> Curve:
    return Curve((0.0, 0.25), (-0.0962250448650, 0.0962250448650))


def logsigmoid() -> Curve:
    return Curve((0.0, 1.0), (-0.25, 0.0))


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Curve:
    # torch returns x where beta * x > threshold: a jump of log1p(exp(-threshold)) / beta. From 20 on it is
    # below the resolution of float32 at that x; below 20 the function is truly discontinuous.
    if threshold < 20:
        why = f"Softplus(threshold={threshold}) jumps where it switches to x; use a threshold of at least 20"
        return Curve((0.0, math.inf), (-math.inf, math.inf), why)
    return Curve((0.0, 1.0), (0.0, beta / 4))


def silu(inplace: bool = False) -> Curve:
    return Curve((-0.0998393201289, 1.0998393201289), (-0.0369143731999, 0.5))


def gelu(approximate: str = "none") -> Curve:
    if approximate == "none":
        return Curve((-0.1289041451852, 1.1289041451852), (-0.1079819330264, 0.7978845608029))
    return Curve((-0.1289930686588, 1.1289930686588), (-0.1079135158904, 0.7978845608029))


def mish(inplace: bool = False) -> Curve:
    return Curve((-0.1125261223895, 1.0884981612518), (-0.0590333569540, 0.6442046372370))


def elu(alpha: float = 1.0, inplace: bool = False) -> Curve:
    slope = (min(0.0, alpha), max(1.0, alpha))
    low, high = min(0.0, alpha), max(0.0, alpha)
    if alpha == 1:
        return Curve(slope, (low, high))
    bend = (low, math.inf) if alpha < 1 else (-math.inf, high)  # s' jumps from alpha to 1 at 0
    return Curve(slope, bend, f"ELU(alpha={alpha}) {_KINK}")


def celu(alpha: float = 1.0, inplace: bool = False) -> Curve:
    if alpha <= 0:
        return Curve((0.0, math.inf), (-math.inf, math.inf), f"CELU(alpha={alpha}) grows without bound")
    return Curve((0.0, 1.0), (0.0, 1 / alpha))


def selu(inplace: bool = False) -> Curve:
    return Curve((0.0, 1.7580993408474), (-math.inf, 1.7580993408474), f"SELU {_KINK}")


def softsign() -> Curve:
    return Curve((0.0, 1.0), (-2.0, 2.0))


def tanhshrink() -> Curve:
    return Curve((0.0, 1.0), (-0.7698003589196, 0.7698003589196))


def relu(inplace: bool = False) -> Curve:
    return Curve((0.0, 1.0), (0.0, math.inf), f"ReLU {_KINK}")


def leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Curve:
    return _two_lines("LeakyReLU", negative_slope, negative_slope)


def rrelu(lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Curve:
    mean = (lower + upper) / 2
    return _two_lines("RReLU", lower if training else mean, upper if training else mean)


def hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Curve:
    return Curve((0.0, 1.0), (-math.inf, math.inf), f"Hardtanh {_KINK}")


def relu6(inplace: bool = False) -> Curve:
    return Curve((0.0, 1.0), (-math.inf, math.inf), f"ReLU6 {_KINK}")


def hardsigmoid(inplace: bool = False) -> Curve:
    return Curve((0.0, 1 / 6), (-math.inf, math.inf), f"Hardsigmoid {_KINK}")


def hardswish(inplace: bool = False) -> Curve:
    return Curve((-0.5, 1.5), (-math.inf, math.inf), f"Hardswish {_KINK}")


def softshrink(lambd: float = 0.5) -> Curve:
    return Curve((0.0, 1.0), (-math.inf, math.inf), f"Softshrink {_KINK}")


def absolute() -> Curve:
    return Curve((-1.0, 1.0), (0.0, math.inf), f"abs {_KINK}")


def sine() -> Curve:
    return Curve((-1.0, 1.0), (-1.0, 1.0))


def prelu(weight: Tensor) -> Curve:
    low, high = float(weight.detach().amin()), float(weight.detach().amax())
    return _two_lines("PReLU", low, high)


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


def _two_lines(name: str, low: float, high: float) -> Curve:
    """Slope 1 to the right of 0 and between ``low`` and ``high`` to its left."""
    slope = (min(low, 1.0), max(high, 1.0))
    if low == high == 1.0:
        return Curve(slope, (0.0, 0.0))
    bend = (-math.inf if high > 1 else 0.0, math.inf if low < 1 else 0.0)
    return Curve(slope, bend, f"{name} {_KINK}")


# curve, module class, functional and method names; the curve's parameters are the module's attributes and the
# function's arguments after the input
CURVES: tuple[tuple[Callable[..., Curve], tuple[type, ...], tuple[object, ...]], ...] = (
    (tanh, (nn.Tanh,), (torch.tanh, F.tanh, "tanh", "tanh_")),
    (sigmoid, (nn.Sigmoid,), (torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_")),
    (logsigmoid, (nn.LogSigmoid,), (F.logsigmoid,)),
    (softplus, (nn.Softplus,), (F.softplus,)),
    (silu, (nn.SiLU,), (F.silu,)),
    (gelu, (nn.GELU,), (F.gelu,)),
    (mish, (nn.Mish,), (F.mish,)),
    (elu, (nn.ELU,), (F.elu,)),
    (celu, (nn.CELU,), (F.celu, torch.celu)),
    (selu, (nn.SELU,), (F.selu, torch.selu)),
    (softsign, (nn.Softsign,), (F.softsign,)),
    (tanhshrink, (nn.Tanhshrink,), (F.tanhshrink,)),
    (relu, (nn.ReLU,), (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    (leaky_relu, (nn.LeakyReLU,), (F.leaky_relu,)),
    (rrelu, (nn.RReLU,), (F.rrelu,)),
    (hardtanh, (nn.Hardtanh,), (F.hardtanh,)),
    (relu6, (nn.ReLU6,), (F.relu6,)),
    (hardsigmoid, (nn.Hardsigmoid,), (F.hardsigmoid,)),
    (hardswish, (nn.Hardswish,), (F.hardswish,)),
    (softshrink, (nn.Softshrink,), (F.softshrink,)),
    (absolute, (), (torch.abs, abs, "abs")),
    (sine, (), (torch.sin, "sin", torch.cos, "cos")),
    (prelu, (nn.PReLU,), ()),
    (centered_softplus, (CenteredSoftplus,), ()),
    (piecewise_softplus, (PiecewiseSoftplus,), ()),
    (scaled_activation, (ScaledActivation,), ()),
    (smooth_prelu, (SmoothPReLU,), ()),
    (smooth_elu, (SmoothELU,), ()),
    (smooth_hardswish, (SmoothHardswish,), ()),
)
_OF_CLASS = {cls: curve for curve, classes, _ in CURVES for cls in classes}


def curve_of(module: nn.Module, curve: Callable[..., Curve]) -> Curve:
    """Evaluate ``curve`` at the module's own attributes."""
    names = inspect.signature(curve).parameters
    values = {name: whole(getattr(module, name)) for name in names if hasattr(module, name)}
    return curve(**values)


def curve_of_module(module: nn.Module) -> Curve | None:
    """The curve of an activation as it is now, None for any other module; looked up by exact type."""
    curve = _OF_CLASS.get(type(module))
    return None if curve is None else curve_of(module, curve)
