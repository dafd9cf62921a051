"""Penalties on the curvature of a network, for any training loop."""

from lightning_lcnn.penalties.cure import CurePenalty
from lightning_lcnn.penalties.curvature import MODES, CurvaturePenalty, GraphCache, Penalty, Schedule, network_of
from lightning_lcnn.penalties.gradient_norm import GradientNormPenalty

__all__ = [
    "MODES",
    "CurePenalty",
    "CurvaturePenalty",
    "GradientNormPenalty",
    "GraphCache",
    "Penalty",
    "Schedule",
    "network_of",
]
