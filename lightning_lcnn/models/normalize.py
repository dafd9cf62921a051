"""Normalisation of the pixels inside the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive


class Normalize(nn.Module):
    r"""Subtract a mean and divide by a standard deviation, per channel or alike for all.

    .. math:: y_c = (x_c - μ_c) / σ_c

    In front of the network, so that attacks, radii, curvature and certified bounds are in the units of the images, and
    not in those of the loader. The two tensors are buffers outside the ``state_dict``: weights load with or without it.

    Args:
        mean: μ, a number or one per channel.
        std: σ > 0, a number or one per channel.

    Raises:
        TypeError: If a value is no number.
        ValueError: If a mean is not finite, a standard deviation is not positive, or their lengths differ.

    Source:
        Ours.

    Example:
        >>> model = nn.Sequential(Normalize([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]), nn.Conv2d(3, 8, 3))
        >>> Normalize(0.5, 0.25)(torch.ones(1, 3, 1, 1)).flatten()
        tensor([2., 2., 2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        means, stds = ([float(v)] if isinstance(v, int | float) else list(v) for v in (mean, std))
        for value in stds:
            check_positive("std", value)
        if not all(math.isfinite(value) for value in means):
            raise ValueError(f"`mean` must be finite, got {mean}.")
        if len(means) != len(stds) and not isinstance(mean, int | float) and not isinstance(std, int | float):
            raise ValueError(f"`mean` and `std` must have equal lengths, got {len(means)} and {len(stds)}.")
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W)."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Values in the printed network."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
