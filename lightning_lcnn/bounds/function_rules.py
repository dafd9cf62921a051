"""Rules for functions and methods that a ``forward`` calls: additions, reshapes, functional layers."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.activations import CURVES, Curve
from lightning_lcnn.bounds.module_rules import reshape, upsampling, zero_pad
from lightning_lcnn.bounds.pieces import Activation, Concat, Piece, Rearrange, Scale, Shape, Smooth, Sum, Weight
from lightning_lcnn.bounds.pooling_rules import (
    adaptive_average,
    log_softmax_bound,
    mean,
    pooling,
    softmax_bound,
    window_average,
    windows,
)


@dataclass(frozen=True)
class Signal:
    """Stands for a tensor that depends on the network's input: the output of a step."""

    step: int


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the network's input; read anew each time, because parameters are trained."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def value(self) -> Any:
        """Evaluate with the parameters as they are now."""
        return self.function(*evaluate(self.args), **{k: evaluate(v) for k, v in self.kwargs})


def evaluate(value: Any) -> Any:
    """Replace every :class:`Constant` in a nest of tuples and lists by its value."""
    if isinstance(value, Constant):
        return value.value()
    if isinstance(value, tuple | list):
        return type(value)(evaluate(v) for v in value)
    if isinstance(value, slice):
        return slice(evaluate(value.start), evaluate(value.stop), evaluate(value.step))
    return value


def unknown_size() -> Any:
    """What a :class:`Constant` that was computed from an activation's shape evaluates to."""
    raise ValueError("it needs a number computed from the input's shape")


@dataclass(frozen=True)
class Call:
    """A call of a function or method with at least one :class:`Signal` among its arguments."""

    function: Callable[..., Any] | str  # a string names a method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the function or method."""
        return self.function if isinstance(self.function, str) else self.function.__name__

    @property
    def signals(self) -> list[int]:
        """Steps that the call reads, in order, repeated where repeated."""
        return _signals((self.args, tuple(self.kwargs.values())))

    def bind(self, *names: str, **defaults: Any) -> dict[str, Any]:
        """Arguments after the first by name, constants evaluated."""
        given = dict(zip(names, self.args[1:], strict=False)) | self.kwargs
        return defaults | {k: evaluate(v) for k, v in given.items() if k in names or k in defaults}

    def replay(self, x: Tensor, output_shape: Shape) -> Tensor:
        """Run the call on another tensor in the place of its only signal."""
        args = _fill(self.args, x)
        kwargs = {k: _fill(v, x) for k, v in self.kwargs.items()}
        return (
            getattr(args[0], self.function)(*args[1:], **kwargs)
            if isinstance(self.function, str)
            else self.function(*args, **kwargs)
        )


def _signals(value: Any) -> list[int]:
    if isinstance(value, Signal):
        return [value.step]
    if isinstance(value, tuple | list):
        return [step for v in value for step in _signals(v)]
    return []


def _fill(value: Any, x: Tensor) -> Any:
    if isinstance(value, Signal):
        return x
    if isinstance(value, tuple | list):
        return type(value)(_fill(v, x) for v in value)
    return evaluate(value)


def _shift_or_sum(call: Call) -> Piece:
    if evaluate(call.kwargs.get("alpha", 1)) != 1:
        raise ValueError("`alpha` other than 1 is not supported; multiply first")
    sign = -1.0 if call.name in ("sub", "sub_", "isub") else 1.0
    if len(call.signals) > 1:
        return Sum((1.0, sign))
    return Scale(partial(float, 1.0 if isinstance(call.args[0], Signal) else sign))  # copies where it broadcasts


def _product(call: Call) -> Piece:
    if len(call.signals) > 1:
        raise ValueError("the product of two activations has no finite slope on unbounded inputs")
    constant = next(a for a in (*call.args, *call.kwargs.values()) if not isinstance(a, Signal))
    return Scale(partial(evaluate, constant))


def _quotient(call: Call) -> Piece:
    if len(call.signals) > 1 or not isinstance(call.args[0], Signal):
        raise ValueError("division by an activation has no finite slope")
    return Scale(partial(_inverse, call.args[1]))


def _inverse(constant: Any) -> Any:
    return 1 / evaluate(constant)


def _negation(call: Call) -> Piece:
    return Scale(partial(float, -1.0))


def _concat(call: Call) -> Piece:
    dim = evaluate(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0))
    if dim == 0:
        raise ValueError("concatenation along dimension 0 changes the batch")
    return Concat(dim)


def _identity(call: Call) -> Piece:
    return Rearrange()


def _reshaping(call: Call) -> Piece:
    if call.name == "flatten" and call.bind("start_dim", "end_dim", start_dim=0)["start_dim"] == 0:
        raise ValueError("flatten(start_dim=0) merges the examples of a batch; use start_dim=1")
    return Rearrange(reshape)


