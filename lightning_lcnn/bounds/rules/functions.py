"""Rules for functions and methods that a ``forward`` calls: additions, reshapes, functional layers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.rules.calls import Call, Signal, evaluate
from lightning_lcnn.bounds.rules.modules import reshape, upsampling, zero_pad
from lightning_lcnn.bounds.rules.normalizations import CalledBatchNorm, over_groups, over_last
from lightning_lcnn.bounds.rules.pieces import (
    Activation,
    Concat,
    Diagonal,
    Piece,
    Product,
    Rearrange,
    Scale,
    Shape,
    Smooth,
    Sum,
    Weight,
)
from lightning_lcnn.bounds.rules.pooling import (
    adaptive_average,
    log_softmax_bound,
    mean,
    pooling,
    softmax_bound,
    window_average,
    windows,
)
from lightning_lcnn.functional.bends import ELEMENTWISE, NAMED, Bend


def _shift_or_sum(call: Call) -> Piece:
    if evaluate(call.kwargs.get("alpha", 1)) != 1:
        raise ValueError("`alpha` other than 1 is not supported; multiply first")
    sign = -1.0 if call.name in ("sub", "sub_", "isub") else 1.0
    if len(call.signals) > 1:
        return Sum((1.0, sign))
    return Scale(partial(float, 1.0 if isinstance(call.args[0], Signal) else sign))  # copies where it broadcasts


def _product(call: Call) -> Piece:
    if len(call.signals) > 1:
        return Product()
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


def _scaled_shift(call: Call) -> Piece:
    """The sum of a tensor and a product of two, one of the three an activation."""
    signals = [isinstance(argument, Signal) for argument in call.args]
    if len(call.args) != 3 or sum(signals) != 1 or call.kwargs:
        raise ValueError("addcmul takes three tensors here, one of them an activation; write it as a sum and a product")
    if signals[0]:
        return Scale(partial(float, 1.0))
    return Scale(partial(evaluate, call.args[2 if signals[1] else 1]))


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


def _sum(call: Call) -> Piece:
    _other_dims(call, "sum")
    return Rearrange(call.replay)


def _expansion(call: Call) -> Piece:
    return Rearrange(_expand)


def _expand(x: Tensor, output_shape: Shape) -> Tensor:
    return x.expand(x.shape[0], *output_shape[1:])


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
    return mean(_other_dims(call, "mean"))


def _other_dims(call: Call, name: str) -> tuple[int, ...]:
    """The dimensions that are summed over, which must leave the batch alone."""
    dims = call.bind("dim", "keepdim", dim=None)["dim"]
    dims = (dims,) if isinstance(dims, int) else dims
    if dims is None or 0 in dims:
        raise ValueError(
            f"a {name} over dimension 0 couples the examples of a batch; pass the other dimensions as `dim`"
        )
    return tuple(dims)


def _linear(call: Call) -> Piece:
    return Weight(partial(evaluate, _only_input_is_signal(call, "weight")))


def _conv(dims: int, call: Call) -> Piece:
    weight = _only_input_is_signal(call, "weight")
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    options = call.bind(*names, stride=1, padding=0, dilation=1, groups=1)
    geometry = {name: options[name] for name in names[2:]}
    return Weight(partial(evaluate, weight), geometry)


def _called_layer_norm(call: Call) -> Piece:
    options = call.bind("normalized_shape", "weight", "bias", "eps", eps=1e-5)
    return over_last(options["normalized_shape"], options["eps"], call.lazily(2, "weight"))


def _called_rms_norm(call: Call) -> Piece:
    options = call.bind("normalized_shape", "weight", "eps", eps=None)
    return over_last(options["normalized_shape"], options["eps"], call.lazily(2, "weight"))


def _called_group_norm(call: Call) -> Piece:
    options = call.bind("num_groups", "weight", "bias", "eps", eps=1e-5)
    return over_groups(options["num_groups"], None, options["eps"], call.lazily(2, "weight"))


def _called_batch_norm(call: Call) -> Piece:
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    options = call.bind(*names, training=False, eps=1e-5)
    if options["training"] or options["running_var"] is None:
        raise ValueError("it normalises by statistics of the batch, so its slope depends on the other examples")
    return Diagonal(CalledBatchNorm(call.lazily(2, "running_var"), call.lazily(3, "weight"), options["eps"]))


def _only_input_is_signal(call: Call, name: str) -> Any:
    if len(call.signals) > 1:
        raise ValueError(f"its `{name}` depends on the network's input")
    return call.kwargs[name] if name in call.kwargs else call.args[1]


def _softmax(bound: Callable[..., Any], call: Call) -> Piece:
    return Smooth(partial(bound, call.bind("dim", "_stacklevel", "dtype", dim=None)["dim"]))


def _activation(bend: Bend, call: Call) -> Piece:
    if len(call.signals) > 1 or not isinstance(call.args[0] if call.args else call.kwargs.get("input"), Signal):
        raise ValueError("an argument other than its input depends on the network's input")
    assert bend.curve is not None
    return Activation(partial(bend.curve, **call.bind(*bend.arguments)))


_ATTENTION = "attention multiplies activations by activations, which has no finite slope on unbounded inputs"
_PRODUCTS = (torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, operator.matmul, "matmul", "bmm")
_ATTENTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
# functions that torchvision keeps whole for torch.fx; by name, for it is no dependency
_VISION_ATTENTION = "torchvision.models.swin_transformer.shifted_window_attention"
_VISION_IDENTITY = "torchvision.ops.stochastic_depth.stochastic_depth"


def rule_of(call: Call) -> Callable[[Call], Piece] | None:
    """The rule for a function or method; None where there is none."""
    return _identity if _full_name(call) == _VISION_IDENTITY else FUNCTION_RULES.get(call.function)


def why_refused(call: Call) -> str:
    """Return why a call without a rule has none."""
    is_product = call.function in _PRODUCTS and len(call.signals) > 1
    is_attention = call.function in _ATTENTIONS or _full_name(call) == _VISION_ATTENTION
    return _ATTENTION if is_product or is_attention else "no rule is known for this operation"


def _full_name(call: Call) -> str:
    return f"{getattr(call.function, '__module__', '')}.{call.name}"


FUNCTION_RULES: dict[object, Callable[[Call], Piece]] = {}


def _register(rule: Callable[[Call], Piece], *targets: object) -> None:
    for target in targets:
        FUNCTION_RULES[target] = rule


def _fill_rules() -> None:
    for bend in ELEMENTWISE:
        if (
            not bend.jumps and bend is not NAMED["prelu"]
        ):  # whose slopes are trained: its module reads them anew each time
            _register(partial(_activation, bend), *bend.functions, *bend.methods)
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
    _register(_sum, torch.sum, "sum")
    _register(_scaled_shift, torch.addcmul, "addcmul")
    _register(_expansion, "expand_as")
    _register(_reshaping, "view_as", "reshape_as")
    _register(_replayed, "permute", torch.permute, "transpose", torch.transpose, operator.getitem)
    _register(_replayed, "expand", "repeat", "flip", torch.flip, "roll", torch.roll, torch.narrow, "narrow")
    _register(_replayed, F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, "movedim", torch.movedim)
    _register(_pad, F.pad)
    _register(_interpolate, F.interpolate)
    _register(_mean, torch.mean, "mean")
    _register(_linear, F.linear)
    _register(_called_layer_norm, F.layer_norm, torch.layer_norm)
    _register(_called_group_norm, F.group_norm, torch.group_norm)
    _register(_called_rms_norm, F.rms_norm, torch.rms_norm)
    _register(_called_batch_norm, F.batch_norm)
    _register(partial(_softmax, softmax_bound), F.softmax, torch.softmax, "softmax")
    _register(partial(_softmax, log_softmax_bound), F.log_softmax, torch.log_softmax, "log_softmax")
    for dims in (1, 2, 3):
        _register(partial(_average, dims), getattr(F, f"avg_pool{dims}d"))
        _register(partial(_adaptive, dims), getattr(F, f"adaptive_avg_pool{dims}d"))
        _register(partial(_max_pool, dims), *NAMED[f"max_pool{dims}d"].functions)
        _register(partial(_conv, dims), getattr(F, f"conv{dims}d"), getattr(torch, f"conv{dims}d"))


_fill_rules()
