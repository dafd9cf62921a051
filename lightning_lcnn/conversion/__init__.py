"""Conversion of networks into their low-curvature form, and back into plain layers for inference."""

from lightning_lcnn.conversion.convert import to_low_curvature
from lightning_lcnn.conversion.decide import Change, ConversionReport, Kept
from lightning_lcnn.conversion.fold import fold

__all__ = ["Change", "ConversionReport", "Kept", "fold", "to_low_curvature"]
