"""ResNet-18 and ResNet-34 for small images: a 3x3 stem of stride 1 and no max pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lcnn.models.blocks import Blocks, check_sizes


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum; every activation has its own module.

    Args:
        blocks: Makes convolutions, batch norms and activations.
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: Stride of the first convolution.
        size: Height and width of the input.

    Example:
        >>> import torch
        >>> from lightning_lcnn.models.blocks import Blocks
        >>> block = BasicBlock(Blocks(), 4, 8, stride=2, size=(8, 8))
        >>> block(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, blocks: Blocks, in_channels: int, channels: int, stride: int, size: tuple[int, int]) -> None:
        super().__init__()
        inner = strided(size, stride)
        self.conv1 = blocks.conv(in_channels, channels, 3, stride, size)
        self.bn1 = blocks.norm(channels)
        self.act1 = blocks.activation()
        self.conv2 = blocks.conv(channels, channels, 3, 1, inner)
        self.bn2 = blocks.norm(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            conv = blocks.conv(in_channels, channels, 1, stride, size)
            self.downsample = nn.Sequential(conv, blocks.norm(channels))
        self.act2 = blocks.activation()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.downsample(x))


class ResNet(nn.Module):
    """ResNet of basic blocks for small images; built by :func:`resnet18` and :func:`resnet34`.

    Args:
        blocks: Makes convolutions, batch norms and activations.
        depths: Number of blocks in each of the four stages.
        num_classes: Number of outputs.
        width: Channels of the first stage; each further stage doubles them.
        in_channels: Channels of the images.
        input_size: Height and width of the images.

    Example:
        >>> import torch
        >>> from lightning_lcnn.models.blocks import Blocks
        >>> ResNet(Blocks(), (1, 1, 1, 1), 10, 8, 3, (16, 16))(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Blocks,
        depths: tuple[int, int, int, int],
        num_classes: int,
        width: int,
        in_channels: int,
        input_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.conv1 = blocks.conv(in_channels, width, 3, 1, input_size)
        self.bn1 = blocks.norm(width)
        self.act = blocks.activation()
        self.layer1 = _stage(blocks, depths[0], width, width, 1, input_size)
        self.layer2 = _stage(blocks, depths[1], width, 2 * width, 2, input_size)
        size = strided(input_size, 2)
        self.layer3 = _stage(blocks, depths[2], 2 * width, 4 * width, 2, size)
        size = strided(size, 2)
        self.layer4 = _stage(blocks, depths[3], 4 * width, 8 * width, 2, size)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, shape ``(N, num_classes)``."""
        x = self.act(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return the output size of a convolution that keeps the size at stride 1: ceil(size / stride)."""
    return -(-size[0] // stride), -(-size[1] // stride)


def _stage(
    blocks: Blocks, depth: int, in_channels: int, channels: int, stride: int, size: tuple[int, int]
) -> nn.Sequential:
    first = BasicBlock(blocks, in_channels, channels, stride, size)
    rest = (BasicBlock(blocks, channels, channels, 1, strided(size, stride)) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def resnet18(
    num_classes: int = 10,
    width: int = 64,
    low_curvature: bool = False,
    *,
    beta: float = 10.0,
    gamma: float | None = 10.0,
    in_channels: int = 3,
    input_size: tuple[int, int] = (32, 32),
) -> ResNet:
    """Return a ResNet-18 for small images, standard or low-curvature.

    The standard form has ReLU, ``nn.BatchNorm2d`` and ``nn.Conv2d``; the low-curvature form a
    ``CenteredSoftplus`` with its own β per activation, ``LipschitzBatchNorm2d`` and
    ``SpectralConv2d``. Residual sums are ordinary ones and the head is an ``nn.Linear`` in both.
    The names of all weights are the same, so a standard ``state_dict`` loads with ``strict=False``.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first stage (64, 128, 256, 512 channels at 64).
        low_curvature: Whether to build the low-curvature form.
        beta: Start of every β. At 10 accuracy is that of ReLU and curvature about a tenth (ours).
        gamma: Start of every γ of the batch norms, or ``None`` for no clipping.
        in_channels: Channels of the images.
        input_size: Height and width of the images; the spectral norms belong to this size.

    Returns:
        A network that maps ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        TypeError, ValueError: If a size is not a positive integer, or β or γ is not above 0.

    Source:
        He et al. (2016), with the CIFAR stem; low-curvature layers as in the LCNN paper.

    Example:
        >>> import torch
        >>> model = resnet18(num_classes=5, width=4, low_curvature=True, input_size=(16, 16))
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """
    check_sizes(num_classes, width, in_channels, input_size)
    blocks = Blocks(low_curvature, beta, gamma)
    return ResNet(blocks, (2, 2, 2, 2), num_classes, width, in_channels, input_size)


def resnet34(
    num_classes: int = 10,
    width: int = 64,
    low_curvature: bool = False,
    *,
    beta: float = 10.0,
    gamma: float | None = 10.0,
    in_channels: int = 3,
    input_size: tuple[int, int] = (32, 32),
) -> ResNet:
    """Return a ResNet-34 for small images; all else as :func:`resnet18`.

    Args:
        num_classes: Number of outputs.
        width: Channels of the first stage.
        low_curvature: Whether to build the low-curvature form.
        beta: Start of every β.
        gamma: Start of every γ of the batch norms, or ``None`` for no clipping.
        in_channels: Channels of the images.
        input_size: Height and width of the images; the spectral norms belong to this size.

    Returns:
        A network that maps ``(N, in_channels, H, W)`` to ``(N, num_classes)``.

    Raises:
        TypeError, ValueError: If a size is not a positive integer, or β or γ is not above 0.

    Source:
        He et al. (2016), with the CIFAR stem; low-curvature layers as in the LCNN paper.

    Example:
        >>> import torch
        >>> resnet34(width=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_sizes(num_classes, width, in_channels, input_size)
    blocks = Blocks(low_curvature, beta, gamma)
    return ResNet(blocks, (3, 4, 6, 3), num_classes, width, in_channels, input_size)
