"""Smooth maximum over windows."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, int]


def log_mean_exp_pool2d(
    x: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    temperature: float = 0.2,
    ceil_mode: bool = False,
) -> Tensor:
    r"""Smooth max pooling: the log-mean-exp of every window.

    .. math:: y = τ \log \frac{1}{n} \sum_{i=1}^{n} e^{x_i / τ}

    It lies between the window's mean (τ → ∞) and its maximum (τ → 0), at most τ log n below the latter, and leaves
    constants alone. Its slope is at most √m and its curvature at most √m / (2τ), where an input belongs to at most m
    windows (m = 1 without overlap). Padding takes no part: n counts the true inputs of the window.

    Args:
        x: input of shape (N, C, H, W).
        kernel_size: window, one number or (height, width).
        stride: step between windows; None means ``kernel_size``.
        padding: on both sides, at most half the window.
        temperature: τ > 0, in units of x. The default 0.2 has the sharpness of a centered softplus with β = 1/τ = 5.
        ceil_mode: as in torch, whether a last window may reach over the end of the padded input.

    Returns:
        Tensor of shape (N, C, H', W') in the type of x; computed in at least float32.

    Raises:
        ValueError: when x is not four-dimensional or a window does not fit.

    Source:
        Ours.

    Example:
        >>> x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
        >>> round(log_mean_exp_pool2d(x, 2, temperature=0.01).item(), 3)  # 3 - 0.01 log 4
        2.986
    """
    if x.dim() != 4:
        raise ValueError(f"`x` must have shape (N, C, H, W), got {tuple(x.shape)}.")
    kernel, pads = _pair(kernel_size), _pair(padding)
    steps = kernel if stride is None else _pair(stride)
    geometry = list(zip(x.shape[2:], pads, kernel, steps, strict=True))
    size = [_outputs(*axis, ceil_mode) for axis in geometry]
    if min(size) < 1:
        raise ValueError(f"`kernel_size` {kernel} does not fit an input of size {tuple(x.shape[2:])} padded by {pads}.")
    scaled = x.to(torch.promote_types(x.dtype, torch.float32)) / temperature
    # up to the end of the last window
    ends = [max(p, (m - 1) * s + k - n - p) for (n, p, k, s), m in zip(geometry, size, strict=True)]
    around = (pads[1], ends[1], pads[0], ends[0])
    windows = torch.stack(_shifted(F.pad(scaled, around, value=-math.inf), kernel, steps, size))
    log_count = scaled.new_tensor(math.prod(kernel)).log()
    if max(around) > 0:  # not by average pooling, whose divisor_override is lost on the way to ONNX
        ones = F.pad(scaled.new_ones(1, 1, *x.shape[2:]), around)
        log_count = torch.stack(_shifted(ones, kernel, steps, size)).sum(0).log()
    return (temperature * (windows.logsumexp(0) - log_count)).to(x.dtype)


def _outputs(size: int, padding: int, kernel: int, stride: int, ceil_mode: bool) -> int:
    """Number of windows on an axis, by torch's rule: no window starts in the padding on the right."""
    free = size + 2 * padding - kernel
    if not ceil_mode or free < 0:
        return free // stride + 1
    outputs = -(-free // stride) + 1
    return outputs - 1 if (outputs - 1) * stride >= size + padding else outputs


def _shifted(x: Tensor, kernel: tuple[int, int], steps: tuple[int, int], size: list[int]) -> list[Tensor]:
    """The window's entries one by one: views of x that are shifted by the position in the window."""
    ends = [s * (n - 1) + 1 for s, n in zip(steps, size, strict=True)]
    return [
        x[:, :, i : i + ends[0] : steps[0], j : j + ends[1] : steps[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
