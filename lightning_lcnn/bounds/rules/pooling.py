"""Slope and curvature of pooling and of softmax."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.rules.pieces import Average, LayerBound, Shape, Smooth, Windows


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


def windows(
    dims: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    temperature: float = 0.0,
) -> Windows:
    """The arguments of a pooling, one entry for each axis."""
    kernels = per_axis(kernel_size, dims)
    strides = kernels if stride in (None, ()) else per_axis(stride, dims)
    return Windows(kernels, strides, per_axis(padding, dims), per_axis(dilation, dims), ceil_mode, temperature)


def pooling(pool: Windows) -> Smooth:
    """Maximum or log-mean-exp over windows."""
    return Smooth(partial(_pool_bound, pool), pool)


def overlap(pool: Windows, shape: Shape | None) -> int:
    """The largest number of windows that share one input; an upper bound where the size is unknown."""
    if shape is None:
        return math.prod(math.ceil(k / s) for k, s in zip(pool.kernel_size, pool.stride, strict=True))
    dims = len(pool.kernel_size)
    return math.prod(int(_members(pool, i, shape[i - dims]).sum(0).max()) for i in range(dims))


def window_sum(pool: Windows, g: Tensor, shape: Shape) -> Tensor:
    """For every input the sum of ``g``, shape (H, …), over the windows that it belongs to."""
    for i in range(-len(pool.kernel_size), 0):
        members = _members(pool, i, shape[i])[: g.shape[i]]
        g = torch.tensordot(g, members, dims=([i], [0])).movedim(-1, i)
    return g


def _members(pool: Windows, axis: int, size: int) -> Tensor:
    """Which inputs of an axis belong to which window, 0 or 1, shape (outputs, size)."""
    kernel, stride, dilation = pool.kernel_size[axis], pool.stride[axis], pool.dilation[axis]
    free = size + 2 * pool.padding[axis] - dilation * (kernel - 1) - 1
    outputs = (-(-free // stride) if pool.ceil_mode else free // stride) + 1
    members = torch.zeros(outputs, size, dtype=torch.float64)
    for o in range(outputs):
        positions = [o * stride + j * dilation - pool.padding[axis] for j in range(kernel)]
        members[o, [p for p in positions if 0 <= p < size]] = 1.0
    return members


def _pool_bound(pool: Windows, shape: Shape | None) -> LayerBound:
    """Every output's gradient has norm at most 1 and an input has at most m windows: slope √m.

    The Hessian of a log-mean-exp is (diag p - p pᵀ)/τ, of norm at most 1/(2τ).
    """
    root = math.sqrt(overlap(pool, shape))
    if pool.temperature:
        return LayerBound(root, root / (2 * pool.temperature))
    reason = "max pooling has a kink: the selected input changes, so its second derivative is unbounded"
    return LayerBound(root, math.inf, reason)


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
