"""One table of the layers, with inputs that fit; the contract test loops over it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    LogMeanExpPool2d,
    PiecewiseSoftplus,
    ScaledActivation,
    SmoothELU,
    SmoothHardswish,
    SmoothPReLU,
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralLinear,
)

IMAGES, VECTORS, SIGNALS, VOLUMES = (4, 3, 6, 5), (4, 3), (4, 3, 7), (4, 3, 4, 5, 3)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "softplus": (CenteredSoftplus, IMAGES),
    "softplus in place": (lambda: CenteredSoftplus(inplace=True), IMAGES),
    "softplus per channel": (lambda: CenteredSoftplus(num_channels=3), IMAGES),
    "softplus fixed": (lambda: CenteredSoftplus(2.0, learnable=False), VECTORS),
    "smooth ReLU6": (lambda: PiecewiseSoftplus((0.0, 6.0), (1.0, -1.0)), IMAGES),
    "scaled GELU": (lambda: ScaledActivation(nn.GELU(), beta=0.7), VECTORS),
    "smooth PReLU per channel": (lambda: SmoothPReLU(3), IMAGES),
    "smooth SELU": (lambda: SmoothELU(1.6732632, 1.0507010), VECTORS),
    "smooth Hardswish": (SmoothHardswish, IMAGES),
    "batch norm 1d": (lambda: LipschitzBatchNorm1d(3, gamma=0.5), VECTORS),
    "batch norm 2d": (lambda: LipschitzBatchNorm2d(3, gamma=0.5), IMAGES),
    "batch norm 2d without affine": (lambda: LipschitzBatchNorm2d(3, gamma=0.5, affine=False), IMAGES),
    "batch norm 2d without clip": (lambda: LipschitzBatchNorm2d(3, gamma=None), IMAGES),
    "batch norm 3d": (lambda: LipschitzBatchNorm3d(3, gamma=0.5), VOLUMES),
    "linear": (lambda: SpectralLinear(3, 4), VECTORS),
    "linear with gain": (lambda: SpectralLinear(3, 4, gamma=2.0), VECTORS),
    "conv 1d": (lambda: SpectralConv1d(3, 4, 3, padding=2, dilation=2), SIGNALS),
    "conv 2d": (lambda: SpectralConv2d(3, 4, 3, stride=2, padding=1, input_size=(6, 5)), IMAGES),
    "conv 2d, size unknown": (lambda: SpectralConv2d(3, 6, 3, groups=3, bias=False, gamma=2.0), IMAGES),
    "conv 3d": (lambda: SpectralConv3d(3, 2, 2), VOLUMES),
    "pooling": (lambda: LogMeanExpPool2d(2), IMAGES),
}
