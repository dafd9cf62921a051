"""Images in memory as Lightning data modules.

Every image is decoded once, kept as uint8, and augmented in batches on the device.
"""

from lightning_lcnn.data.base import ImageData, shift_and_mirror
from lightning_lcnn.data.image_files import class_names, load_split
from lightning_lcnn.data.sources import TORCHVISION, Digits, ImageFolder, TorchvisionData

__all__ = [
    "TORCHVISION",
    "Digits",
    "ImageData",
    "ImageFolder",
    "TorchvisionData",
    "class_names",
    "load_split",
    "shift_and_mirror",
]