def _replayed(call: Call) -> Piece:
    return Rearrange(call.replay)


def _pad(call: Call) -> Piece:
    options = call.bind("pad", "mode", "value", mode="constant")
    if options["mode"] == "constant":
        return Rearrange(partial(zero_pad, tuple(options["pad"])))
    return Rearrange(call.replay)


def _interpolate(call: Call) -> Piece:
    options = call.bind("size", "scale_factor", "mode", mode="nearest", scale_factor=None)
    return upsampling(options["mode"], options["scale_factor"], call.replay)


def _average(dims: int, call: Call) -> Piece:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return window_average(dims, **call.bind(*names))


def _adaptive(dims: int, call: Call) -> Piece:
    return adaptive_average(dims, call.bind("output_size")["output_size"])


def _max_pool(dims: int, call: Call) -> Piece:
    return pooling(windows(dims, **call.bind("kernel_size", "stride", "padding", "dilation", "ceil_mode")))


def _mean(call: Call) -> Piece:
    dims = call.bind("dim", "keepdim", dim=None)["dim"]
    dims = (dims,) if isinstance(dims, int) else dims
    if dims is None or 0 in dims:
        raise ValueError("a mean over dimension 0 couples the examples of a batch; pass the other dimensions as `dim`")
    return mean(tuple(dims))


def _linear(call: Call) -> Piece:
    return Weight(partial(evaluate, _only_input_is_signal(call, "weight")))


def _conv(dims: int, call: Call) -> Piece:
    weight = _only_input_is_signal(call, "weight")
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    options = call.bind(*names, stride=1, padding=0, dilation=1, groups=1)
    geometry = {name: options[name] for name in names[2:]}
    return Weight(partial(evaluate, weight), geometry)


def _only_input_is_signal(call: Call, name: str) -> Any:
    if len(call.signals) > 1:
        raise ValueError(f"its `{name}` depends on the network's input")
    return call.kwargs[name] if name in call.kwargs else call.args[1]


def _softmax(bound: Callable[..., Any], call: Call) -> Piece:
    return Smooth(partial(bound, call.bind("dim", "_stacklevel", "dtype", dim=None)["dim"]))


def _activation(curve: Callable[..., Curve], call: Call) -> Piece:
    names = [n for n in inspect.signature(curve).parameters if n != "inplace"]
    return Activation(partial(curve, **call.bind(*names)))


FUNCTION_RULES: dict[object, Callable[[Call], Piece]] = {}


def _register(rule: Callable[[Call], Piece], *targets: object) -> None:
    for target in targets:
        FUNCTION_RULES[target] = rule


def _fill_rules() -> None:
    for curve, _, targets in CURVES:
        _register(partial(_activation, curve), *targets)
    _register(_shift_or_sum, operator.add, operator.iadd, torch.add, "add", "add_")
    _register(_shift_or_sum, operator.sub, operator.isub, torch.sub, "sub", "sub_")
    _register(_product, operator.mul, operator.imul, torch.mul, "mul", "mul_")
    _register(_quotient, operator.truediv, operator.itruediv, torch.div, "div", "div_")
    _register(_negation, operator.neg, torch.neg, "neg")
    _register(_concat, torch.cat, torch.concat, torch.concatenate)
    _register(_identity, "contiguous", "clone", "detach", "float", "double", "to", "type", "type_as", torch.clone)
    # a dropout that stays on in evaluation mode shows when the graph's output is compared with the model's
    dropouts = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
    _register(_identity, *dropouts)
    _register(_reshaping, torch.flatten, "flatten", "unflatten", "view", "reshape", torch.reshape)
    _register(_reshaping, "squeeze", torch.squeeze, "unsqueeze", torch.unsqueeze)
    _register(_replayed, "permute", torch.permute, "transpose", torch.transpose, operator.getitem)
    _register(_replayed, "expand", "repeat", "flip", torch.flip, "roll", torch.roll, torch.narrow, "narrow")
    _register(_replayed, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, "movedim", torch.movedim)
    _register(_pad, F.pad)
    _register(_interpolate, F.interpolate)
    _register(_mean, torch.mean, "mean")
    _register(_linear, F.linear)
    _register(partial(_softmax, softmax_bound), F.softmax, torch.softmax, "softmax")
    _register(partial(_softmax, log_softmax_bound), F.log_softmax, torch.log_softmax, "log_softmax")
    for dims in (1, 2, 3):
        _register(partial(_average, dims), getattr(F, f"avg_pool{dims}d"))
        _register(partial(_adaptive, dims), getattr(F, f"adaptive_avg_pool{dims}d"))
        max_pool = getattr(F, f"max_pool{dims}d")
        _register(partial(_max_pool, dims), max_pool, getattr(torch, f"max_pool{dims}d"))
        _register(partial(_conv, dims), getattr(F, f"conv{dims}d"), getattr(torch, f"conv{dims}d"))


_fill_rules()
