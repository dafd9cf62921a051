"""The kinds of map that a network is made of, and what the bounds need to know of each.

Every piece answers twice:
``log_slope`` and ``log_bend`` cheaply and differentiably, without the input's size (the penalty's surrogate);
``certify`` soundly, in float64 and at the true shapes (:func:`~lightning_lcnn.bounds.network_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn.bounds.rules.activations import Curve, curve_of_module
from lightning_lcnn.functional.conv_norm import conv_norm_bound, matrix_norm_bound
from lightning_lcnn.kernels.log_rules import BATCH_NORM, PARAMETER, WEIGHT, Read, weight_sums
from lightning_lcnn.kernels.modes import scalar, whole
from lightning_lcnn.kernels.preserved_state import copy_without_hooks
from lightning_lcnn.layers.activation import CenteredSoftplus
from lightning_lcnn.layers.piecewise import PiecewiseSoftplus
from lightning_lcnn.layers.smooth import ScaledActivation, SmoothELU, SmoothHardswish, SmoothPReLU
from lightning_lcnn.layers.spectral import SpectralConv1d, SpectralConv2d, SpectralConv3d, SpectralLinear

Shape = tuple[int, ...]
Number = float | Tensor  # a float, or a tensor of shape ()
_BENT = (PiecewiseSoftplus, SmoothPReLU, SmoothELU, SmoothHardswish)  # with a differentiable curvature_bound()
SPECTRAL = (SpectralLinear, SpectralConv1d, SpectralConv2d, SpectralConv3d)


@dataclass(frozen=True)
class LayerBound:
    """Bounds of one layer as a map between flattened vectors.

    Args:
        slope: bound on the operator norm of its Jacobian, anywhere; a float or a tensor of shape ().
        curvature: bound on ‖D²g(x)[u, v]‖₂ over unit u, v and all x; infinite where there is none.
        reason: why a value is infinite, or "".

    Example:
        >>> LayerBound(slope=1.0, curvature=0.25).curvature
        0.25
    """

    slope: Number
    curvature: Number = 0.0
    reason: str = ""


class Piece:
    """A map with one input; the joins (:class:`Sum`, :class:`Concat`) have several and slope 1 in each."""

    def log_slope(self) -> Number:
        """Logarithm of a slope bound; a tensor where it depends on parameters, differentiable in them."""
        return 0.0

    def log_bend(self) -> Number | None:
        """Logarithm of the curvature; None where that is zero, and for kinks, which cannot be trained."""
        return None

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        """Sound slope and curvature; both shapes begin with a batch dimension of 1."""
        return LayerBound(1.0)


@dataclass(frozen=True)
class Sum(Piece):
    """x₁ ± x₂: slopes and curvatures add."""

    signs: tuple[float, ...]


@dataclass(frozen=True)
class Concat(Piece):
    """Concatenation along a dimension that is not the batch: combines in root-sum-square."""

    dim: int


@dataclass(frozen=True)
class Product(Piece):
    """x₁ · x₂ of two activations, as in squeeze-and-excitation.

    The surrogate counts it as if neither factor exceeded 1 in magnitude, what a gate does and normalised activations
    are like: slopes L₁ + L₂, curvatures M₁ + M₂ + 2 L₁ L₂. No bound holds for every input.
    """

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        raise ValueError("the product of two activations has no finite slope on unbounded inputs")


@dataclass(frozen=True)
class Activation(Piece):
    """Elementwise s(x); the derivative ranges are read anew each time, because β may be trained."""

    read: Callable[[], Curve]
    module: nn.Module | None = None

    def log_slope(self) -> Number:
        if type(self.module) in (nn.PReLU, SmoothPReLU):
            return whole(self.module.weight).abs().amax().clamp_min(1.0).log()  # type: ignore[union-attr]
        return log_of(max_magnitude(self.read().slope)) if type(self.module) is not CenteredSoftplus else 0.0

    def log_bend(self) -> Number | None:
        unit = self.bend_at_one()
        if unit is not None:
            log_beta = whole(self.module.log_beta)  # type: ignore[union-attr]
            return (scalar(log_beta) if log_beta.numel() == 1 else log_beta.amax()) + math.log(unit)
        if isinstance(self.module, _BENT):
            return log_of(self.module.curvature_bound())
        bend = max_magnitude(self.read().bend)
        return math.log(bend) if 0 < bend < math.inf else None

    def bend_at_one(self) -> float | None:
        """For an activation whose curvature is proportional to its β: that at β = 1. Leaves β on its device."""
        if type(self.module) is CenteredSoftplus:
            return 0.25
        inner = curve_of_module(self.module.activation) if type(self.module) is ScaledActivation else None
        return None if inner is None or math.isinf(max_magnitude(inner.bend)) else max_magnitude(inner.bend)

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        curve = self.read()
        return LayerBound(max_magnitude(curve.slope), max_magnitude(curve.bend), curve.reason)


@dataclass(frozen=True)
class Weight(Piece):
    """Linear layer or convolution; ``geometry`` holds the convolution's stride, padding, dilation and groups."""

    tensor: Callable[[], Tensor]  # the weight as forward uses it
    geometry: dict[str, Any] | None = None  # None: linear
    layer: nn.Module | None = None

    def log_slope(self) -> Number:
        if isinstance(self.layer, SPECTRAL):
            return 0.0 if self.layer.log_gamma is None else scalar(self.layer.log_gamma)
        groups = 1 if self.geometry is None else self.geometry["groups"]
        return log_of(cheap_norm_bound(self.tensor(), groups))

    def exact_tensor(self) -> Tensor:
        """The weight in float64, detached."""
        if not isinstance(self.layer, SPECTRAL):
            return self.tensor().detach().cpu().double()
        return copy_without_hooks(self.layer).cpu().double().normalized_weight().detach()

    def norm(self, weight: Tensor, input_shape: Shape) -> float:
        """Certified norm of this layer with another ``weight``, at the true input size."""
        if self.geometry is None:
            return matrix_norm_bound(weight)
        return conv_norm_bound(weight, input_shape[2:], **self.geometry)

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        return LayerBound(self.norm(self.exact_tensor(), input_shape))


