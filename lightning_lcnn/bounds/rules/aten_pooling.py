"""Rules for averages, maxima and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_lcnn.bounds.rules.aten_calls import Call, Found, Part, Shape, axes_of, check_dims, over_first, register
from lightning_lcnn.bounds.rules.pieces import LayerBound, Piece, Smooth
from lightning_lcnn.bounds.rules.pooling import (
    adaptive_average,
    log_softmax_bound,
    mean,
    pooling,
    softmax_bound,
    window_average,
    windows,
)


@register("mean.dim mean")
def _mean(call: Call) -> Found:
    dims = call.numbers("dim") if call.arguments.get("dim") else ()
    check_dims(call, dims)
    call.get("keepdim")
    rank = len(call.source.shape(call.get("self")))
    return Part(mean(tuple(sorted(d % rank - rank for d in dims))), (call.get("self"),))


_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


@register("avg_pool1d avg_pool2d avg_pool3d")
def _average(call: Call) -> Found:
    options = {name: _per_axis(call.get(name)) for name in _POOL}
    return Part(window_average(axes_of(call), **options), (call.get("self"),))


@register("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d")
def _adaptive(call: Call) -> Found:
    return Part(adaptive_average(axes_of(call), call.numbers("output_size")), (call.get("self"),))


@register("max_pool2d_with_indices max_pool3d_with_indices max_pool1d_with_indices max_pool2d max_pool1d max_pool3d")
def _max_pool(call: Call) -> Found:
    options = {
        name: _per_axis(call.get(name)) for name in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    }
    rank = len(call.source.shape(call.get("self")))
    piece: Piece = pooling(windows(axes_of(call), **options))
    if rank != axes_of(call) + 2:
        raise ValueError("it pools a tensor without a channel dimension")
    return Part(over_first(call, piece, "self"), (call.get("self"),))


@register("amax amin max.dim min.dim")
def _largest(call: Call) -> Found:
    dims = call.numbers("dim")
    check_dims(call, dims)
    call.get("keepdim")
    bound = LayerBound(
        1.0, math.inf, "a maximum has a kink: the selected input changes, so its second derivative is unbounded"
    )
    return Part(Smooth(partial(_always, bound)), (call.get("self"),))


@register("logsumexp")
def _log_sum(call: Call) -> Found:
    check_dims(call, call.numbers("dim"))
    call.get("keepdim")
    return Part(Smooth(partial(_always, LayerBound(1.0, 0.5))), (call.get("self"),))


def _always(bound: LayerBound, shape: Shape | None) -> LayerBound:
    return bound


def _per_axis(value: Any) -> Any:
    """ATen takes a list of one number for all axes, and an empty one for the default."""
    if not isinstance(value, tuple | list):
        return value
    return value[0] if len(value) == 1 else tuple(value)


@register("_softmax _safe_softmax")
def _softmax(call: Call) -> Found:
    return _soft(call, softmax_bound)


@register("_log_softmax")
def _log_softmax(call: Call) -> Found:
    return _soft(call, log_softmax_bound)


def _soft(call: Call, bound: Callable[..., LayerBound]) -> Part:
    shape, dim = call.source.shape(call.get("self")), call.get("dim")
    if shape[0] == 1 and dim % len(shape) == 0:
        raise ValueError("softmax over dimension 0 couples the examples of a batch")
    return Part(Smooth(partial(bound, dim % len(shape) - len(shape))), (call.get("self"),))
