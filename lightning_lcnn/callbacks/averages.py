"""Keep the spectral norms of averaged networks right: those of WeightAveraging, EMAWeightAveraging and the like."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lcnn.layers.spectral_base import SpectralLayer
from lightning_lcnn.layers.spectral_updates import reset_spectral_norm, spectral_layers


def averaged_networks(trainer: Any) -> list[nn.Module]:
    """Averages that the trainer's callbacks keep; Lightning's averaging callbacks all name them ``_average_model``."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)
    return [module for module in found if isinstance(module, nn.Module) and any(True for _ in spectral_layers(module))]


def converge_averages(trainer: Any, tolerance: float, max_iterations: int) -> None:
    """Iterate the averaged networks to convergence: the average of G is no gradient of their norms."""
    for average in averaged_networks(trainer):
        reset_spectral_norm(average, tolerance, max_iterations)


def check_averages(trainer: Any, module: nn.Module) -> None:
    """Refuse layers of unknown input size, whose buffers would change their shape and could not be averaged."""
    if not any(hasattr(average, "n_averaged") for average in averaged_networks(trainer)):
        return
    for name, layer in module.named_modules():
        if isinstance(layer, SpectralLayer) and layer.right_vector.numel() == 0:
            raise ValueError(
                f"{name} ({type(layer).__name__}) has not seen an input, and its first one will change the shape of a "
                "buffer, which weight averaging cannot follow: give the layer its `input_size`, or run the network "
                "once before the fit."
            )
