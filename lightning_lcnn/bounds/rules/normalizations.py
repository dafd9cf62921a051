"""Normalisation of every example by its own statistics: layer, group, instance and RMS norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.bounds.rules.pieces import LayerBound, Number, Piece, Shape
from lightning_lcnn.kernels.modes import whole

# largest 3 t / (1 + t²)^(5/2), at t = 1/2, rounded up
_WORST_BEND = 0.85866
# largest 3 c (1 - c²), at c = 1/√3
_TYPICAL_BEND = 2 / math.sqrt(3)


@dataclass(frozen=True)
class Standardize(Piece):
    r"""Division of groups of n entries by :math:`\sqrt{\mathrm{mean}(z^2) + ε}`, and a weight for each entry.

    With z centred or not, the slope is at most 1/√ε and the curvature at most 0.8587/(√n ε), both attained near z = 0
    (docs/theory.md), times the largest weight. The surrogate takes inputs of variance 1 instead, where they are
    1 and 1.1547/√n: nothing in training can lower ε, and inputs near 0 are not what a network sees.
    """

    size: Callable[[Shape], int]  # n, from the shape of the input
    nominal_size: int  # n where the shape is unknown, or less
    eps: float
    weight: Callable[[], Any]  # tensor or None

    def log_slope(self) -> Number:
        weight = self.weight()
        return 0.0 if weight is None else whole(weight).abs().amax().clamp_min(torch.finfo(weight.dtype).tiny).log()

    def log_bend(self) -> Number:
        return self.log_slope() + math.log(_TYPICAL_BEND / math.sqrt(self.nominal_size))

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        weight = self.weight()
        scale = 1.0 if weight is None else float(weight.detach().abs().max())
        size = self.size(input_shape)
        return LayerBound(scale / math.sqrt(self.eps), scale * _WORST_BEND / (math.sqrt(size) * self.eps))


def over_last(normalized_shape: Any, eps: float | None, weight: Callable[[], Any]) -> Standardize:
    """Layer norm and RMS norm."""
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return Standardize(partial(_over, len(sizes)), math.prod(sizes), _checked(eps), weight)


def over_groups(groups: int, channels: int | None, eps: float | None, weight: Callable[[], Any]) -> Standardize:
    """Group norm, and instance norm as one group for each channel (``groups`` = 0)."""
    nominal = 1 if channels is None or groups == 0 else channels // groups
    return Standardize(partial(_per_group, groups), nominal, _checked(eps), weight)


def _over(dims: int, shape: Shape) -> int:
    if dims >= len(shape):
        raise ValueError("it normalises over the batch, which couples the examples")
    return math.prod(shape[-dims:])


def _per_group(groups: int, shape: Shape) -> int:
    return math.prod(shape[1:]) // (groups or shape[1])


def _checked(eps: float | None) -> float:
    if eps is None:
        raise ValueError("its eps=None depends on the type of the input; pass a number")
    if eps <= 0:
        raise ValueError(f"with eps={eps} it has no finite slope at a constant input; use a positive eps")
    return float(eps)


@dataclass(frozen=True)
class CalledBatchNorm:
    """The arguments of a call of ``F.batch_norm`` in evaluation mode, with the names that a layer gives them."""

    variance: Callable[[], Tensor]
    scale: Callable[[], Tensor | None]
    eps: float

    @property
    def running_var(self) -> Tensor:
        """Variance of each channel, shape (C,)."""
        return self.variance()

    @property
    def weight(self) -> Tensor | None:
        """Weight of each channel, shape (C,), or None."""
        return self.scale()

    @property
    def num_features(self) -> int:
        """Number of channels C."""
        return self.running_var.numel()
