"""Between the inputs of a network, which may be normalised, and the pixels that an attack changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn.functional.input_function import Adapter, logits_of

Normalization = tuple[Sequence[float], Sequence[float]]


class PixelModel(nn.Module):
    """The user's model behind its adapter, normalisation and precision: an attack sees float32 pixels and logits."""

    def __init__(
        self, model: Any, adapter: Adapter | None, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.mean, self.std, self.dtype = model, adapter, mean, std, dtype
        self.training = getattr(model, "training", False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x = pixels if self.mean is None or self.std is None else (pixels - self.mean) / self.std
        return logits_of(self.model, x.to(self.dtype), self.adapter)


def checked_normalization(normalization: Normalization | None) -> tuple[list[float], list[float]] | None:
    """Mean and std per channel as lists; an error unless they fit each other and every std is positive."""
    if normalization is None:
        return None
    mean, std = (torch.as_tensor(values, dtype=torch.float64).flatten().tolist() for values in normalization)
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(f"`normalization` must be (mean, std) of equal length with std > 0, got {normalization}.")
    return mean, std


def mean_and_std(normalization: Normalization | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Mean and std (1, C, 1, …) for inputs (B, C, …), or None twice."""
    if normalization is None:
        return None, None
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, std = (torch.tensor(values, device=x.device, dtype=torch.float32).view(shape) for values in normalization)
    if mean.shape[1] not in (1, x.shape[1]):
        raise ValueError(f"`normalization` has {mean.shape[1]} channels, the inputs have {x.shape[1]}.")
    return mean, std


def pixels_of(x: Tensor, mean: Tensor | None, std: Tensor | None, bounds: tuple[float, float] | None) -> Tensor:
    """Un-normalised inputs in at least float32, within the bounds; an error if that takes more than rounding."""
    x = x if x.dtype == torch.float64 else x.float()
    pixels = x if mean is None or std is None else x * std + mean
    if bounds is None:
        return pixels
    low, high = bounds
    rounding = 1e-3 * (high - low)
    if pixels.min() < low - rounding or pixels.max() > high + rounding:
        raise ValueError(
            f"inputs must lie in [{low:g}, {high:g}], got [{pixels.min():.4g}, {pixels.max():.4g}]; pass "
            "normalization=(mean, std) if they were normalised, other bounds, or bounds=None for no limits."
        )
    return pixels.clamp(low, high)
