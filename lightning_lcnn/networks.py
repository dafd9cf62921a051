"""Old place of :mod:`lightning_lcnn.models.by_name`, kept for code that was written for 0.1."""

from lightning_lcnn.models.by_name import LIBRARIES, OWN, build_network, is_low_curvature, known_names, load_weights

__all__ = ["LIBRARIES", "OWN", "build_network", "is_low_curvature", "known_names", "load_weights"]
