"""Layers of known slope and curvature."""

from lightning_lcnn.layers.activation import CenteredSoftplus
from lightning_lcnn.layers.batch_norm import LipschitzBatchNorm1d, LipschitzBatchNorm2d, LipschitzBatchNorm3d
from lightning_lcnn.layers.spectral import SpectralConv1d, SpectralConv2d, SpectralConv3d, SpectralLinear
from lightning_lcnn.layers.spectral_base import SpectralLayer

__all__ = [
    "CenteredSoftplus",
    "LipschitzBatchNorm1d",
    "LipschitzBatchNorm2d",
    "LipschitzBatchNorm3d",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralLayer",
    "SpectralLinear",
]
