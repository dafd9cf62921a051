"""Figures from evaluation records and training histories; matplotlib comes with the extra ``plot``."""

from lightning_lcnn.plots.comparison import accuracy_against_curvature, adversarial_curves, stability_curves
from lightning_lcnn.plots.images import curvature_histograms, gradient_grid
from lightning_lcnn.plots.layers import layer_bars, values_over_layers
from lightning_lcnn.plots.training import training_curves

__all__ = [
    "accuracy_against_curvature",
    "adversarial_curves",
    "curvature_histograms",
    "gradient_grid",
    "layer_bars",
    "stability_curves",
    "training_curves",
    "values_over_layers",
]
