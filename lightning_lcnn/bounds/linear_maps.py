"""The linear pieces of a network as maps on batches, with the entrywise absolute and squared map and the adjoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.pieces import Average, Diagonal, Piece, Rearrange, Scale, Shape, Weight

Transform = Callable[[Tensor], Tensor]
Function = Callable[[Tensor, Transform], Tensor]  # (x of shape (H, …), transform of the coefficients) -> (H, …)
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@dataclass(frozen=True)
class LinearMap:
    """A linear map A between tensors; ``transform`` acts on the entries of its matrix."""

    function: Function
    input_shape: Shape  # with a batch dimension of 1, as the next
    output_shape: Shape

    def apply(self, x: Tensor) -> Tensor:
        """|A| x."""
        return self.function(x, torch.abs)

    def adjoint(self, g: Tensor, transform: Transform) -> Tensor:
        """Transposed map on g of shape (H, …), exact."""
        with torch.enable_grad():
            x = g.new_zeros(len(g), *self.input_shape[1:], requires_grad=True)
            return torch.autograd.grad(self.function(x, transform), x, g)[0]

    def row_norms(self) -> Tensor:
        """Euclidean norm of every row, shaped like the output without batch."""
        ones = torch.ones(self.input_shape, dtype=torch.float64)
        return self.function(ones, torch.square)[0].sqrt()

    @cached_property
    def column_norms(self) -> Tensor:
        """Euclidean norm of every column, shaped like the input without batch."""
        return self.adjoint(torch.ones(self.output_shape, dtype=torch.float64), torch.square)[0].clamp_min(0).sqrt()

    def matrix(self) -> Tensor:
        """The map as a dense matrix (outputs, inputs)."""
        size = torch.Size(self.input_shape[1:]).numel()
        eye = torch.eye(size, dtype=torch.float64).view(size, *self.input_shape[1:])
        return self.function(eye, plain).flatten(1).T


def plain(matrix: Tensor) -> Tensor:
    """The map as it is."""
    return matrix


def linear_map(piece: Piece, input_shape: Shape, output_shape: Shape) -> LinearMap | None:
    """The map of a linear piece, in float64; None for a piece that is not linear."""
    function = _function(piece, input_shape, output_shape)
    return None if function is None else LinearMap(function, input_shape, output_shape)


def _function(piece: Piece, input_shape: Shape, output_shape: Shape) -> Function | None:
    if isinstance(piece, Weight):
        return _weight_function(piece)
    if isinstance(piece, Diagonal):
        scale = piece.exact_scale().view(-1, *[1] * (len(input_shape) - 2))
        return lambda x, transform: x * transform(scale)
    if isinstance(piece, Scale):
        factor = torch.as_tensor(piece.factor()).detach().cpu().double()
        return lambda x, transform: (x * transform(factor)).expand(len(x), *output_shape[1:])
    if isinstance(piece, Average):
        return _average_function(piece, input_shape, output_shape)
    if isinstance(piece, Rearrange):  # coefficients in [0, 1], so they stand for their squares
        return lambda x, transform: piece.function(x, output_shape)
    return None


def _weight_function(piece: Weight) -> Function:
    weight, geometry = piece.exact_tensor(), piece.geometry
    if geometry is None:
        return lambda x, transform: F.linear(x, transform(weight))
    conv = _CONV[weight.dim()]
    return lambda x, transform: conv(x, transform(weight), None, **geometry)


def _average_function(piece: Average, input_shape: Shape, output_shape: Shape) -> Function:
    matrices = piece.matrices(input_shape)

    def function(x: Tensor, transform: Transform) -> Tensor:
        for axis, matrix in zip(piece.axes, matrices, strict=True):
            x = torch.tensordot(x, transform(matrix), dims=([axis], [1])).movedim(-1, axis)
        return x.reshape(len(x), *output_shape[1:])

    return function
