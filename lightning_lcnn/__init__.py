"""Low-curvature neural networks for PyTorch Lightning."""

from lightning_lcnn.__about__ import __version__

__all__ = ["__version__"]
