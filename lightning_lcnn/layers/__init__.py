"""Layers of known slope and curvature."""

from lightning_lcnn.layers.activation import CenteredSoftplus, LearnableBeta
from lightning_lcnn.layers.batch_norm import (
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    convert_sync_batchnorm,
)
from lightning_lcnn.layers.piecewise import PiecewiseSoftplus
from lightning_lcnn.layers.pooling import LogMeanExpPool2d
from lightning_lcnn.layers.smooth import ScaledActivation, SmoothELU, SmoothHardswish, SmoothPReLU
from lightning_lcnn.layers.spectral import SpectralConv1d, SpectralConv2d, SpectralConv3d, SpectralLayer, SpectralLinear
from lightning_lcnn.layers.upkeep import (
    lcnn_parameter_groups,
    log_betas,
    log_gammas,
    low_curvature_parameters,
    reset_spectral_norm,
    spectral_layers,
    update_bn,
    update_spectral_norm,
)

__all__ = [
    "CenteredSoftplus",
    "LearnableBeta",
    "LipschitzBatchNorm1d",
    "LipschitzBatchNorm2d",
    "LipschitzBatchNorm3d",
    "LogMeanExpPool2d",
    "PiecewiseSoftplus",
    "ScaledActivation",
    "SmoothELU",
    "SmoothHardswish",
    "SmoothPReLU",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralLayer",
    "SpectralLinear",
    "convert_sync_batchnorm",
    "lcnn_parameter_groups",
    "log_betas",
    "log_gammas",
    "low_curvature_parameters",
    "reset_spectral_norm",
    "spectral_layers",
    "update_bn",
    "update_spectral_norm",
]
