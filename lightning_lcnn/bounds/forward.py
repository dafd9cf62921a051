"""Forward half of the tight method: slope and row norms of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.bounds.linear_maps import LinearMap, linear_map
from lightning_lcnn.bounds.measured import MeasuredNetwork
from lightning_lcnn.bounds.pieces import Activation, Concat, Smooth, Sum, Windows

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
        slopes.append(min(slope, float(torch.linalg.vector_norm(row))))
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
