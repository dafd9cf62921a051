"""Backward half of the tight method: intervals of the gradient, and the curvature of every activation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lcnn.bounds.forward import (
    TINY,
    Forward,
    LinearMap,
    concat_dim,
    is_whole,
    magnitude,
    norm_of,
    per_channel,
    plain,
    window_maximum,
)
from lightning_lcnn.bounds.measured import MeasuredNetwork
from lightning_lcnn.bounds.rules.pieces import Activation, Concat, Shape, Smooth, Sum, Weight, Windows
from lightning_lcnn.bounds.rules.pooling import overlap, window_sum

_DENSE_ENTRIES = 2**20  # largest layer, and
_DENSE_SIDE = 256  # largest Gram matrix (10 ms an eigenvalue), for which λ_max(Wᵀ diag(c) W) is computed


@dataclass(frozen=True)
class Gradient:
    """Bounds of ∂h/∂(output of a step) for H directions."""

    low: Tensor  # (H, *shape)
    high: Tensor  # (H, *shape)
    norm: Tensor  # (H,), Euclidean

    def __add__(self, other: Gradient) -> Gradient:
        return Gradient(self.low + other.low, self.high + other.high, self.norm + other.norm)

    def joined(self, other: Gradient) -> Gradient:
        """The heads of both."""
        pairs = zip((self.low, self.high, self.norm), (other.low, other.high, other.norm), strict=True)
        return Gradient(*(torch.cat(pair) for pair in pairs))

    def tightened(self) -> Gradient:
        """Intersection of what the intervals and the norm say."""
        widest = torch.maximum(self.low.abs(), self.high.abs()).flatten(1)
        norm = torch.minimum(self.norm, norm_of(widest, heads=1))
        limit = _heads(norm, self.low)
        return Gradient(torch.maximum(self.low, -limit), torch.minimum(self.high, limit), norm)

    def widened(self) -> Gradient:
        """By what a product may have lost when it left the range of float64."""
        return Gradient(self.low - TINY, self.high + TINY, self.norm + TINY)

    def within(self, limit: Tensor) -> Gradient:
        """Intersection with [-limit, limit]."""
        return Gradient(torch.maximum(self.low, -limit), torch.minimum(self.high, limit), self.norm)


def direction(weights: Tensor) -> Gradient:
    """The output directions given by ``weights`` of shape (H, *output shape)."""
    return Gradient(weights, weights, torch.linalg.vector_norm(weights.flatten(1), dim=1))


def any_direction(shape: tuple[int, ...]) -> Gradient:
    """All unit output directions at once, as one head."""
    ones = torch.ones(1, *shape, dtype=torch.float64)
    return Gradient(-ones, ones, torch.ones(1, dtype=torch.float64))


@dataclass(frozen=True)
class BackwardBounds:
    """Bounds for H output directions h = wᵀg."""

    slope: Tensor  # (H,): sup ‖∇h‖₂
    positive: Tensor  # (H,): sup λ_max(∇²h), at least 0
    negative: Tensor  # (H,): sup λ_max(-∇²h), at least 0
    contributions: dict[int, Tensor]  # for every step with curvature what it adds, the larger of both signs


def backward_pass(network: MeasuredNetwork, forward: Forward, output: Gradient) -> BackwardBounds:
    """Propagate ``output`` to the input and bound the curvature on the way."""
    gradients: dict[int, Gradient] = {len(network.steps) - 1: output}
    positive, negative = torch.zeros_like(output.norm), torch.zeros_like(output.norm)
    contributions = {}
    for i in range(len(network.steps) - 1, 0, -1):
        if i not in gradients:
            continue
        gradient = gradients.pop(i).widened().tightened()
        if float(network.bounds[i].curvature) > 0:
            plus, minus = _curvature(network, forward, i, gradient)
            positive, negative = positive + plus, negative + minus
            contributions[i] = torch.maximum(plus, minus)
        for source, part in zip(network.steps[i].inputs, _pull_back(network, forward, i, gradient), strict=True):
            gradients[source] = gradients[source] + part if source in gradients else part
    slope = gradients[0].widened().tightened().norm
    return BackwardBounds(_known(slope), _known(positive), _known(negative), contributions)


def _known(values: Tensor) -> Tensor:
    """Infinity for NaN: ∞ - ∞ where a deep network overflowed."""
    return values.nan_to_num(nan=math.inf, posinf=math.inf)


def _pull_back(network: MeasuredNetwork, forward: Forward, i: int, gradient: Gradient) -> list[Gradient]:
    """Gradients with respect to the inputs of step ``i``, in order."""
    step, slope = network.steps[i], float(network.bounds[i].slope)
    map_ = forward.maps[i]
    if isinstance(step.piece, Sum):
        parts = zip(step.inputs, network.copies(i), step.piece.signs, strict=True)
        return [_broadcast_back(gradient, network.shapes[j][1:], factor, sign) for j, factor, sign in parts]
    if isinstance(step.piece, Concat):
        return _split(network, i, gradient)
    if map_ is not None:
        return [_linear_back(map_, gradient, slope)]
    if isinstance(step.piece, Activation):
        return [_activation_back(step.piece, gradient, slope)]
    shape = network.input_shape(i)
    everything = _anything(gradient.norm * slope, shape)
    if not isinstance(step.piece, Smooth) or step.piece.windows is None:
        return [everything]
    low = window_sum(step.piece.windows, gradient.low.clamp_max(0), shape)
    high = window_sum(step.piece.windows, gradient.high.clamp_min(0), shape)
    return [Gradient(low, high, everything.norm)]


def _anything(norm: Tensor, shape: Shape) -> Gradient:
    """Every gradient of at most this norm."""
    wide = norm.view(-1, *[1] * (len(shape) - 1)).expand(-1, *shape[1:])
    return Gradient(-wide, wide, norm)


def _linear_back(map_: LinearMap, gradient: Gradient, slope: float) -> Gradient:
    middle = map_.adjoint((gradient.high + gradient.low) / 2, plain)
    radius = map_.adjoint((gradient.high - gradient.low) / 2, torch.abs)
    limit = map_.column_norms * _heads(gradient.norm, middle)
    return Gradient(middle - radius, middle + radius, gradient.norm * slope).within(limit)


def _activation_back(piece: Activation, gradient: Gradient, slope: float) -> Gradient:
    low, high = (per_channel(_as_tensor(end), gradient.low[0]) for end in piece.read().slope)
    products = torch.stack([gradient.low * low, gradient.low * high, gradient.high * low, gradient.high * high])
    return Gradient(products.amin(0), products.amax(0), gradient.norm * slope)


def _broadcast_back(gradient: Gradient, shape: Shape, factor: float, sign: float) -> Gradient:
    low, high = (end.sum_to_size(len(end), *shape) * sign for end in (gradient.low, gradient.high))
    return Gradient(low, high, gradient.norm * factor) if sign > 0 else Gradient(high, low, gradient.norm * factor)


def _split(network: MeasuredNetwork, i: int, gradient: Gradient) -> list[Gradient]:
    shapes = [network.shapes[j] for j in network.steps[i].inputs]
    if not is_whole(network, i):
        return [_anything(gradient.norm, shape) for shape in shapes]
    dim = concat_dim(network, i)
    sizes = [shape[dim] for shape in shapes]
    ends = zip(gradient.low.split(sizes, dim), gradient.high.split(sizes, dim), strict=True)
    return [Gradient(low, high, gradient.norm) for low, high in ends]


def _curvature(network: MeasuredNetwork, forward: Forward, i: int, gradient: Gradient) -> tuple[Tensor, Tensor]:
    """Bounds on λ_max of ± the term of step ``i`` in the Hessian, each (H,)."""
    step, curvature = network.steps[i], float(network.bounds[i].curvature)
    (source,) = step.inputs
    if math.isinf(curvature):
        return torch.full_like(gradient.norm, math.inf), torch.full_like(gradient.norm, math.inf)
    if not isinstance(step.piece, Activation):
        both = _product(gradient.norm, curvature, forward.slopes[source], forward.slopes[source])
        if not isinstance(step.piece, Smooth) or step.piece.windows is None:
            return both, both
        pooled = _pool_curvature(step.piece.windows, network, forward, source, gradient)
        return torch.minimum(both, pooled[0]), torch.minimum(both, pooled[1])
    low, high = (per_channel(_as_tensor(end), gradient.low[0]) for end in step.piece.read().bend)
    products = torch.stack([gradient.low * low, gradient.low * high, gradient.high * low, gradient.high * high])
    plus, minus = products.amax(0).clamp_min(0) + TINY, (-products).amax(0).clamp_min(0) + TINY
    bend = per_channel(magnitude(step.piece.read().bend), gradient.low[0])
    whole = (gradient.norm.log() + _log_curvature_as_vector(forward, source, bend)).exp()
    terms = (_largest_eigenvalue(network, forward, source, c) for c in (plus, minus))
    plus, minus = (torch.minimum(term, whole) for term in terms)
    return plus, minus


def _product(norm: Tensor, *factors: float) -> Tensor:
    """Of positive numbers, in logarithms."""
    return (norm.log() + sum(math.log(factor) for factor in factors)).exp()


def _log_curvature_as_vector(forward: Forward, source: int, bend: Tensor) -> Tensor:
    """Logarithm of a bound on ‖s'' ⊙ (Ju) ⊙ (Ju)‖₂ over unit u, shape (1,).

    Its square is Σ_k (b_k r_k)² t_k, where t = (Ju)² as in knapsack.
    """
    rows = forward.rows[source]
    weights = (bend * rows).flatten()
    largest = weights.amax().clamp_min(TINY)
    squares = (weights / largest).square().clamp_min(TINY)
    return largest.log() + log_knapsack(squares[None], rows.flatten(), forward.slopes[source]) / 2


def _pool_curvature(
    pool: Windows, network: MeasuredNetwork, forward: Forward, source: int, gradient: Gradient
) -> tuple[Tensor, Tensor]:
    """Terms Σ_o g_o Var_o/τ, where the variance of Ju in window o is at most max r² there and ‖Ju‖²/2 over it."""
    rows = window_maximum(pool, forward.rows[source]).flatten()
    slope = forward.slopes[source] * math.sqrt(overlap(pool, network.shapes[source]) / 2)
    plus, minus = gradient.high.clamp_min(0).flatten(1), (-gradient.low).clamp_min(0).flatten(1)
    return knapsack(plus, rows, slope) / pool.temperature, knapsack(minus, rows, slope) / pool.temperature


def _largest_eigenvalue(network: MeasuredNetwork, forward: Forward, source: int, c: Tensor) -> Tensor:
    """Bound on λ_max(Jᵀ diag(c) J) for the Jacobian J of step ``source``; c is (H, *shape), the result (H,)."""
    bound = knapsack(c.flatten(1), forward.rows[source].flatten(), forward.slopes[source])
    step, map_ = network.steps[source], forward.maps[source]
    if not (isinstance(step.piece, Weight) and map_ is not None):
        return bound
    before = forward.slopes[step.inputs[0]]
    return torch.minimum(bound, (2 * math.log(before) + _log_weighted_norms(network, source, map_, c)).exp())


def knapsack(c: Tensor, rows: Tensor, slope: float) -> Tensor:
    r"""Bound on :math:`\sup_v \sum_k c_k (Jv)_k^2` over unit v from |(Jv)_k| ≤ r_k and ‖Jv‖ ≤ L.

    The best t = (Jv)² with t_k ≤ r_k² and Σ t_k ≤ L² fills the largest c first. At most each of max(c) L², Σ c_k r_k²
    and ‖c ⊙ r‖ L.

    Args:
        c: non-negative weights, shape (H, n).
        rows: row norms r, shape (n,).
        slope: L.

    Returns:
        The bounds, shape (H,).

    Source:
        Ours.

    Example:
        >>> knapsack(torch.tensor([[3.0, 1.0]]), torch.tensor([1.0, 2.0]), slope=1.5)
        tensor([4.2500])
    """
    return log_knapsack(c, rows, slope).exp()


def log_knapsack(c: Tensor, rows: Tensor, slope: float) -> Tensor:
    """Its logarithm, in units of the largest c and of L, so that squares stay in the range of float64."""
    c, order = c.sort(dim=1, descending=True)
    largest = c[:, :1].clamp_min(TINY)
    room = (rows / slope).clamp_max(1.0).square().clamp_min(TINY)[order]
    used = torch.minimum((1 - (room.cumsum(1) - room)).clamp_min(0), room)
    total = (c / largest * used).sum(1).clamp_min(TINY)
    return total.log() + largest[:, 0].log() + 2 * math.log(slope)


def _log_weighted_norms(network: MeasuredNetwork, i: int, map_: LinearMap, c: Tensor) -> Tensor:
    """Logarithm of λ_max(Wᵀ diag(c) W) for each head, infinite where the layer is too large."""
    outputs, inputs = math.prod(network.shapes[i]), math.prod(network.input_shape(i))
    if outputs * inputs <= _DENSE_ENTRIES and min(outputs, inputs) <= _DENSE_SIDE:
        matrix = map_.matrix()
        return torch.stack([_log_squared_norm(head.flatten().sqrt()[:, None] * matrix) for head in c])
    return torch.full_like(c.flatten(1)[:, 0], math.inf)


def _log_squared_norm(matrix: Tensor) -> Tensor:
    scale = matrix.abs().max().clamp_min(TINY)
    matrix = matrix / scale
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp_min(TINY).log() + 2 * scale.log()


def _as_tensor(end: float | Tensor) -> Tensor:
    return torch.as_tensor(end).detach().cpu().double()


def _heads(values: Tensor, like: Tensor) -> Tensor:
    """Values of shape (H,) against a tensor (H, …)."""
    return values.view(-1, *[1] * (like.dim() - 1))
