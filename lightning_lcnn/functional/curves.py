"""True ranges of the first and second derivative of torch's own functions of one number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

_KINK = "has a kink: its slope jumps, so its second derivative is unbounded"
_JUMP = "jumps, so it has no slope"


@dataclass(frozen=True)
class Curve:
    r"""Ranges of the derivatives of a scalar function s over the whole line.

    Args:
        slope: (inf s', sup s'), infinite where s itself jumps.
        bend: (inf s'', sup s''), infinite where s' jumps; each end a number, or a tensor of shape (C,) where
            every channel has its own.
        reason: why an end is infinite, or "".
    """

    slope: tuple[float | Tensor, float | Tensor]
    bend: tuple[float | Tensor, float | Tensor]
    reason: str = ""

    @property
    def has_kink(self) -> bool:
        """Whether s or its slope jumps: an end of s'' is infinite."""
        ends = (float(end.detach().abs().max()) if isinstance(end, Tensor) else end for end in self.bend)
        return any(map(math.isinf, ends))


# The parameters of a curve are those of torch's function after the input, in their order, and attributes of its module.
# sup and inf are rounded outwards in the last digit; tests/functional/test_bends.py compares them with derivatives.
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
        return Curve((-math.inf, math.inf), (-math.inf, math.inf), why)
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
    return scaled_elu(alpha)


def scaled_elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Curve:
    """λ max(x, 0) + λ α (e^{cx} - 1) for x < 0: what ELU, SELU and CELU are to ATen."""
    if input_scale <= 0 or scale < 0:
        why = f"ELU(scale={scale}, input_scale={input_scale}) grows without bound or falls where ELU rises"
        return Curve((-math.inf, math.inf), (-math.inf, math.inf), why)
    left = alpha * input_scale  # the slope left of 0, where it is 1 to the right
    slope = (scale * min(0.0, left), scale * max(1.0, left))
    low, high = scale * input_scale * min(0.0, left), scale * input_scale * max(0.0, left)
    if left == 1 or scale == 0:
        return Curve(slope, (low, high))
    bend = (low, math.inf) if left < 1 else (-math.inf, high)
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


def prelu(weight: Tensor) -> Curve:
    low, high = float(weight.detach().amin()), float(weight.detach().amax())
    return _two_lines("PReLU", low, high)


def _two_lines(name: str, low: float, high: float) -> Curve:
    """Slope 1 to the right of 0 and between ``low`` and ``high`` to its left."""
    slope = (min(low, 1.0), max(high, 1.0))
    if low == high == 1.0:
        return Curve(slope, (0.0, 0.0))
    bend = (-math.inf if high > 1 else 0.0, math.inf if low < 1 else 0.0)
    return Curve(slope, bend, f"{name} {_KINK}")


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


def clamp(min: float | Tensor | None = None, max: float | Tensor | None = None) -> Curve:
    return Curve((0.0, 1.0), (0.0 if max is None else -math.inf, 0.0 if min is None else math.inf), f"clamp {_KINK}")


def clamp_min(min: float | Tensor) -> Curve:
    return clamp(min=min)


def clamp_max(max: float | Tensor) -> Curve:
    return clamp(max=max)


def hardshrink(lambd: float = 0.5) -> Curve:
    return _jumping("Hardshrink", 0.0, math.inf)


def threshold(threshold: float, value: float, inplace: bool = False) -> Curve:
    if value == threshold:
        return Curve((0.0, 1.0), (0.0, math.inf), f"Threshold {_KINK}")
    return _jumping("Threshold", -math.inf if value > threshold else 0.0, math.inf if value < threshold else 1.0)


def steps() -> Curve:
    """Sign, round, floor, ceil and trunc: constant between jumps upwards."""
    return _jumping("it", 0.0, math.inf)


def rounding(decimals: int = 0) -> Curve:
    return steps()


def sawtooth() -> Curve:
    return _jumping("frac", -math.inf, 1.0)


def _jumping(name: str, low: float, high: float) -> Curve:
    return Curve((low, high), (-math.inf, math.inf), f"{name} {_JUMP}")
