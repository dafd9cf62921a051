"""Pure functions on tensors and operators: every formula of the package, once."""

from lightning_lcnn.functional.batch_norm import batch_norm_slope, clip_factor
from lightning_lcnn.functional.softplus import centered_softplus

__all__ = [
    "batch_norm_slope",
    "centered_softplus",
    "clip_factor",
]
