"""Operator norm of a layer: a certified upper bound and an iterative lower estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int
from lightning_lcnn._compat import hook_tables
from lightning_lcnn.functional.conv_norm import conv_norm_bound, matrix_norm_bound
from lightning_lcnn.functional.singular_vectors import (
    conv_geometry,
    conv_operator,
    largest_singular_triplet,
    matrix_operator,
)
from lightning_lcnn.kernels.modes import unsharded, without_autocast

# By exact class: a subclass may compute something else, and must not inherit a certificate.
_WEIGHTS: dict[type[nn.Module], Callable[[Any], Tensor]] = {
    kind: attrgetter("weight") for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}


def register_linear_layer(kind: type[nn.Module], weight: Callable[[Any], Tensor]) -> None:
    """Let the norms of this module take a class that computes what nn.Linear or nn.Conv computes with another weight.

    Args:
        kind: exact class, with the attributes of nn.Linear or of nn.Conv1d, 2d or 3d.
        weight: layer -> the weight that its forward uses.

    Source:
        Ours.

    Example:
        >>> class DoubledLinear(nn.Linear):
        ...     def forward(self, x): return nn.functional.linear(x, 2 * self.weight, self.bias)
        >>> register_linear_layer(DoubledLinear, lambda layer: 2 * layer.weight)
    """
    _WEIGHTS[kind] = weight


def operator_norm_bound(layer: nn.Module, input_shape: Sequence[int]) -> float:
    """Certified upper bound of the operator norm of a linear or convolution layer.

    ‖A‖ = max over x of ‖A x‖₂ / ‖x‖₂ with A x = layer(x) − layer(0), bounded in float64 and inflated by 1e-6; exact
    for linear layers, for convolutions see :func:`conv_norm_bound`. The rounding of a forward in float32 is no
    part of it.

    Args:
        layer: exactly an nn.Linear, nn.Conv1d, 2d or 3d, one of our spectral layers, or a registered class.
        input_shape: shape of one input without the batch: ``(C, *size)``, or (..., features).

    Returns:
        The bound.

    Raises:
        TypeError: when the class of ``layer`` is not known.
        ValueError: when ``input_shape`` or the layer's padding mode does not fit, or the layer has hooks (weight norm
            and pruning are hooks) or a replaced ``forward``.

    Source:
        Ours.

    Example:
        >>> layer = nn.Conv2d(1, 1, 3, padding=1)
        >>> nn.init.constant_(layer.weight, 1.0) is layer.weight
        True
        >>> print(f"{operator_norm_bound(layer, (1, 2, 2)):.3f}")
        4.000
    """
    weight = _checked_weight(layer, input_shape)
    if weight.dim() == 2:
        return matrix_norm_bound(weight)
    return conv_norm_bound(weight, input_shape[1:], **_conv_arguments(layer))


@torch.no_grad()
def operator_norm_estimate(
    layer: nn.Module, input_shape: Sequence[int], num_iterations: int = 120, start: Tensor | None = None
) -> float:
    """Lower estimate of the operator norm of a linear or convolution layer, by restarted Lanczos on AᵀA.

    Never above ‖A‖ but for rounding, and usually within 1e-4 of it after the default number of iterations.

    Args:
        layer: as in :func:`operator_norm_bound`.
        input_shape: as in :func:`operator_norm_bound`.
        num_iterations: most products with A and with Aᵀ, each; it stops early at a residual of 1e-6.
        start: vector of shape ``input_shape`` to start from, as ``right_vector`` of a spectral layer; random with
            a fixed seed by default.

    Returns:
        The estimate.

    Raises:
        TypeError: when the class of ``layer`` is not known.
        ValueError: when an argument does not fit.

    Source:
        Ours.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> operator_norm_estimate(layer, (3,)) <= operator_norm_bound(layer, (3,))
        True
    """
    check_int("num_iterations", num_iterations)
    weight = _checked_weight(layer, input_shape)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weight.dim() == 2:
        operator = matrix_operator(weight)
    else:
        geometry = conv_geometry(weight.shape[2:], **_conv_arguments(layer))
        operator = conv_operator(weight, input_shape[1:], geometry)
    shape = tuple(input_shape[-1:] if weight.dim() == 2 else input_shape)
    if start is None:
        start = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    elif tuple(start.shape) != shape:
        raise ValueError(f"`start` must have the shape {shape} of one input, got {tuple(start.shape)}.")
    with without_autocast(weight.device):
        triplet = largest_singular_triplet(
            operator.apply, operator.adjoint, start.to(weight), tolerance=1e-6, max_iterations=num_iterations
        )
    return triplet.value.item()


def _conv_arguments(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}


def _checked_weight(layer: nn.Module, input_shape: Sequence[int]) -> Tensor:
    layer = unsharded(layer, gather=True)
    if type(layer) not in _WEIGHTS:
        known = ", ".join(sorted(kind.__name__ for kind in _WEIGHTS))
        raise TypeError(
            f"`layer` must be exactly one of {known}, got {type(layer).__name__}; a class that computes the same "
            "with another weight can be added by `register_linear_layer`."
        )
    if any(hook_tables(layer, forward_only=True).values()) or "forward" in vars(layer):
        raise ValueError(
            f"`layer` ({type(layer).__name__}) has hooks or a `forward` of its own, so its weight alone does not say "
            "what it computes: make weight norm, spectral norm or pruning permanent (nn.utils.remove_weight_norm, "
            "nn.utils.prune.remove, ...), or take the norm of a copy without hooks."
        )
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(
            f"`layer` must pad with zeros, got padding_mode={layer.padding_mode!r}; pad in a layer of its own."
        )
    weight = _WEIGHTS[type(layer)](layer).detach()
    if weight.dim() == 2:
        fits, expected = len(input_shape) > 0 and input_shape[-1] == weight.shape[1], f"(..., {weight.shape[1]})"
    else:
        channels = weight.shape[1] * int(layer.groups)  # type: ignore[arg-type]
        fits = len(input_shape) == weight.dim() - 1 and input_shape[0] == channels
        expected = f"({channels}, {', '.join('size' for _ in weight.shape[2:])})"
    if not fits:
        raise ValueError(
            f"`input_shape` must be the shape of one input without the batch, {expected}, got {tuple(input_shape)}."
        )
    return weight
