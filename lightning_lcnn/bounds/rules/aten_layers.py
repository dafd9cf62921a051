"""Rules for matrix products, convolutions and normalisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.rules.aten_calls import (
    ATTENTION,
    Call,
    Found,
    Part,
    Shape,
    expanded,
    itself,
    over_first,
    register,
    scaled,
)
from lightning_lcnn.bounds.rules.contractions import Contraction
from lightning_lcnn.bounds.rules.normalizations import CalledBatchNorm, over_groups, over_last
from lightning_lcnn.bounds.rules.pieces import Diagonal, Rearrange, Scale, Sum, Weight
from lightning_lcnn.functional.conv_norm import conv_norm_bound, matrix_norm_bound


@register("mm")
def _matrix(call: Call) -> Found:
    return _matrix_product(call, "self", "mat2")


@register("mv dot")
def _vector(call: Call) -> Found:
    raise ValueError("it takes a vector without a batch dimension; keep dimension 0 as the batch")


@register("addmm")
def _affine(call: Call) -> Found:
    beta, alpha, added = call.get("beta"), call.get("alpha"), call.get("self")
    if not (call.is_signal("mat1") or call.is_signal("mat2")):
        return Part(Rearrange(expanded), (scaled(added, beta),))
    product = _matrix_product(call, "mat1", "mat2")
    if call.is_signal("self"):
        return Part(Sum((1.0, 1.0)), (scaled(added, beta), scaled(product, alpha)))
    return product if alpha == 1 else Part(Scale(partial(float, alpha)), (product,))


def _matrix_product(call: Call, left: str, right: str) -> Part:
    if call.is_signal(left) and call.is_signal(right):
        raise ValueError(ATTENTION)
    if call.is_signal(left):
        return Part(Weight(partial(_transposed, call.constant(right))), (call.get(left),), call.shape)
    x = call.get(right)
    shape = call.source.shape(x)
    return Part(Contraction(call.constant(left), _from_left, _largest_norm, itself, shape), (x,), call.shape)


def _transposed(matrix: Callable[[], Tensor]) -> Tensor:
    return matrix().T


def _from_left(x: Tensor, matrix: Tensor) -> Tensor:
    return matrix @ x


def _from_right(x: Tensor, matrix: Tensor) -> Tensor:
    return x @ matrix


def _largest_norm(matrices: Tensor) -> float:
    return max(matrix_norm_bound(m) for m in matrices.reshape(-1, *matrices.shape[-2:]))


@register("bmm baddbmm")
def _batched_matrices(call: Call) -> Found:
    left, right = ("self", "mat2") if call.name == "bmm" else ("batch1", "batch2")
    if call.is_signal(left) and call.is_signal(right):
        raise ValueError(ATTENTION)
    name, other, function = (left, right, _from_right) if call.is_signal(left) else (right, left, _from_left)
    if call.name == "baddbmm":
        if call.is_signal("self") or not (call.is_signal(left) or call.is_signal(right)):
            raise ValueError("it adds an activation; write it as a sum and a product")
        call.get("self"), call.get("beta")
    x = call.get(name)
    piece = Contraction(call.constant(other), function, _largest_norm, itself, call.source.shape(x))
    part = Part(piece, (x,), call.shape)
    alpha = call.get("alpha") if call.name == "baddbmm" else 1
    return part if alpha == 1 else Part(Scale(partial(float, alpha)), (part,))


@register("convolution")
def _conv(call: Call) -> Found:
    if call.is_signal("weight") or call.is_signal("bias"):
        raise ValueError("its `weight` or `bias` depends on the network's input")
    call.get("bias")
    x, weight = call.get("input"), call.constant("weight")
    options = {name: call.numbers(name) for name in ("stride", "padding", "dilation")} | {"groups": call.get("groups")}
    if not call.get("transposed"):
        call.get("output_padding")
        return Part(over_first(call, Weight(weight, options), "input"), (x,))
    output_padding, size = call.numbers("output_padding"), call.shape[2:]
    rank, one = len(size), (1, *call.source.shape(x)[1:])
    function = partial(_transposed_conv, rank, options, output_padding)
    piece = Contraction(weight, function, partial(_adjoint_norm, size, options), partial(_taps, options["groups"]), one)
    return Part(over_first(call, piece, "input"), (x,))


def _transposed_conv(rank: int, options: dict[str, Any], output_padding: Any, x: Tensor, weight: Tensor) -> Tensor:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return function(x, weight, None, output_padding=output_padding, **options)


def _adjoint_norm(size: Shape, options: dict[str, Any], weight: Tensor) -> float:
    """It is the adjoint of the convolution from its output to its input, so it has the same norm."""
    return conv_norm_bound(weight, size, **options)


def _taps(groups: int, weight: Tensor) -> Tensor:
    """Every row of the operator holds at most the taps of one output, every column those of one input."""
    magnitude = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).abs()
    rows, columns = magnitude.sum((1, 3)).amax(), magnitude.sum((2, 3)).amax()
    return (rows * columns).sqrt().reshape(1, 1)


def _no(call: Call, *names: str) -> None:
    for name in names:
        call.get(name)


@register(
    "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit "
    "_native_batch_norm_legit.no_stats cudnn_batch_norm _batch_norm_no_update"
)
def _batch_norm(call: Call) -> Found:
    _no(call, "bias", "momentum", "exponential_average_factor", "running_mean")
    eps = call.get("eps" if "eps" in call.arguments else "epsilon")
    x = call.get("input")
    weight = call.constant("weight")
    if call.get("training") or call.name.endswith("no_stats"):
        # of a single example, these are its own; that examples of a batch are not coupled is checked with the model
        call.get("running_var")
        if call.source.shape(x)[0] != 1:
            raise ValueError("it normalises by statistics of the batch, so its slope depends on the other examples")
        return Part(over_groups(0, None, eps, weight), (x,))
    norm = Diagonal(CalledBatchNorm(call.constant("running_var"), weight, eps))
    return Part(over_first(call, norm, "input"), (x,))


@register("native_layer_norm")
def _layer_norm(call: Call) -> Found:
    _no(call, "bias")
    shape = call.numbers("normalized_shape")
    if call.source.shape(call.get("input"))[0] == 1 and len(shape) == len(call.shape):
        raise ValueError("it normalises over the batch, which couples the examples")
    return Part(over_last(shape, call.get("eps"), call.constant("weight")), (call.get("input"),))


@register("_fused_rms_norm")
def _rms_norm(call: Call) -> Found:
    return Part(
        over_last(call.numbers("normalized_shape"), call.get("eps"), call.constant("weight")), (call.get("input"),)
    )


@register("native_group_norm")
def _group_norm(call: Call) -> Found:
    _no(call, "bias", "N", "C", "HxW")
    x = call.get("input")
    piece = over_groups(call.get("group"), call.source.shape(x)[1], call.get("eps"), call.constant("weight"))
    return Part(over_first(call, piece, "input"), (x,))
