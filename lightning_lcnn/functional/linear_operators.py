"""Linear and convolution layers as linear operators: apply, exact adjoint, gradient in the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_INPUT = {1: conv_grad.conv1d_input, 2: conv_grad.conv2d_input, 3: conv_grad.conv3d_input}
_CONV_WEIGHT = {1: conv_grad.conv1d_weight, 2: conv_grad.conv2d_weight, 3: conv_grad.conv3d_weight}


@dataclass(frozen=True)
class ConvGeometry:
    """How a zero-padded convolution slides: one entry for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output; entries below 1 mean that the kernel does not fit."""
        sizes = zip(input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


@dataclass(frozen=True)
class LinearOperator:
    """A linear map A(W) on unbatched tensors, linear in its weight W too."""

    apply: Callable[[Tensor], Tensor]  # v -> A v
    adjoint: Callable[[Tensor], Tensor]  # u -> Aᵀ u
    weight_gradient: Callable[[Tensor, Tensor], Tensor]  # (u, v) -> ∂⟨u, A(W) v⟩/∂W, shaped like W


def conv_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> ConvGeometry:
    """Normalise the arguments of a convolution to one entry for each spatial dimension.

    Args:
        kernel_size: one entry for each of the 1 to 3 spatial dimensions.
        stride: an integer for all dimensions, or one for each.
        padding: zeros on both sides as an integer, one entry for each dimension (an integer, or a pair
            ``(before, after)``), or torch's ``"same"`` and ``"valid"``.
        dilation: an integer for all dimensions, or one for each.
        groups: number of groups.

    Returns:
        The geometry.

    Raises:
        ValueError: when an argument has the wrong number of entries or ``padding`` is an unknown word.

    Example:
        >>> conv_geometry((4, 3), padding="same").padding
        ((1, 2), (1, 1))
    """
    kernel_size = tuple(kernel_size)
    rank = len(kernel_size)
    stride = _per_dimension("stride", stride, rank)
    dilation = _per_dimension("dilation", dilation, rank)
    if padding == "same":  # as torch: the odd zero goes behind
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        pairs = tuple((t // 2, t - t // 2) for t in totals)
    elif padding == "valid":
        pairs = ((0, 0),) * rank
    elif isinstance(padding, str):
        raise ValueError(f"`padding` must be 'same', 'valid', an integer or one entry per dimension, got {padding!r}.")
    else:
        entries = (padding,) * rank if isinstance(padding, int) else tuple(padding)
        if len(entries) != rank:
            raise ValueError(f"`padding` must have {rank} entries, one per spatial dimension, got {padding!r}.")
        pairs = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in entries)
    return ConvGeometry(kernel_size, stride, pairs, dilation, groups)


def conv_apply(weight: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolution without bias of a batch ``x`` of shape (B, C_in, *size)."""
    common, extra = _split_padding(geometry)
    x = F.pad(x, extra) if any(extra) else x
    convolve = _CONV[x.dim() - 2]
    return convolve(x, weight, None, geometry.stride, common, geometry.dilation, geometry.groups)


def conv_adjoint(weight: Tensor, y: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """Exact adjoint of :func:`conv_apply` on inputs of shape (B, C_in, *input_size)."""
    common, extra = _split_padding(geometry)
    rank = len(input_size)
    padded = [n + extra[2 * (rank - 1 - i)] + extra[2 * (rank - 1 - i) + 1] for i, n in enumerate(input_size)]
    shape = (y.shape[0], weight.shape[1] * geometry.groups, *padded)
    x = _CONV_INPUT[rank](shape, weight, y, geometry.stride, common, geometry.dilation, geometry.groups)
    return F.pad(x, [-p for p in extra]) if any(extra) else x


def conv_weight_gradient(y: Tensor, x: Tensor, weight_shape: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """Gradient of ⟨y, conv(x, W)⟩ with respect to W: the rank-one operator y xᵀ pulled back on the weight."""
    common, extra = _split_padding(geometry)
    x = F.pad(x, extra) if any(extra) else x
    gradient = _CONV_WEIGHT[x.dim() - 2]
    return gradient(x, weight_shape, y, geometry.stride, common, geometry.dilation, geometry.groups)


def conv_operator(weight: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> LinearOperator:
    """The convolution by ``weight`` on unbatched inputs (C_in, *input_size)."""
    return LinearOperator(
        apply=lambda v: conv_apply(weight, v[None], geometry)[0],
        adjoint=lambda u: conv_adjoint(weight, u[None], input_size, geometry)[0],
        weight_gradient=lambda u, v: conv_weight_gradient(u[None], v[None], weight.shape, geometry),
    )


def matrix_operator(weight: Tensor) -> LinearOperator:
    """The product by the matrix ``weight`` of shape (out_features, in_features)."""
    return LinearOperator(
        apply=lambda v: weight @ v,
        adjoint=lambda u: weight.T @ u,
        weight_gradient=lambda u, v: u[:, None] * v,
    )


def _per_dimension(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    entries = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(entries) != rank:
        raise ValueError(f"`{name}` must be an integer or have {rank} entries, got {value!r}.")
    return entries


def _split_padding(geometry: ConvGeometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the convolution pads itself, and the rest as F.pad takes it (last dimension first)."""
    common = tuple(min(pair) for pair in geometry.padding)
    pairs = zip(reversed(geometry.padding), reversed(common), strict=True)
    return common, tuple(side - c for pair, c in pairs for side in pair)
