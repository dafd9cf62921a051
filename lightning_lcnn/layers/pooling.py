"""Smooth max pooling as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_lcnn._checks import check_int, check_positive
from lightning_lcnn.functional.smooth_pooling import Size, log_mean_exp_pool2d


class LogMeanExpPool2d(nn.Module):
    r"""Smooth max pooling :math:`y = τ \log \mathrm{mean}_i\, e^{x_i/τ}` over windows.

    Unlike max pooling it has finite curvature, 1/(2τ) for windows that do not overlap, and slope at most 1 there. The
    temperature τ is fixed: it is the distance, in units of the input, at which the largest entry takes over.

    Args:
        kernel_size: window, one number or (height, width).
        stride: step between windows; None means ``kernel_size``.
        padding: on both sides, at most half the window; padded places take no part.
        temperature: τ > 0. The default 0.2 has the sharpness of a centered softplus with β = 1/τ = 5.
        ceil_mode: as in torch, whether a last window may reach over the end of the padded input.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when a size is out of range, ``padding`` exceeds half the window or ``temperature`` is not positive.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> LogMeanExpPool2d(2)(torch.ones(1, 3, 4, 4)).shape
        torch.Size([1, 3, 2, 2])
    """

    def __init__(
        self,
        kernel_size: Size,
        stride: Size | None = None,
        padding: Size = 0,
        temperature: float = 0.2,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.kernel_size = _sizes("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else _sizes("stride", stride, 1)
        self.padding = _sizes("padding", padding, 0)
        if any(2 * p > k for p, k in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(
                f"`padding` must be at most half of `kernel_size`, got {self.padding} for {self.kernel_size}."
            )
        check_positive("temperature", temperature)
        self.temperature = float(temperature)
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """Pool x of shape (N, C, H, W)."""
        return log_mean_exp_pool2d(x, self.kernel_size, self.stride, self.padding, self.temperature, self.ceil_mode)

    def extra_repr(self) -> str:
        """Window and temperature."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"temperature={self.temperature:g}, ceil_mode={self.ceil_mode}"
        )


def _sizes(name: str, value: Size, minimum: int) -> tuple[int, int]:
    """One checked number for each axis."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(sizes) != 2:
        raise ValueError(f"`{name}` must be one integer or two, got {value!r}.")
    for size in sizes:
        check_int(name, size, minimum)
    return sizes[0], sizes[1]
