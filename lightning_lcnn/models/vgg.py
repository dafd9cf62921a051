"""VGG-11 with batch norm for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lcnn.models.blocks import Blocks, check_pooling, check_sizes

# Channels of the eight convolutions in units of the width; 0 is a 2x2 pooling.
_LAYERS = (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0)


class VGG(nn.Module):
    """Convolutions and pooling in a row, global average, linear head; built by :func:`vgg11`.

    Args:
        blocks: Makes convolutions, batch norms, activations and pooling.
        num_classes: Number of outputs.
        width: Channels of the first convolution.
        pooling: ``"max"``, ``"average"`` or ``"smooth"``.
        in_channels: Channels of the images.
        input_size: Height and width of the images, at least 32.

    Example:
        >>> import torch
        >>> VGG(Blocks(), 10, 4, "max", 3, (32, 32))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Blocks,
        num_classes: int,
        width: int,
        pooling: str,
        in_channels: int,
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = in_channels, input_size
        for factor in _LAYERS:
            if factor == 0:
                layers.append(blocks.pool(pooling))
                size = (size[0] // 2, size[1] // 2)
                continue
            conv = blocks.conv(channels, factor * width, 3, 1, size)
            channels = factor * width
            layers += [conv, blocks.norm(channels), blocks.activation()]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape ``(N, num_classes)``."""
        return self.fc(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg11(
    num_classes: int = 10,
    width: int = 64,
    low_curvature: bool = False,
    *,
    beta: float = 10.0,
    gamma: float | None = 10.0,
    pooling: str | None = None,
    in_channels: int = 3,
    input_size: tuple[int, int] = (32, 32),
) -> VGG:
    """Return a VGG-11 with batch norm for small images, standard or low-curvature.

    As :func:`~lightning_lcnn.models.resnet18`; in the low-curvature form max pooling, whose curvature
    is infinite, becomes average pooling. The head is global average pooling and one ``nn.Linear``.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first convolution (64, 128, 256, 512 channels at 64).
        low_curvature: Whether to build the low-curvature form.
        beta: Start of every β. At 10 accuracy is that of ReLU and curvature about a tenth (ours).
        gamma: Start of every γ of the batch norms, or ``None`` for no clipping.
        pooling: ``"max"``, ``"average"`` or ``"smooth"`` (log-mean-exp of temperature 1/β); by default ``"max"`` in the
            standard form and ``"average"``, which has no curvature at all, in the low-curvature form.
        in_channels: Channels of the images.
        input_size: Height and width of the images, at least 32; the spectral norms belong to this size.

    Returns:
        A network that maps ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        TypeError, ValueError: If a size is not a positive integer, the images are smaller than 32,
            β or γ is not above 0, or ``pooling`` is unknown.

    Source:
        Simonyan and Zisserman (2015), with batch norm; low-curvature layers as in the LCNN paper.

    Example:
        >>> import torch
        >>> vgg11(width=4, low_curvature=True)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_sizes(num_classes, width, in_channels, input_size)
    if min(input_size) < 32:
        raise ValueError(f"`input_size` must be at least 32: five poolings halve it, got {input_size}.")
    blocks = Blocks(low_curvature, beta, gamma)
    pooling = check_pooling(pooling, low_curvature)
    return VGG(blocks, num_classes, width, pooling, in_channels, input_size)
