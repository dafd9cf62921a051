"""Metrics for validation: curvature, gradient stability and accuracy under attack (torchmetrics.Metric)."""

from lightning_lcnn.metrics.adversarial import AdversarialAccuracy
from lightning_lcnn.metrics.base import MeasuringMetric
from lightning_lcnn.metrics.certified import CertifiedAccuracy
from lightning_lcnn.metrics.curvature import GradientStability, InputGradientNorm, InputHessianNorm, NormalizedCurvature

__all__ = [
    "AdversarialAccuracy",
    "CertifiedAccuracy",
    "GradientStability",
    "InputGradientNorm",
    "InputHessianNorm",
    "MeasuringMetric",
    "NormalizedCurvature",
]
