"""The parts that differ between a standard network and its low-curvature form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_lcnn._checks import check_choice, check_int, check_positive
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm2d, LogMeanExpPool2d, SpectralConv2d

POOLINGS = ("max", "average", "smooth")


@dataclass(frozen=True)
class Blocks:
    """Makes convolutions, batch norms, activations and pooling of one form."""

    low_curvature: bool = False
    beta: float = 10.0
    gamma: float | None = 10.0

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if self.gamma is not None:
            check_positive("gamma", self.gamma)

    def conv(self, in_channels: int, channels: int, kernel_size: int, stride: int, size: tuple[int, int]) -> nn.Conv2d:
        """Return a convolution without bias that keeps an input of ``size`` at stride 1.

        Initialised as in He et al. (2015), fan-out, which is torchvision's choice for both families.
        """
        conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return SpectralConv2d.from_layer(conv, input_size=size) if self.low_curvature else conv

    def norm(self, channels: int) -> nn.Module:
        """Return a batch norm."""
        if self.low_curvature:
            return LipschitzBatchNorm2d(channels, gamma=self.gamma)
        return nn.BatchNorm2d(channels)

    def activation(self) -> nn.Module:
        """Return an activation of its own."""
        return CenteredSoftplus(self.beta, inplace=True) if self.low_curvature else nn.ReLU(inplace=True)

    def pool(self, pooling: str) -> nn.Module:
        """Return 2x2 pooling of stride 2."""
        if pooling == "max":
            return nn.MaxPool2d(2)
        return nn.AvgPool2d(2) if pooling == "average" else LogMeanExpPool2d(2, temperature=1 / self.beta)


def check_sizes(num_classes: int, width: int, in_channels: int, input_size: tuple[int, int]) -> None:
    """Raise unless all sizes are positive integers."""
    check_int("num_classes", num_classes)
    check_int("width", width)
    check_int("in_channels", in_channels)
    if not isinstance(input_size, tuple) or len(input_size) != 2:
        raise ValueError(f"`input_size` must be a tuple (height, width), got {input_size!r}.")
    for size in input_size:
        check_int("input_size", size)


def check_pooling(pooling: str | None, low_curvature: bool) -> str:
    """Return the pooling, max for the standard form and average for the low-curvature one by default."""
    if pooling is None:
        return "average" if low_curvature else "max"
    check_choice("pooling", pooling, POOLINGS)
    return pooling
