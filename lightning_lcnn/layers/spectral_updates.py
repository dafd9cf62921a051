"""Refresh the spectral norms of a whole network, for loops of any kind."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int
from lightning_lcnn.layers.spectral_base import SpectralLayer


def spectral_layers(module: nn.Module) -> Iterator[SpectralLayer]:
    """Iterate over the layers of a network that divide their weight by its spectral norm, shared ones once.

    Args:
        module: Any network.

    Returns:
        Iterator over ``SpectralLinear`` and ``SpectralConv`` layers, in module order.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> len(list(spectral_layers(nn.Sequential(SpectralLinear(2, 2), nn.ReLU(), nn.Linear(2, 2)))))
        1
    """
    return (layer for layer in module.modules() if isinstance(layer, SpectralLayer))


def update_spectral_norm(module: nn.Module, num_iterations: int = 5) -> Tensor:
    """Warm-started power iterations in every spectral layer; call it every few optimizer steps.

    Args:
        module: Network with at least one spectral layer.
        num_iterations: Products with each layer and with its adjoint, >= 1; see
            :func:`~lightning_lcnn.functional.filtered_power_iteration`.

    Returns:
        Largest relative residual of the singular pairs, 0-d, without host synchronisation.

    Raises:
        TypeError: If ``num_iterations`` is not an integer.
        ValueError: If ``num_iterations`` is below 1 or ``module`` has no spectral layer.

    Source:
        LCNN (Srinivas et al., 2022); the interval and the residual are ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> float(update_spectral_norm(SpectralLinear(3, 3))) < 0.01
        True
    """
    check_int("num_iterations", num_iterations)
    return _stacked([layer.update_spectral_norm(num_iterations) for layer in spectral_layers(module)], module).amax()


@torch.no_grad()
def spectral_norms(module: nn.Module) -> Tensor:
    """Present estimates ⟨W, G⟩ of the norms of all spectral layers, on the device of the first.

    Args:
        module: Network with at least one spectral layer.

    Returns:
        (layers,), without host synchronisation.

    Raises:
        ValueError: If ``module`` has no spectral layer.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> spectral_norms(nn.Sequential(SpectralLinear(3, 3), SpectralLinear(3, 2))).shape
        torch.Size([2])
    """
    return _stacked([layer.sigma() for layer in spectral_layers(module)], module)


def reset_spectral_norm(module: nn.Module, tolerance: float = 1e-3, max_iterations: int = 240) -> Tensor:
    """Iterate every spectral layer to convergence from a fixed start; the result depends on the weights alone.

    Args:
        module: Network with at least one spectral layer.
        tolerance: Relative residual at which a layer stops.
        max_iterations: Products with the layer and with its adjoint after which it stops in any case.

    Returns:
        Largest relative residual, 0-d.

    Raises:
        ValueError: If ``module`` has no spectral layer.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> float(reset_spectral_norm(SpectralLinear(3, 3))) <= 1e-3
        True
    """
    residuals = [layer.reset_spectral_norm(tolerance, max_iterations) for layer in spectral_layers(module)]
    return _stacked(residuals, module).amax()


def _stacked(values: list[Tensor], module: nn.Module) -> Tensor:
    if not values:
        raise ValueError(
            f"`module` has no spectral layer, got {type(module).__name__}; convert it with `to_low_curvature` or use "
            "SpectralLinear and SpectralConv layers."
        )
    return torch.stack([value.to(values[0]) for value in values])
