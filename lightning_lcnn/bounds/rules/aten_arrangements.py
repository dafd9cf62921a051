"""Rules for what only arranges entries, or weights them by numbers in [0, 1]: views, slices, padding, upsampling."""

from __future__ import annotations

import math
from functools import partial

from lightning_lcnn.bounds.rules.aten_calls import Arranged, Call, Found, Part, check_dims, expanded, register
from lightning_lcnn.bounds.rules.modules import reshape
from lightning_lcnn.bounds.rules.pieces import Concat, Rearrange, Scale

_PLACED = (
    "view _unsafe_view reshape permute transpose.int t slice.Tensor select.int squeeze squeeze.dim "
    "squeeze.dims unsqueeze expand repeat flip roll narrow unfold split.Tensor split_with_sizes unbind.int "
    "diagonal movedim.int pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
    "reflection_pad1d reflection_pad2d reflection_pad3d constant_pad_nd replication_pad1d replication_pad2d "
    "replication_pad3d clone detach alias lift_fresh contiguous im2col tril triu rot90 "
    "repeat_interleave.self_int"
)
_WITH_INDICES = "index.Tensor index_select gather take"


@register(_PLACED)
def _placed(call: Call) -> Found:
    for name in call.arguments:
        call.get(name)  # the replay reads them all
    return Arranged((call.get("self"),), copies=True)


@register(_WITH_INDICES)
def _indexed(call: Call) -> Found:
    if len(call.signals()) > 1 or not call.is_signal("self"):
        raise ValueError("its indices depend on the network's input, so it jumps")
    return _placed(call)


@register("sum.dim_IntList sum cumsum")
def _total(call: Call) -> Found:
    dims = call.numbers("dim") if call.arguments.get("dim") is not None else ()
    check_dims(call, dims)
    for name in call.arguments:
        call.get(name)
    return Arranged((call.get("self"),))


@register("_to_copy")
def _cast(call: Call) -> Found:
    return Arranged((call.get("self"),), copies=True)


@register("cat stack")
def _concat(call: Call) -> Found:
    signals, dim = call.signals(), call.get("dim") % len(call.shape)
    only_signals = len(signals) == len(call.get("tensors"))
    if len(signals) == 1 and not only_signals:
        return Arranged(tuple(signals), copies=True)
    if dim == 0 and call.shape[0] == len(signals) == 1:
        return Arranged(tuple(signals), copies=True)
    size = list(call.shape)
    parts = []
    for ref in signals:  # all with the rank of the result, one dimension more where that has no batch in front
        size[dim] = 1 if call.name == "stack" else call.source.shape(ref)[dim]
        parts.append(Part(Rearrange(reshape), (ref,), tuple(size), call.shape[0] != 1))
    joined = Part(Concat(dim - len(call.shape)), tuple(parts))
    return Arranged(tuple(signals), copies=True, otherwise=joined)


@register("copy")
def _copy(call: Call) -> Found:
    if not call.is_signal("src"):
        return Part(Scale(partial(float, 0.0)), (call.get("self"),))
    call.get("self")
    return Arranged((call.get("src"),), copies=True)


@register("fill.Scalar fill.Tensor zero")
def _fill(call: Call) -> Found:
    if call.is_signal("value"):
        return Part(Rearrange(expanded), (call.get("value"),))
    for name in call.arguments:
        call.get(name)
    return Part(Scale(partial(float, 0.0)), (call.get("self"),))


@register(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
    "upsample_trilinear3d _upsample_bilinear2d_aa upsample_nearest1d.vec upsample_nearest2d.vec "
    "upsample_nearest3d.vec upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec"
)
def _upsampled(call: Call) -> Found:
    for name in call.arguments:
        call.get(name)
    name = "self" if "self" in call.arguments else "input"
    growth = math.prod(call.shape[2:]) / math.prod(call.source.shape(call.get(name))[2:])
    return Arranged((call.get(name),), nominal=max(0.0, math.log(growth) / 2))


@register("upsample_bicubic2d upsample_bicubic2d.vec _upsample_bicubic2d_aa")
def _bicubic(call: Call) -> Found:
    raise ValueError("bicubic interpolation has negative coefficients; use mode='bilinear'")
