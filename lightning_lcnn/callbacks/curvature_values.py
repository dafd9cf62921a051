"""What there is to log of a low-curvature network, as 0-d tensors and as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lcnn.bounds import Surrogate
from lightning_lcnn.layers import LearnableBeta, SpectralLayer
from lightning_lcnn.layers.batch_norm import _LipschitzBatchNorm

TOTALS = ("lcnn/log_ratio", "lcnn/log_slope", "lcnn/log_curvature")


def layer_values(module: nn.Module) -> dict[str, Tensor]:
    """β of every activation, slope and γ of every batch norm, slope, γ and σ of every spectral layer, by name."""
    values: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LearnableBeta):
            values[f"lcnn_beta/{name}"] = layer.beta.mean()
        elif isinstance(layer, _LipschitzBatchNorm | SpectralLayer):
            values |= _normalised_layer_values(name, layer)
    return values


def _normalised_layer_values(name: str, layer: _LipschitzBatchNorm | SpectralLayer) -> dict[str, Tensor]:
    values = {}
    if isinstance(layer, SpectralLayer) or layer.running_var is not None:
        values[f"lcnn_slope/{name}"] = layer.slope()
    if layer.gamma is not None:
        values[f"lcnn_gamma/{name}"] = layer.gamma
    if isinstance(layer, SpectralLayer):
        values[f"lcnn_sigma/{name}"] = layer.sigma()
    return values


def network_totals(surrogate: Surrogate) -> dict[str, Tensor]:
    """Logarithms of the network's estimated slope and curvature bounds and of their ratio."""
    totals = (surrogate.log_ratio, surrogate.log_slope, surrogate.log_curvature)
    return dict(zip(TOTALS, totals, strict=True))


def graph_values(surrogate: Surrogate) -> dict[str, Tensor]:
    """Slope of every layer of the graph, and the share of every activation in the curvature, all its uses together."""
    values = {
        f"lcnn_slope/{name}": log_slope.exp()
        for name, log_slope in zip(surrogate.layers, surrogate.layer_log_slopes, strict=True)
    }
    for name, share in zip(surrogate.activations, surrogate.shares(), strict=True):
        key = f"lcnn_share/{name}"
        values[key] = values[key] + share if key in values else share
    return values


def to_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy all values to the host at once."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def logger_keys(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers under keys ``group/layer`` that every logger takes; MLflow is the strictest.

    Other characters become ``_``, keys that are then equal get a number, and a network that is one layer, whose name is
    empty, is called ``network``.
    """
    keyed: dict[str, float] = {}
    for key, number in numbers.items():
        group, layer = key.split("/", 1)
        name = stem = f"{group}/{re.sub(r'[^A-Za-z0-9_.-]', '_', layer) or 'network'}"
        count = 1
        while name in keyed:
            count += 1
            name = f"{stem}_{count}"
        keyed[name] = number
    return keyed
