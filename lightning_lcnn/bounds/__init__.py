"""Slope and curvature bounds of whole networks."""

from lightning_lcnn.bounds.directions import DirectionBounds, MarginBounds, direction_bounds, margin_bounds
from lightning_lcnn.bounds.graph import CurvatureGraph, Surrogate, trace
from lightning_lcnn.bounds.network import LayerRow, NetworkBound, network_bound
from lightning_lcnn.bounds.rules.modules import register_rule
from lightning_lcnn.bounds.rules.pieces import LayerBound

__all__ = [
    "CurvatureGraph",
    "DirectionBounds",
    "LayerBound",
    "LayerRow",
    "MarginBounds",
    "NetworkBound",
    "Surrogate",
    "direction_bounds",
    "margin_bounds",
    "network_bound",
    "register_rule",
    "trace",
]
