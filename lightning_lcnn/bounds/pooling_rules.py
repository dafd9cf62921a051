"""Slope and curvature of pooling and of softmax."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.pieces import Average, LayerBound, Shape


def per_axis(value: Any, dims: int) -> tuple[Any, ...]:
    """Repeat a single number for every axis."""
    return tuple(value) if isinstance(value, tuple | list) else (value,) * dims


def window_average(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Average:
    """Average pooling; its norm is the product of the norms of one matrix for each axis."""
    kernels = per_axis(kernel_size, dims)
    strides = kernels if stride in (None, ()) else per_axis(stride, dims)
    paddings = per_axis(padding, dims)
    axes = tuple(
        {"kernel_size": k, "stride": s, "padding": p, "ceil_mode": ceil_mode, "count_include_pad": count_include_pad}
        for k, s, p in zip(kernels, strides, paddings, strict=True)
    )
    scale = 1.0 if divisor_override is None else math.prod(kernels) / divisor_override
    # rows sum to at most 1, columns to at most ceil(k/s)/k where every window divides by k
    whole = divisor_override is not None or (not ceil_mode and (count_include_pad or max(paddings) == 0))
    columns = [math.ceil(k / s) / (k if whole else 1) for k, s in zip(kernels, strides, strict=True)]
    nominal = math.log(scale) + sum(math.log(c) for c in columns) / 2
    return Average(partial(_window_matrix, axes, divisor_override), tuple(range(-dims, 0)), nominal)


def adaptive_average(dims: int, output_size: Any) -> Average:
    """Adaptive average pooling; rows sum to 1 and, at the unknown size, columns at most to 2."""
    sizes = per_axis(output_size, dims)
    nominal = 0.0 if all(size == 1 for size in sizes) else dims * math.log(2) / 2
    return Average(partial(_adaptive_matrix, sizes), tuple(range(-dims, 0)), nominal)


def mean(dims: tuple[int, ...]) -> Average:
    """Mean over dimensions other than the batch."""
    return Average(_mean_matrix, dims)


def _window_matrix(axes: tuple[dict[str, Any], ...], divisor: int | None, i: int, size: int) -> Tensor:
    eye = torch.eye(size, dtype=torch.float64).unsqueeze(1)
    matrix = F.avg_pool1d(eye, **axes[i]).squeeze(1).T
    if divisor is None:
        return matrix
    return (matrix > 0).double() / (divisor if i == 0 else 1)


def _adaptive_matrix(sizes: tuple[int | None, ...], i: int, size: int) -> Tensor:
    eye = torch.eye(size, dtype=torch.float64).unsqueeze(1)
    target = sizes[i]
    return F.adaptive_avg_pool1d(eye, size if target is None else target).squeeze(1).T


def _mean_matrix(i: int, size: int) -> Tensor:
    return torch.full((1, size), 1 / size, dtype=torch.float64)


def window_count(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """How many windows the busiest coordinate of an axis of this size belongs to."""
    span = dilation * (kernel - 1) + 1
    free = size + 2 * padding - span
    outputs = (-(-free // stride) if ceil_mode else free // stride) + 1
    counts = [0] * size
    for o in range(outputs):
        for j in range(kernel):
            position = o * stride + j * dilation - padding
            if 0 <= position < size:
                counts[position] += 1
    return max(counts)


def overlap(dims: int, options: dict[str, Any], shape: Shape | None) -> float:
    """The largest number of windows that share one input; an upper bound where the size is unknown."""
    kernels = per_axis(options["kernel_size"], dims)
    strides = kernels if options.get("stride") in (None, ()) else per_axis(options["stride"], dims)
    if shape is None:
        return math.prod(math.ceil(k / s) for k, s in zip(kernels, strides, strict=True))
    paddings, dilations = per_axis(options.get("padding", 0), dims), per_axis(options.get("dilation", 1), dims)
    axes = zip(shape[-dims:], kernels, strides, paddings, dilations, strict=True)
    return math.prod(window_count(*axis, options.get("ceil_mode", False)) for axis in axes)


def max_pool_bound(dims: int, options: dict[str, Any], shape: Shape | None) -> LayerBound:
    """Every window selects one input and an input is selected by at most m windows: slope √m."""
    reason = "MaxPool has a kink: the selected input changes, so its second derivative is unbounded"
    return LayerBound(math.sqrt(overlap(dims, options, shape)), math.inf, reason)


def log_mean_exp_bound(dims: int, options: dict[str, Any], shape: Shape | None) -> LayerBound:
    r"""Rows of the Jacobian are softmax weights (norm ≤ 1), Hessians (diag p − p pᵀ)/τ (norm ≤ 1/(2τ))."""
    root = math.sqrt(overlap(dims, options, shape))
    return LayerBound(root, root / (2 * options["temperature"]))


def softmax_bound(dim: int | None, shape: Shape | None) -> LayerBound:
    """Jacobian diag p − p pᵀ, norm ≤ 1/2; the third cumulant of unit vectors under p is at most √2 · 1/2."""
    _check_softmax_dim(dim, shape)
    return LayerBound(0.5, math.sqrt(0.5))


def log_softmax_bound(dim: int | None, shape: Shape | None) -> LayerBound:
    """Jacobian I − 1 pᵀ, norm ≤ √n; every entry has the Hessian −(diag p − p pᵀ): √n · 1/2."""
    dim = _check_softmax_dim(dim, shape)
    if shape is None:
        return LayerBound(1.0, 0.5)
    return LayerBound(math.sqrt(shape[dim]), math.sqrt(shape[dim]) / 2)


def _check_softmax_dim(dim: int | None, shape: Shape | None) -> int:
    if dim is None:
        raise ValueError("softmax without `dim` depends on the input's rank; pass dim=1")
    if dim == 0 or (shape is not None and dim + len(shape) == 0):
        raise ValueError("softmax over dimension 0 couples the examples of a batch")
    return dim