@dataclass(frozen=True)
class Diagonal(Piece):
    """Batch norm in evaluation mode: every channel is scaled."""

    module: Any  # a batch norm, torch's or ours, or what has the same attributes

    def log_slope(self) -> Number:
        return batch_norm_log_slopes([self.module])[0]

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        return LayerBound(float(self.exact_scale().abs().max()))

    def exact_scale(self) -> Tensor:
        """Signed factor of each channel in float64, detached, shape (C,)."""
        layer = self.module
        if hasattr(layer, "scale_and_shift"):
            return copy_without_hooks(layer).cpu().double().scale_and_shift()[0].detach()
        scale = torch.rsqrt(layer.running_var.detach().cpu().double() + layer.eps)
        return scale if layer.weight is None else scale * layer.weight.detach().cpu().double()


@dataclass(frozen=True)
class Scale(Piece):
    """Multiplication by a constant or parameter, which broadcasts against the input."""

    factor: Callable[[], float | Tensor]

    def log_slope(self) -> Number:
        factor = self.factor()
        return log_of(factor.abs().amax() if isinstance(factor, Tensor) else abs(factor))

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        factor = torch.as_tensor(self.factor()).detach().cpu().double().abs().max()
        copies = math.prod(output_shape) / math.prod(input_shape)
        return LayerBound(float(factor) * math.sqrt(copies))


@dataclass(frozen=True)
class Average(Piece):
    """Separable averaging: one matrix for each axis, made from the axis's size."""

    matrix: Callable[[int, int], Tensor]  # (position among the averaged axes, size) -> (outputs, size), float64
    axes: tuple[int, ...]  # dimensions that are averaged, counted from the end (negative)
    nominal: float = 0.0  # logarithm of a slope bound that holds for every size

    def log_slope(self) -> Number:
        return self.nominal

    def matrices(self, input_shape: Shape) -> list[Tensor]:
        """The matrix of every averaged axis."""
        return [self.matrix(i, input_shape[axis]) for i, axis in enumerate(self.axes)]

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        norms = [float(torch.linalg.matrix_norm(m, 2)) for m in self.matrices(input_shape)]
        return LayerBound(math.prod(norms))


def _keep(x: Tensor, output_shape: Shape) -> Tensor:
    return x


@dataclass(frozen=True)
class Rearrange(Piece):
    """Linear map with coefficients 0 and 1 or other non-negative ones: reshape, slice, pad, upsample, identity.

    Its norm is at most √(largest row sum · largest column sum), by the Schur test.
    """

    function: Callable[[Tensor, Shape], Tensor] = _keep  # (x of shape (N, …), output shape) -> output, batched
    nominal: float = 0.0

    def log_slope(self) -> Number:
        return self.nominal

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        if self.function is _keep:
            return LayerBound(1.0)
        with torch.enable_grad():
            ones = torch.ones(input_shape, dtype=torch.float64, requires_grad=True)
            rows = self.function(ones, output_shape)
            (columns,) = torch.autograd.grad(rows.sum(), ones)
        return LayerBound(math.sqrt(float(rows.detach().max()) * float(columns.max())))


@dataclass(frozen=True)
class Windows:
    """Sliding windows whose outputs have gradients with non-negative weights that sum to 1."""

    kernel_size: tuple[int, ...]  # one entry for each axis, as the next
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool
    temperature: float = 0.0  # of a log-mean-exp; 0 for the maximum


@dataclass(frozen=True)
class Smooth(Piece):
    """Any map whose bounds a function gives: pooling, softmax, rules of the user."""

    bound: Callable[[Shape | None], LayerBound]  # None: the size is unknown, as in the surrogate
    windows: Windows | None = None  # where every output's gradient is a convex combination over a window

    def log_slope(self) -> Number:
        return log_of(self.bound(None).slope)

    def log_bend(self) -> Number | None:
        curvature = self.bound(None).curvature
        if isinstance(curvature, Tensor):
            return log_of(curvature)
        return math.log(curvature) if 0 < curvature < math.inf else None

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        bound = self.bound(input_shape)
        slope, curvature = (float(torch.as_tensor(value).detach()) for value in (bound.slope, bound.curvature))
        return LayerBound(slope, curvature, bound.reason)


