"""Linear and convolution layers that are divided by their spectral norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.functional.linear_operators import (
    ConvGeometry,
    LinearOperator,
    conv_geometry,
    conv_operator,
    matrix_operator,
)
from lightning_lcnn.layers.spectral_base import SpectralLayer

LinearT = TypeVar("LinearT", bound="SpectralLinear")
ConvT = TypeVar("ConvT", bound="_SpectralConvNd")


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
        LCNN paper (arXiv 2206.07144), section 3, divides convolutions by their spectral norm; G is ours.

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
        _check_exact_type(layer, nn.Linear)
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        _copy_parameters(layer, new)
        new._create_spectral_state(gamma, (layer.in_features,))
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Apply the normalised layer to (..., in_features)."""
        return F.linear(input, self.normalized_weight(), self.bias)

    def _operator(self, weight: Tensor, right_shape: Sequence[int]) -> LinearOperator:
        return matrix_operator(weight)

    def _default_right_shape(self) -> tuple[int, ...]:
        return (self.in_features,)


class _SpectralConvNd(SpectralLayer):
    """What the three convolutions share; the subclass names its torch class."""

    torch_class: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float | None = None,
        input_size: tuple[int, ...] | None = None,
    ) -> None:
        _check_padding_mode(padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self._create_spectral_state(gamma, self._right_shape(input_size))

    @classmethod
    def from_layer(
        cls: type[ConvT],
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        input_size: tuple[int, ...] | None = None,
        gamma: float | None = None,
    ) -> ConvT:
        """Copy a convolution: parameters, geometry, device, training flag. Its function changes by 1/σ.

        Args:
            layer: exactly the torch class of the same rank.
            input_size: spatial size of the input, or None: the first input tells.
            gamma: start of the gain, or None; ``gamma`` = σ keeps the function.

        Returns:
            A new layer that shares nothing with ``layer``.

        Raises:
            TypeError: when ``layer`` is of another class, which may compute something else.
            ValueError: when its padding mode is not zeros, or ``input_size`` does not fit.

        Source:
            Ours.

        Example:
            >>> SpectralConv2d.from_layer(torch.nn.Conv2d(3, 4, 3), input_size=(8, 8)).right_vector.shape
            torch.Size([3, 8, 8])
        """
        _check_exact_type(layer, cls.torch_class)
        _check_padding_mode(layer.padding_mode)
        new = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            device="meta",
        )
        _copy_parameters(layer, new)
        new._create_spectral_state(gamma, new._right_shape(input_size))
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Apply the normalised layer to (B, in_channels, *size) or (in_channels, *size)."""
        if self.right_vector.numel() == 0:
            self._see_input((self.in_channels, *input.shape[2 - self.weight.dim() :]))
        return self._conv_forward(input, self.normalized_weight(), self.bias)

    def extra_repr(self) -> str:
        """Torch's text, and the input size once it is known."""
        size = tuple(self.right_vector.shape[1:])
        return super().extra_repr() + (f", input_size={size}" if size else "")

    def _right_shape(self, input_size: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if input_size is None:
            return None
        geometry = self._geometry()
        fits = len(input_size) == len(self.kernel_size) and min(geometry.output_size(input_size)) > 0
        if not fits:
            raise ValueError(
                f"`input_size` must be the spatial size of the input, {len(self.kernel_size)} integers that "
                f"leave at least one output position, got {input_size!r} for kernel size {self.kernel_size}."
            )
        return (self.in_channels, *input_size)

    def _geometry(self) -> ConvGeometry:
        return conv_geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def _operator(self, weight: Tensor, right_shape: Sequence[int]) -> LinearOperator:
        return conv_operator(weight, right_shape[1:], self._geometry())

    def _default_right_shape(self) -> tuple[int, ...]:
        extents = zip(self.kernel_size, self.dilation, strict=True)
        return (self.in_channels, *(d * (k - 1) + 8 for k, d in extents))


class SpectralConv1d(_SpectralConvNd, nn.Conv1d):
    """1-d convolution divided by its spectral norm; see :class:`SpectralConv2d`.

    y = conv(x, W γ/σ) + b.

    Example:
        >>> SpectralConv1d(3, 4, 5, padding="same", input_size=(16,)).right_vector.shape
        torch.Size([3, 16])
    """

    torch_class = nn.Conv1d


class SpectralConv2d(_SpectralConvNd, nn.Conv2d):
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
        LCNN paper (arXiv 2206.07144), section 3, divides convolutions by their spectral norm; the exact
        operator (stride, padding, input size) and the constant G are ours.

    Example:
        >>> layer = SpectralConv2d(3, 8, 3, stride=2, padding=1, input_size=(32, 32))
        >>> layer(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 8, 16, 16])
    """

    torch_class = nn.Conv2d


class SpectralConv3d(_SpectralConvNd, nn.Conv3d):
    """3-d convolution divided by its spectral norm; see :class:`SpectralConv2d`.

    y = conv(x, W γ/σ) + b.

    Example:
        >>> SpectralConv3d(2, 4, 3, input_size=(6, 6, 6)).right_vector.shape
        torch.Size([2, 6, 6, 6])
    """

    torch_class = nn.Conv3d


def _check_padding_mode(padding_mode: str) -> None:
    if padding_mode != "zeros":
        raise ValueError(
            f"`padding_mode` must be 'zeros', got {padding_mode!r}: the norm of others is not computed. "
            "Use zeros, or a padding layer (nn.ReflectionPad2d, ...) before a convolution without padding."
        )


def _check_exact_type(layer: nn.Module, expected: type[nn.Module]) -> None:
    if type(layer) is not expected:
        raise TypeError(
            f"`layer` must be exactly a torch.nn.{expected.__name__}, got {type(layer).__name__}."
        )


def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    for name, parameter in source.named_parameters(recurse=False):
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(target, name, copy)
    target.train(source.training)
