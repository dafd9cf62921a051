"""Where the examples find images; the code is in ``lightning_lcnn.data``."""

from lightning_lcnn.data import ImageFolder, class_names, load_split, shift_and_mirror

__all__ = ["ImageFolder", "class_names", "load_split", "shift_and_mirror"]