def read_whole(module: nn.Module, name: str) -> Any:
    """A parameter as it is now, the whole of it where FSDP2 keeps shards."""
    return whole(getattr(module, name))


def max_magnitude(ends: tuple[float | Tensor, float | Tensor]) -> float:
    """The largest absolute value of an interval, or of one interval for each channel."""
    return max(float(end.detach().abs().max()) if isinstance(end, Tensor) else abs(end) for end in ends)


def cheap_norm_bound(weight: Tensor, groups: int = 1) -> Tensor:
    """Differentiable upper bound on the norm of a linear layer or convolution of any input size, shape ().

    The smaller of √(‖A‖₁‖A‖_∞), from the absolute row and column sums, and √(number of taps)·‖W‖_F.
    """
    taps = weight[0, 0].numel() if weight.dim() > 2 else 1
    magnitude = weight.abs().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    rows, columns = magnitude.sum((2, 3)).amax(), magnitude.sum((1, 3)).amax()
    return torch.minimum((rows * columns).clamp_min(1e-37).sqrt(), math.sqrt(taps) * torch.linalg.vector_norm(weight))


def log_of(value: Number) -> Number:
    """Logarithm that takes zero as the smallest normal number, so that a dead layer gives no NaN."""
    if isinstance(value, Tensor):
        return value.clamp_min(torch.finfo(value.dtype).tiny).log()
    return math.log(max(value, 1e-300))


def batch_norm_log_slopes(layers: Sequence[Any]) -> tuple[Tensor, ...]:
    """Logarithms of the evaluation slopes min(γ, max_c |w_c| / √(v_c + ε)), each of shape (), differentiable.

    Args:
        layers: batch norms with running statistics, torch's (γ = ∞) or ours.
    """
    if not layers:
        return ()
    first = layers[0].running_var
    dtype = torch.promote_types(first.dtype, torch.float32)
    variances = torch.cat([(layer.running_var + layer.eps).to(first.device, dtype) for layer in layers])
    weights = [torch.ones_like(m.running_var) if m.weight is None else whole(m.weight) for m in layers]
    gains = torch.cat([w.to(first.device, dtype) for w in weights]).abs() * variances.rsqrt()
    index = _layer_index(tuple(layer.num_features for layer in layers), first.device)
    slopes = gains.new_zeros(len(layers)).scatter_reduce(0, index, gains, "amax")
    log_slopes = slopes.clamp_min(torch.finfo(dtype).tiny).log()
    gammas = [getattr(layer, "log_gamma", None) for layer in layers]
    if any(gamma is not None for gamma in gammas):
        unlimited = log_slopes.new_full((), torch.inf)
        limits = [unlimited if gamma is None else scalar(gamma).to(first.device, dtype) for gamma in gammas]
        log_slopes = torch.minimum(log_slopes, torch.stack(limits))
    return log_slopes.unbind()


def readings(slopes: Sequence[Piece], bends: Sequence[Piece]) -> tuple[list[Tensor], list[Read]]:
    """The tensors from which the logarithms of slopes and then of curvatures are read, and how, for one kernel.

    Args:
        slopes: Pieces whose ``log_slope`` is a tensor.
        bends: Pieces whose ``log_bend`` is one.
    """
    tensors: list[Tensor] = []

    def keep(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensors.append(tensor)
        return len(tensors) - 1

    reads = []
    for piece in slopes:
        if isinstance(piece, Diagonal):
            layer = piece.module
            gamma = getattr(layer, "log_gamma", None)
            weight = None if layer.weight is None else whole(layer.weight)
            places = keep(weight), keep(layer.running_var), keep(None if gamma is None else whole(gamma))
            reads.append(Read(BATCH_NORM, places, layer.eps))
        elif isinstance(piece, Weight) and not isinstance(piece.layer, SPECTRAL):
            weight = piece.tensor()
            groups = 1 if piece.geometry is None else piece.geometry["groups"]
            taps = math.sqrt(weight[0, 0].numel() if weight.dim() > 2 else 1)
            sums = keep(weight_sums(weight, groups))
            reads.append(Read(WEIGHT, (sums,), taps, weight.shape[0], groups * weight.shape[1]))
        else:
            reads.append(Read(PARAMETER, (keep(torch.as_tensor(piece.log_slope())),)))
    for piece in bends:
        unit = piece.bend_at_one() if isinstance(piece, Activation) else None
        if isinstance(piece, Activation) and unit is not None:
            reads.append(Read(PARAMETER, (keep(whole(piece.module.log_beta)),), math.log(unit)))  # type: ignore[union-attr]
        else:
            reads.append(Read(PARAMETER, (keep(torch.as_tensor(piece.log_bend())),)))
    return tensors, reads


@lru_cache(maxsize=64)
def _layer_index(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Layer of every channel."""
    return torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)
