"""Rules for sums, products and quotients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_lcnn.bounds.rules.aten_calls import Call, Found, Part, register, scaled
from lightning_lcnn.bounds.rules.normalizations import over_last
from lightning_lcnn.bounds.rules.pieces import Activation, Product, Scale, Sum
from lightning_lcnn.functional import curves
from lightning_lcnn.functional.bends import NAMED
from lightning_lcnn.recording.nodes import Ref


@register("add.Tensor sub.Tensor add.Scalar sub.Scalar rsub.Tensor rsub.Scalar")
def _sum(call: Call) -> Found:
    first, second, alpha = call.get("self"), call.get("other"), call.get("alpha")
    signs = {"add": (1, alpha), "sub": (1, -alpha), "rsub": (-alpha, 1)}[call.name]
    if call.name == "sub" and alpha == 1 and _is_tanh_of(call, first, second):
        return Part(Activation(curves.tanhshrink), (first,))
    return _weighted(call, [(first, signs[0]), (second, signs[1])])


def _is_tanh_of(call: Call, x: Any, y: Any) -> bool:
    """Whether y = tanh(x): ``F.tanhshrink`` is x - tanh(x), whose slope is 1 and not 2."""
    inner = call.source.producer(y, "tanh")
    return inner is not None and inner.get("self") == x


def _weighted(call: Call, terms: Sequence[tuple[Any, float]]) -> Found:
    """Σ factor · term; constant terms only broadcast."""
    parts = [(term, f) for term, f in terms if isinstance(term, Ref) and call.source.depends(term)]
    if len(parts) == 1:
        return Part(Scale(partial(float, parts[0][1])), (parts[0][0],))
    signs = tuple(math.copysign(1.0, f) for _, f in parts)
    return Part(Sum(signs), tuple(scaled(ref, abs(f)) for ref, f in parts))


@register("mul.Tensor mul.Scalar")
def _product(call: Call) -> Found:
    first, second = call.get("self"), call.get("other")
    if call.is_signal("self") and call.is_signal("other"):
        return (
            _normalised(call, first, second, "rsqrt")
            or _normalised(call, second, first, "rsqrt")
            or Part(Product(), (first, second))
        )
    if call.is_signal("self"):
        return Part(Scale(partial(_floating, call.constant("other"))), (first,))
    return Part(Scale(partial(_floating, call.constant("self"))), (second,))


@register("div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode")
def _quotient(call: Call) -> Found:
    first, second = call.get("self"), call.get("other")
    if call.get("rounding_mode") is not None:
        raise ValueError("it rounds, so it jumps and has no slope")
    if not call.is_signal("other"):
        return Part(Scale(partial(_inverse, call.constant("other"))), (first,))
    norm = _normalised(call, first, second, "sqrt") or _softsign(call, first, second)
    if norm is None:
        raise ValueError("division by an activation has no finite slope")
    return norm


def _floating(constant: Callable[[], Any]) -> Any:
    value = constant()
    return value.double() if isinstance(value, Tensor) and not value.is_floating_point() else value


def _inverse(constant: Callable[[], Any]) -> Any:
    return 1 / _floating(constant)


def _softsign(call: Call, x: Any, below: Any) -> Part | None:
    """X / (1 + |x|)."""
    magnitude, total, _ = NAMED["softsign"].parts
    added = call.source.producer(below, total)
    inner = None if added is None else call.source.producer(added.get("self"), magnitude)
    if added is None or inner is None or inner.get("self") != x or added.get("other") != 1 or added.get("alpha") != 1:
        return None
    return Part(Activation(curves.softsign), (x,))


def _normalised(call: Call, x: Any, factor: Any, root: str) -> Part | None:
    """X / √(mean(x²) + ε) over the last dimensions, as RMS norm is composed of."""
    outer = call.source.producer(factor, root)
    added = None if outer is None else call.source.producer(outer.get("self"), "add")
    averaged = None if added is None else call.source.producer(added.get("self"), "mean")
    squared = None if averaged is None else call.source.producer(averaged.get("self"), "pow")
    if added is None or averaged is None or squared is None or squared.get("self") != x or squared.get("exponent") != 2:
        return None
    eps, dims = added.get("other"), averaged.numbers("dim")
    rank = len(call.source.shape(x))
    last = sorted(d % rank for d in dims) == list(range(rank - len(dims), rank)) and len(dims) < rank
    if not (isinstance(eps, float) and added.get("alpha") == 1 and averaged.get("keepdim") and last):
        return None
    return Part(over_last(call.source.shape(x)[rank - len(dims) :], eps, partial(_no_weight)), (x,))


def _no_weight() -> None:
    return None


@register("reciprocal rsqrt")
def _reciprocal(call: Call) -> Found:
    raise ValueError("division by an activation has no finite slope")


@register("neg")
def _negation(call: Call) -> Found:
    return Part(Scale(partial(float, -1.0)), (call.get("self"),))


@register("addcmul addcdiv")
def _scaled_shift(call: Call) -> Found:
    signals = [name for name in ("self", "tensor1", "tensor2") if call.is_signal(name)]
    value, first = call.get("value"), call.get("self")
    one, two = call.get("tensor1"), call.get("tensor2")
    if ("tensor1" in signals and "tensor2" in signals) or (call.name == "addcdiv" and "tensor2" in signals):
        raise ValueError("it multiplies activations; write it as a sum and a product")
    if signals == ["self"]:
        return Part(Scale(partial(float, 1.0)), (first,))
    name, other = ("tensor1", "tensor2") if "tensor1" in signals else ("tensor2", "tensor1")
    factor = call.constant(other)
    factor = partial(_times, value, partial(_inverse, factor) if call.name == "addcdiv" else factor)
    product = Part(Scale(factor), (one if name == "tensor1" else two,), call.shape)
    return Part(Sum((1.0, 1.0)), (first, product)) if "self" in signals else product


def _times(value: float, factor: Callable[[], Any]) -> Any:
    return value * factor()


@register("masked_fill.Scalar masked_fill.Tensor")
def _masked(call: Call) -> Found:
    if call.is_signal("mask") or call.is_signal("value"):
        raise ValueError("its mask or value depends on the network's input, so it jumps")
    call.get("value")
    return Part(Scale(partial(_kept, call.constant("mask"), False)), (call.get("self"),))


@register("where.self")
def _choice(call: Call) -> Found:
    condition = call.constant("condition")
    names = [name for name in ("self", "other") if call.is_signal(name)]
    call.get("self"), call.get("other")
    parts = [Part(Scale(partial(_kept, condition, name == "self")), (call.get(name),)) for name in names]
    return parts[0] if len(parts) == 1 else Part(Sum((1.0, 1.0)), tuple(parts))


def _kept(mask: Callable[[], Tensor], where: bool) -> Tensor:
    return (mask() == where).double()
