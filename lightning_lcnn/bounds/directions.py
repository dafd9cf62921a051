"""Certified bounds for single output directions: logits, or the margins between two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice
from lightning_lcnn.bounds.backward import backward_pass, direction
from lightning_lcnn.bounds.forward import forward_pass
from lightning_lcnn.bounds.measured import MeasuredNetwork, measure
from lightning_lcnn.bounds.network import INFLATION, NetworkBound, fast_bound

_CHUNK_ENTRIES = 2**24  # numbers in the widest gradient of the heads that run together (128 MB)


@dataclass(frozen=True)
class DirectionBounds:
    """Certified bounds for H scalar outputs h = wᵀg, valid for every input; each a float64 tensor of shape (H,).

    Args:
        slope: sup ‖∇h‖₂ is at most this.
        positive: K⁺, sup λ_max(∇²h) is at most this; never negative.
        negative: K⁻, sup λ_max(-∇²h) is at most this; never negative.
    """

    slope: Tensor
    positive: Tensor
    negative: Tensor

    @property
    def curvature(self) -> Tensor:
        """Bound on the Hessian norm sup ‖∇²h‖₂, shape (H,)."""
        return torch.maximum(self.positive, self.negative)


def direction_bounds(model: nn.Module, example_input: Tensor, directions: Tensor) -> DirectionBounds:
    """Certified bounds for given directions of the output, by the tight method.

    Args:
        model: network in evaluation mode, as for :func:`network_bound`.
        example_input: any input of the true shape (N, ...).
        directions: weights w, shape ``(H, *output shape without batch)``.

    Returns:
        :class:`DirectionBounds` on the CPU.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the directions do not fit the output, or as :func:`network_bound`.

    Source:
        Ours; docs/theory.md derives the rules.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)).eval()
        >>> logits = direction_bounds(net, torch.zeros(1, 3), torch.eye(2))
        >>> logits.curvature.shape
        torch.Size([2])
    """
    network = measure(model, example_input)
    shape = network.shapes[-1][1:]
    if not isinstance(directions, Tensor) or tuple(directions.shape[1:]) != shape or len(directions) == 0:
        received = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
        raise ValueError(f"`directions` must be a tensor of shape (H, *{shape}) with H >= 1, got {received}.")
    return _bounds(network, fast_bound(network), directions.detach().cpu().double())


def _bounds(network: MeasuredNetwork, fast: NetworkBound, directions: Tensor) -> DirectionBounds:
    network = network.folded()
    forward = forward_pass(network)
    width = max(row.numel() for row in forward.rows)
    chunks = directions.split(max(1, _CHUNK_ENTRIES // width))
    parts = [backward_pass(network, forward, direction(chunk)) for chunk in chunks]
    norms = torch.linalg.vector_norm(directions.flatten(1), dim=1)
    return DirectionBounds(
        *(
            torch.minimum(torch.cat([getattr(part, name) for part in parts]) * INFLATION, norms * limit)
            for name, limit in (("slope", fast.slope), ("positive", fast.curvature), ("negative", fast.curvature))
        )
    )


@dataclass(frozen=True)
class MarginBounds:
    """Certified bounds for all margins m = g_i - g_j of a classifier, float64, shape (C, C), zero on the diagonal.

    Args:
        slope: sup ‖∇m‖₂, symmetric.
        negative: K⁻ of g_i - g_j at [i, j]: sup λ_max(-∇²m). K⁺ is its transpose.
    """

    slope: Tensor
    negative: Tensor

    @property
    def positive(self) -> Tensor:
        """K⁺ of g_i - g_j at [i, j], sup λ_max(∇²m)."""
        return self.negative.T


def margin_bounds(model: nn.Module, example_input: Tensor, method: str = "pairs") -> MarginBounds:
    """Certified bounds for the margin between every two classes, by the tight method.

    Args:
        model: classifier in evaluation mode with logits (N, C), as for :func:`network_bound`.
        example_input: any input of the true shape (N, ...).
        method: "pairs" bounds the C (C - 1) / 2 differences of logits one by one; "logits" bounds the C logits and adds
            two of them, which takes (C - 1) / 2 times less and is up to twice as loose.

    Returns:
        :class:`MarginBounds` on the CPU.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the output is not (N, C) with C >= 2, ``method`` is unknown, or as :func:`network_bound`.

    Source:
        Ours; docs/theory.md derives the rules.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)).eval()
        >>> margin_bounds(net, torch.zeros(1, 3)).negative.shape
        torch.Size([2, 2])
    """
    check_choice("method", method, ("pairs", "logits"))
    network = measure(model, example_input)
    shape = network.shapes[-1][1:]
    if len(shape) != 1 or shape[0] < 2:
        raise ValueError(f"`model` must return logits (N, C) with C >= 2, got shape (N, {', '.join(map(str, shape))}).")
    classes, fast = torch.eye(shape[0], dtype=torch.float64), fast_bound(network)
    if method == "logits":
        return _sums(_bounds(network, fast, classes), fast)
    first, second = torch.triu_indices(shape[0], shape[0], offset=1)
    bounds = _bounds(network, fast, classes[first] - classes[second])
    slope, negative = torch.zeros_like(classes), torch.zeros_like(classes)
    slope[first, second] = slope[second, first] = bounds.slope
    negative[first, second], negative[second, first] = bounds.negative, bounds.positive
    return MarginBounds(slope, negative)


def _sums(logits: DirectionBounds, fast: NetworkBound) -> MarginBounds:
    """The triangle inequality for g_i - g_j, and √2, the norm of its direction, times the bound of all directions."""
    slope = (logits.slope[:, None] + logits.slope).clamp_max(math.sqrt(2) * fast.slope)
    negative = (logits.negative[:, None] + logits.positive).clamp_max(math.sqrt(2) * fast.curvature)
    return MarginBounds(slope.fill_diagonal_(0.0), negative.fill_diagonal_(0.0))
