"""Linear and convolution layers that are divided by their spectral norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.functional.linear_operators import LinearOperator, matrix_operator
from lightning_lcnn.functional.operator_norm import register_linear_layer
from lightning_lcnn.layers.spectral_base import SpectralLayer, check_exact_type, copy_parameters
from lightning_lcnn.layers.spectral_conv import SpectralConvNd

LinearT = TypeVar("LinearT", bound="SpectralLinear")


class SpectralLinear(SpectralLayer, nn.Linear):
    """Linear layer divided by its spectral norm.

    y = (γ/σ) W x + b, with σ = ‖W‖₂ as of the last update of G = ∂σ/∂W.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: add a learnable bias.
        device: as in torch.
        dtype: as in torch.
        gamma: start of the learnable gain γ > 0 (stored as its logarithm); None means no gain, γ = 1.

    Raises:
        ValueError: when ``gamma`` is not a finite number > 0.

    Source:
        LCNN paper (arXiv 2206.07144) divides convolutions by their spectral norm; G is ours.

    Example:
        >>> layer = SpectralLinear(20, 10)
        >>> bool(torch.linalg.matrix_norm(layer.normalized_weight(), 2) < 1.001)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._create_spectral_state(gamma, (in_features,))

    @classmethod
    def from_layer(cls: type[LinearT], layer: nn.Linear, gamma: float | None = None) -> LinearT:
        """Copy a linear layer: parameters, device, training flag. Its function changes by 1/σ.

        Args:
            layer: exactly an nn.Linear.
            gamma: start of the gain, or None; ``gamma`` = σ keeps the function.

        Returns:
            A new layer that shares nothing with ``layer``.

        Raises:
            TypeError: when ``layer`` is of another class, which may compute something else.

        Source:
            Ours.

        Example:
            >>> SpectralLinear.from_layer(torch.nn.Linear(3, 2)).weight.shape
            torch.Size([2, 3])
        """
        check_exact_type(layer, nn.Linear)
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        copy_parameters(layer, new)
        new._create_spectral_state(gamma, (layer.in_features,))
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Apply the normalised layer to (..., in_features)."""
        return F.linear(input, self.normalized_weight(), self.bias)

    def _operator(self, weight: Tensor, right_shape: Sequence[int]) -> LinearOperator:
        return matrix_operator(weight)

    def _default_right_shape(self) -> tuple[int, ...]:
        return (self.in_features,)


class SpectralConv1d(SpectralConvNd, nn.Conv1d):
    """1-d convolution divided by its spectral norm; see :class:`SpectralConv2d`.

    y = conv(x, W γ/σ) + b.

    Example:
        >>> SpectralConv1d(3, 4, 5, padding="same", input_size=(16,)).right_vector.shape
        torch.Size([3, 16])
    """

    torch_class = nn.Conv1d


class SpectralConv2d(SpectralConvNd, nn.Conv2d):
    """2-d convolution divided by its spectral norm at the true input size.

    y = conv(x, W γ/σ) + b, with σ the operator norm on zero-padded inputs of ``input_size`` as of the last
    update of G = ∂σ/∂W, for any stride, dilation, groups and padding.

    Args:
        in_channels: as in torch.
        out_channels: as in torch.
        kernel_size: as in torch.
        stride: as in torch.
        padding: as in torch.
        dilation: as in torch.
        groups: as in torch.
        bias: as in torch.
        padding_mode: only "zeros".
        device: as in torch.
        dtype: as in torch.
        gamma: start of the learnable gain γ > 0 (stored as its logarithm); None means no gain, γ = 1.
        input_size: spatial size (H, W) of the inputs. None: the first forward sees it and iterates to
            convergence then; before that, G belongs to a small default size. Larger inputs that come later
            may have a slightly larger norm.

    Raises:
        ValueError: when ``gamma``, ``padding_mode`` or ``input_size`` is out of range.

    Source:
        LCNN paper (arXiv 2206.07144) divides convolutions by their spectral norm; the exact
        operator (stride, padding, input size) and the constant G are ours.

    Example:
        >>> layer = SpectralConv2d(3, 8, 3, stride=2, padding=1, input_size=(32, 32))
        >>> layer(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 8, 16, 16])
    """

    torch_class = nn.Conv2d


class SpectralConv3d(SpectralConvNd, nn.Conv3d):
    """3-d convolution divided by its spectral norm; see :class:`SpectralConv2d`.

    y = conv(x, W γ/σ) + b.

    Example:
        >>> SpectralConv3d(2, 4, 3, input_size=(6, 6, 6)).right_vector.shape
        torch.Size([2, 6, 6, 6])
    """

    torch_class = nn.Conv3d


for _kind in (SpectralLinear, SpectralConv1d, SpectralConv2d, SpectralConv3d):
    register_linear_layer(_kind, _kind.normalized_weight)
