"""Spectral norms of many layers refreshed together, layers of equal shape in one convolution or product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn._compat import copy_all
from lightning_lcnn.functional.singular_vectors import ConvGeometry, conv_adjoint, conv_apply, conv_weight_gradient
from lightning_lcnn.kernels.layer_operators import takes_operators
from lightning_lcnn.kernels.modes import without_autocast
from lightning_lcnn.kernels.refresh_operators import filtered_power_iterations
from lightning_lcnn.layers.spectral import PERTURBATION, SpectralConvNd, SpectralLayer, random_vector, unit_vector


class _Matrices:
    """Linear layers of equal shape."""

    def __init__(self, layers: Sequence[SpectralLayer], weights: Sequence[Tensor]) -> None:
        self.layers = list(layers)
        self.weight = weights[0][None] if len(weights) == 1 else torch.stack(list(weights))
        count, rows, columns = self.weight.shape
        self.right_shape, self.left_shape = (count, columns, 1), (count, rows, 1)

    def apply(self, right: Tensor) -> Tensor:
        return torch.bmm(self.weight, right)

    def adjoint(self, left: Tensor) -> Tensor:
        return torch.bmm(self.weight.transpose(1, 2), left)

    def gradients(self, left: Tensor, right: Tensor) -> list[Tensor]:
        return list((left * right.transpose(1, 2)).unbind())


class _Convolutions:
    """Convolutions that are one grouped convolution of the images of all.

    A smaller kernel is a larger one with zeros around it and as much more padding, so a 1x1 shortcut goes together
    with the 3x3 convolution beside it.
    """

    def __init__(self, layers: Sequence[SpectralLayer], weights: Sequence[Tensor]) -> None:
        self.layers = [cast(SpectralConvNd, layer) for layer in layers]
        first, geometries = self.layers[0], [layer.geometry() for layer in self.layers]
        self.paddings = [geometry.padding for geometry in geometries]
        padding = tuple(
            (max(b for b, _ in sides), max(a for _, a in sides)) for sides in zip(*self.paddings, strict=True)
        )
        self.around = [  # zeros before and after, for each dimension
            [(big[0] - own[0], big[1] - own[1]) for big, own in zip(padding, pads, strict=True)]
            for pads in self.paddings
        ]
        padded = [
            F.pad(weight, [side for pair in reversed(around) for side in pair]) if any(map(any, around)) else weight
            for weight, around in zip(weights, self.around, strict=True)
        ]
        count, size = len(padded), tuple(first.right_vector.shape[1:])
        self.weight = padded[0] if count == 1 else torch.cat(padded)
        self.geometry = ConvGeometry(
            tuple(padded[0].shape[2:]), first.stride, padding, first.dilation, count * first.groups
        )
        self.size = size
        self.right_shape = (1, count * first.in_channels, *size)
        self.left_shape = (1, self.weight.shape[0], *self.geometry.output_size(size))

    def apply(self, right: Tensor) -> Tensor:
        return conv_apply(self.weight, right, self.geometry)

    def adjoint(self, left: Tensor) -> Tensor:
        return conv_adjoint(self.weight, left, self.size, self.geometry)

    def gradients(self, left: Tensor, right: Tensor) -> list[Tensor]:
        gradient = conv_weight_gradient(left, right, self.weight.shape, self.geometry)
        pieces = gradient.split(self.weight.shape[0] // len(self.layers))
        return [piece[_inside(around)] if any(map(any, around)) else piece
                for piece, around in zip(pieces, self.around, strict=True)]  # fmt: skip


def _inside(around: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
    return (..., *(slice(before, -after or None) for before, after in around))


_Group = _Matrices | _Convolutions


def divided(layers: Sequence[SpectralLayer]) -> tuple[list[list[SpectralLayer]], list[SpectralLayer]]:
    """Layers that are refreshed together, by device and type, and those that are not.

    Together go layers of known input size with plain weights where operators have kernels; elsewhere a launch costs
    little, and each layer by itself is as fast.
    """
    together: dict[Any, list[SpectralLayer]] = {}
    alone = []
    for layer in layers:
        fits = layer.right_vector.numel() > 0 and takes_operators(layer.weight, layer.right_vector)
        if fits and (isinstance(layer, SpectralConvNd) or layer.weight.dim() == 2):
            together.setdefault((layer.weight.device, layer.weight.dtype), []).append(layer)
        else:
            alone.append(layer)
    return list(together.values()), alone


@torch.no_grad()
def update_together(layers: Sequence[SpectralLayer], num_iterations: int) -> Tensor:
    """What :meth:`SpectralLayer.update_spectral_norm` does, for layers of one device and type at once.

    Args:
        layers: What :func:`divided` has put together.
        num_iterations: Products with each operator and with its adjoint.

    Returns:
        Largest relative residual, 0-d.
    """
    with without_autocast(layers[0].weight.device):
        groups = _groups(layers)
        ordered = [layer for group in groups for layer in group.layers]
        shapes = tuple(tuple(layer.right_vector.shape) for layer in ordered)
        wide = groups[0].weight.dtype
        right = torch.cat([layer.right_vector.reshape(-1) for layer in ordered]).to(wide)
        counts = [len(group.layers) for group in groups]
        sizes = tuple(
            [math.prod(shape) // n for shape, n in zip(side, counts, strict=True) for _ in range(n)]
            for side in ([g.right_shape for g in groups], [g.left_shape for g in groups])
        )

        def cut(vector: Tensor, left: bool = True) -> list[Tensor]:
            shapes = [g.left_shape if left else g.right_shape for g in groups]
            pieces = vector.split([math.prod(shape) for shape in shapes])
            return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

        left, right, residuals = filtered_power_iterations(
            lambda v: [group.apply(x) for group, x in zip(groups, cut(v, left=False), strict=True)],
            lambda u: [group.adjoint(y) for group, y in zip(groups, u, strict=True)],
            cut,
            right,
            _perturbation(shapes, right.device, wide),
            cast(Any, sizes),
            num_iterations,
        )
        pairs = zip(groups, cut(left), cut(right, left=False), strict=True)
        gradients = [gradient for group, u, v in pairs for gradient in group.gradients(u, v)]
        for layer in ordered:
            layer.shared_gradient().before_change()
        vectors = right.split([math.prod(shape) for shape in shapes])
        _copy([layer.spectral_gradient for layer in ordered], gradients)
        _copy([layer.right_vector for layer in ordered], [v.view(s) for v, s in zip(vectors, shapes, strict=True)])
    return residuals.amax()


def _groups(layers: Sequence[SpectralLayer]) -> list[_Group]:
    found: dict[Any, list[SpectralLayer]] = {}
    for layer in layers:
        found.setdefault(_kind(layer), []).append(layer)
    groups: list[_Group] = []
    for members in found.values():
        weights = [layer.accurate_weight() for layer in members]
        kind = _Convolutions if isinstance(members[0], SpectralConvNd) else _Matrices
        groups.append(kind(members, weights))
    return groups


def _kind(layer: SpectralLayer) -> Any:
    """What layers must have in common to be one group."""
    if not isinstance(layer, SpectralConvNd):
        return tuple(layer.weight.shape)
    geometry = layer.geometry()
    key = tuple(layer.right_vector.shape), layer.weight.shape[0], layer.groups, geometry.stride, geometry.dilation
    if max(geometry.dilation) > 1:
        return *key, geometry.kernel_size, geometry.padding
    return *key, tuple(k - sum(p) for k, p in zip(geometry.kernel_size, geometry.padding, strict=True))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """One launch for what is contiguous."""
    plain = [t.is_contiguous() and s.is_contiguous() for t, s in zip(targets, sources, strict=True)]
    if any(plain):
        copy_all(
            [t for t, p in zip(targets, plain, strict=True) if p], [s for s, p in zip(sources, plain, strict=True) if p]
        )
    for target, source, p in zip(targets, sources, plain, strict=True):
        if not p:
            target.copy_(source)


@lru_cache(maxsize=8)
def _perturbation(shapes: tuple[tuple[int, ...], ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.cat([PERTURBATION * unit_vector(random_vector(s, device, dtype)).reshape(-1) for s in shapes])
