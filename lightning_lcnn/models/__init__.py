"""Networks for small images, standard and low-curvature under the same parameter names."""

from lightning_lcnn.models.normalize import Normalize
from lightning_lcnn.models.resnet import ResNet, resnet18, resnet34
from lightning_lcnn.models.vgg import VGG, vgg11

__all__ = ["VGG", "Normalize", "ResNet", "resnet18", "resnet34", "vgg11"]
