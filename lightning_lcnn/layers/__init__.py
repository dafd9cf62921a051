"""Layers of known slope and curvature."""

from lightning_lcnn.layers.activation import CenteredSoftplus
from lightning_lcnn.layers.batch_norm import LipschitzBatchNorm1d, LipschitzBatchNorm2d, LipschitzBatchNorm3d

__all__ = [
    "CenteredSoftplus",
    "LipschitzBatchNorm1d",
    "LipschitzBatchNorm2d",
    "LipschitzBatchNorm3d",
]
