"""What the spectral convolutions of all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_lcnn.functional._eager import needs_composite, on_plain_cpu
from lightning_lcnn.functional._sharded import scalar
from lightning_lcnn.functional.linear_operators import (
    ConvGeometry,
    LinearOperator,
    conv_geometry,
    conv_operator,
)
from lightning_lcnn.functional.normalized_convolution import normalized_convolution
from lightning_lcnn.layers.spectral_base import SpectralLayer, check_exact_type, copy_parameters

ConvT = TypeVar("ConvT", bound="SpectralConvNd")


class SpectralConvNd(SpectralLayer):
    """Base of the spectral convolutions; the subclass names its torch class and inherits from it."""

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
            >>> from lightning_lcnn.layers import SpectralConv2d
            >>> SpectralConv2d.from_layer(torch.nn.Conv2d(3, 4, 3), input_size=(8, 8)).right_vector.shape
            torch.Size([3, 8, 8])
        """
        check_exact_type(layer, cls.torch_class)
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
        copy_parameters(layer, new)
        new._create_spectral_state(gamma, new._right_shape(input_size))
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Apply the normalised layer to (B, in_channels, *size) or (in_channels, *size)."""
        if self.right_vector.numel() == 0:
            self._see_input((self.in_channels, *input.shape[2 - self.weight.dim() :]))
        geometry = self._geometry()
        if self._is_eager(input, geometry):
            gradient = self._shared_gradient().lend(self.spectral_gradient)
            log_gamma = None if self.log_gamma is None else scalar(self.log_gamma)
            return normalized_convolution(input, self.weight, self.bias, log_gamma, gradient, geometry)
        return self._conv_forward(input, self.normalized_weight(), self.bias)

    def _is_eager(self, input: Tensor, geometry: ConvGeometry) -> bool:
        """Whether the custom function, which keeps less for backward, can stand in for the composed operations."""
        if needs_composite() or torch.is_autocast_enabled("cpu") or input.dim() != self.weight.dim():
            return False
        if not self.weight.requires_grad:  # input measures freeze the weights and have a cheaper second derivative
            return False
        others = (t for t in (self.bias, self.log_gamma) if t is not None)
        if not on_plain_cpu(input, self.weight, self.spectral_gradient, *others):
            return False
        return all(before == after for before, after in geometry.padding)

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


def _check_padding_mode(padding_mode: str) -> None:
    if padding_mode != "zeros":
        raise ValueError(
            f"`padding_mode` must be 'zeros', got {padding_mode!r}: the norm of others is not computed. "
            "Use zeros, or a padding layer (nn.ReflectionPad2d, ...) before a convolution without padding."
        )
