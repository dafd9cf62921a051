"""Conversion of networks into their low-curvature form, and back into plain layers for inference."""

from lightning_lcnn.conversion.convert import to_low_curvature
from lightning_lcnn.conversion.fold import fold
from lightning_lcnn.conversion.report import Change, ConversionReport, Kept

__all__ = ["Change", "ConversionReport", "Kept", "fold", "to_low_curvature"]
