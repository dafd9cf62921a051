"""Forward half of the tight method: slopes of every step and every entry, and linear maps with their adjoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.measured import MeasuredNetwork
from lightning_lcnn.bounds.rules.contractions import Contraction
from lightning_lcnn.bounds.rules.pieces import (
    Activation,
    Average,
    Concat,
    Diagonal,
    Piece,
    Rearrange,
    Scale,
    Shape,
    Smooth,
    Sum,
    Weight,
    Windows,
)

Transform = Callable[[Tensor], Tensor]
Function = Callable[[Tensor, Transform], Tensor]  # (x of shape (H, …), transform of the coefficients) -> (H, …)
# Added to what stands for at least a norm, so that a product that left the range of float64 is never below the truth:
# nine layers of 1e-40 and nine of 1e40 are the identity, of slope 1.
TINY = 1e-300
_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class Forward:
    """Bounds from the network's input to every step's output."""

    slopes: tuple[float, ...]
    rows: tuple[Tensor, ...]  # of every entry: sup of the norm of its gradient; output shape without batch
    maps: tuple[LinearMap | None, ...]


def forward_pass(network: MeasuredNetwork) -> Forward:
    """Slope and row norms of every step, in float64."""
    slopes: list[float] = [1.0]
    rows: list[Tensor] = [torch.ones(network.shapes[0][1:], dtype=torch.float64)]
    maps: list[LinearMap | None] = [None]
    for i in range(1, len(network.steps)):
        step = network.steps[i]
        if isinstance(step.piece, Sum | Concat):
            map_, slope, row = None, *_join(network, i, slopes, rows)
        else:
            map_ = linear_map(step.piece, network.input_shape(i), network.shapes[i])
            slope = float(network.bounds[i].slope) * slopes[step.inputs[0]]
            row = _rows(network, i, map_, slope, slopes[step.inputs[0]], rows[step.inputs[0]])
        row = row + TINY
        slopes.append(min(slope + TINY, float(norm_of(row))))
        rows.append(row.clamp_max(slopes[-1]))
        maps.append(map_)
    return Forward(tuple(slopes), tuple(rows), tuple(maps))


def _join(network: MeasuredNetwork, i: int, slopes: list[float], rows: list[Tensor]) -> tuple[float, Tensor]:
    step, shape = network.steps[i], network.shapes[i][1:]
    if isinstance(step.piece, Sum):
        factors = network.copies(i)
        slope = sum(c * slopes[j] for c, j in zip(factors, step.inputs, strict=True))
        return slope, sum((rows[j].expand(shape) for j in step.inputs), torch.zeros(shape, dtype=torch.float64))
    slope = math.hypot(*(slopes[j] for j in step.inputs))
    if not is_whole(network, i):
        return slope, torch.full(shape, slope, dtype=torch.float64)
    return slope, torch.cat([rows[j] for j in step.inputs], dim=concat_dim(network, i) - 1)


def concat_dim(network: MeasuredNetwork, i: int) -> int:
    """Dimension of a concatenation, counted from the batch's 0."""
    piece = network.steps[i].piece
    assert isinstance(piece, Concat)
    return piece.dim % len(network.shapes[i])


def is_whole(network: MeasuredNetwork, i: int) -> bool:
    """Whether a concatenation holds nothing but its traced inputs; constants may stand anywhere between them."""
    return math.prod(network.shapes[i]) == sum(math.prod(network.shapes[j]) for j in network.steps[i].inputs)


def _rows(
    network: MeasuredNetwork, i: int, map_: LinearMap | None, slope: float, source_slope: float, source_row: Tensor
) -> Tensor:
    piece, shape = network.steps[i].piece, network.shapes[i][1:]
    if map_ is not None:
        return torch.minimum(map_.apply(source_row[None])[0], map_.row_norms() * source_slope)
    if isinstance(piece, Activation):
        return source_row * per_channel(magnitude(piece.read().slope), source_row)
    if isinstance(piece, Smooth) and piece.windows is not None:
        return window_maximum(piece.windows, source_row)
    return torch.full(shape, slope, dtype=torch.float64)


def window_maximum(pool: Windows, x: Tensor) -> Tensor:
    """The largest entry of every window of an unbatched non-negative tensor."""
    arguments = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    return _MAX_POOL[len(pool.kernel_size)](x[None], *arguments)[0]


def magnitude(ends: tuple[float | Tensor, float | Tensor]) -> Tensor:
    """Largest magnitude of an interval, shape () or (C,), float64."""
    low, high = (torch.as_tensor(end).detach().cpu().double() for end in ends)
    return torch.maximum(low.abs(), high.abs())


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Values of shape () or (C,) against an unbatched tensor (C, …)."""
    return values if values.dim() == 0 else values.view(-1, *[1] * (like.dim() - 1))


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
        return self.function(ones, squared)[0].sqrt()

    @cached_property
    def column_norms(self) -> Tensor:
        """Euclidean norm of every column, shaped like the input without batch."""
        return self.adjoint(torch.ones(self.output_shape, dtype=torch.float64), squared)[0].clamp_min(0).sqrt()

    def matrix(self) -> Tensor:
        """The map as a dense matrix (outputs, inputs)."""
        size = torch.Size(self.input_shape[1:]).numel()
        eye = torch.eye(size, dtype=torch.float64).view(size, *self.input_shape[1:])
        return self.function(eye, plain).flatten(1).T


def squared(matrix: Tensor) -> Tensor:
    """Squares, where what would vanish counts as 1e-150 instead."""
    return matrix.square().clamp_min(TINY)


def norm_of(rows: Tensor, heads: int = 0) -> Tensor:
    """Euclidean norm over all but the first ``heads`` dimensions, of numbers whose squares may leave float64."""
    flat = rows.abs().flatten(heads)
    largest = flat.amax(-1, keepdim=True).clamp_min(TINY) if flat.numel() else flat.new_ones(*flat.shape[:-1], 1)
    return largest.squeeze(-1) * torch.linalg.vector_norm(flat / largest, dim=-1)


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
    if isinstance(piece, Contraction):
        return piece.linear_function(output_shape)
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
