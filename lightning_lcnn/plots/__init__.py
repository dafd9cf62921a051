"""Figures from evaluation records and training histories; matplotlib comes with the extra ``plot``."""

from lightning_lcnn.plots.comparison import accuracy_against_curvature, adversarial_curves, stability_curves

__all__ = ["accuracy_against_curvature", "adversarial_curves", "stability_curves"]
