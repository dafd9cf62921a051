"""Convolution divided by ⟨W, G⟩ that keeps neither the divided weight nor a copy of G for backward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.kernels.modes import needs_composite, on_plain_cpu, wanted_gradients

# stride, padding, dilation, transposed, output padding, groups
Arguments = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]


class SharedGradient:
    """G, shared between its owner and the graphs that will need it in backward; copied only before it changes."""

    def __init__(self) -> None:
        self._readers: weakref.WeakSet[_Reader] = weakref.WeakSet()

    def lend(self, value: Tensor) -> _Reader:
        """Return a reader that keeps this value whatever its owner writes over it later."""
        reader = _Reader(value)
        self._readers.add(reader)
        return reader

    def before_change(self) -> None:
        """Give every reader its own copy; the owner calls this before it overwrites the value."""
        for reader in self._readers:
            reader.value = reader.value.clone()
        self._readers.clear()


class _Reader:
    def __init__(self, value: Tensor) -> None:
        self.value = value.detach()


def normalized_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_gamma: Tensor | None,
    gradient: _Reader,
    arguments: Arguments,
) -> Tensor:
    r"""Convolution with W γ/σ, σ = ⟨W, G⟩, in eager mode.

    .. math:: y = \frac{γ}{σ} \, W * x + b

    The smaller of weight and output is multiplied by γ/σ, in backward too; G is a constant. Where σ is not positive
    it counts as 1; see :func:`positive_norm`.

    Args:
        x: Batch (B, C_in, *size).
        weight: W, (C_out, C_in / groups, *kernel_size).
        bias: b, (C_out,), or None.
        log_gamma: Logarithm of the gain, 0-d, or None for a gain of 1.
        gradient: What :class:`SharedGradient` lends, shaped like W.
        arguments: Stride, padding, dilation, False, output padding and groups, as ``torch.convolution`` takes them.

    Returns:
        (B, C_out, *output size).

    Source:
        Ours.

    Example:
        >>> weight, G = torch.full((1, 1, 1), 4.0), SharedGradient().lend(torch.ones(1, 1, 1))
        >>> normalized_convolution(torch.ones(1, 1, 2), weight, None, None, G, ([1], [0], [1], False, [0], 1))
        tensor([[[1., 1.]]])
    """
    return _NormalizedConvolution.apply(x, weight, bias, log_gamma, gradient, arguments)


class _NormalizedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_gamma: Tensor | None,
        gradient: _Reader,
        arguments: Arguments,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, log_gamma)
        ctx.gradient, ctx.arguments, ctx.scales_output = gradient, arguments, x.numel() < weight.numel()
        ctx.factors = scale, _ = _scale(weight, log_gamma, gradient.value)
        if not ctx.scales_output:
            return torch.convolution(x, weight * scale, bias, *arguments)
        output = torch.convolution(x, weight, None, *arguments).mul_(scale)
        return output if bias is None else output.add_(bias.view(-1, *[1] * (x.ndim - 2)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, log_gamma = ctx.saved_tensors
        again = torch.is_grad_enabled()  # somebody differentiates this backward: nothing may change in place
        scale, inverse = _scale(weight, log_gamma, ctx.gradient.value) if again else ctx.factors
        of_x, of_weight, of_bias, of_gamma = wanted_gradients(ctx)[:4]
        of_weight = of_weight or of_gamma
        scaled = (grad * scale, weight) if ctx.scales_output else (grad, weight * scale)
        if again and not (of_weight or of_bias):
            return _InputGradient.apply(*scaled, x, ctx.arguments), *[None] * 5
        grad_x, grad_weight, _ = _pull_back(scaled[0], x, scaled[1], ctx.arguments, [of_x, of_weight, False])
        grad_gamma = None
        if of_weight:
            if not ctx.scales_output:
                grad_weight = grad_weight * scale if again else grad_weight.mul_(scale)
            grad_gamma = inner_product(grad_weight, weight)
            correction = (ctx.gradient.value, grad_gamma * inverse)
            add = grad_weight.addcmul if again else grad_weight.addcmul_
            grad_weight = add(*correction, value=-1)
        grad_bias = grad.sum([d for d in range(grad.ndim) if d != 1]) if of_bias else None
        return grad_x, grad_weight, grad_bias, grad_gamma if of_gamma else None, None, None


class _InputGradient(torch.autograd.Function):
    """Pull a gradient back to the input; torch's own derivative of this convolves with kernels of image size."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, x: Tensor, arguments: Arguments) -> Tensor:
        ctx.save_for_backward(grad, weight)
        ctx.arguments = arguments
        return _pull_back(grad, x, weight, arguments, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        of_grad, of_weight, *_ = wanted_gradients(ctx)
        pushed = torch.convolution(v, weight, None, *ctx.arguments) if of_grad else None
        grad_weight = _pull_back(grad, v, weight, ctx.arguments, [False, True, False])[1] if of_weight else None
        return pushed, grad_weight, None, None


def _pull_back(grad: Tensor, x: Tensor, weight: Tensor, arguments: Arguments, wanted: list[bool]) -> Any:
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *arguments, wanted)


def _scale(weight: Tensor, log_gamma: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """γ/σ, and 1/σ or 0 where σ does not depend on the weight."""
    sigma = inner_product(weight, gradient)
    positive = positive_norm(sigma)
    inverse = 1.0 / positive
    return inverse if log_gamma is None else log_gamma.exp() / positive, inverse * (sigma > 0)


def positive_norm(sigma: Tensor) -> Tensor:
    """σ as a divisor: 1 where it is not positive, as for a zero weight.

    Below zero W has moved far from where G was computed, by large steps or from outside. On the CPU that warns;
    elsewhere it would have to wait for the device, and the residual that :class:`~lightning_lcnn.PowerIteration` logs
    tells.
    """
    if on_plain_cpu(sigma) and not needs_composite() and not torch.jit.is_tracing() and sigma < 0:
        warnings.warn(
            f"a spectral layer has the stale norm ⟨W, G⟩ = {float(sigma.detach()):.3g} < 0 and uses its raw weight: "
            "its weight changed too much since the last refresh. Use PowerIteration(every_n_steps=1) or a smaller "
            "learning rate, and call lightning_lcnn.layers.reset_spectral_norm(model) after changing weights.",
            UserWarning,
            stacklevel=2,
        )
    return torch.where(sigma > 0, sigma, 1.0)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a·b, 0-d, over two weights: by output channels, and over these in float64.

    What is left of the gradient after the part along W is taken out may be far smaller, so that part must be accurate.

    Example:
        >>> inner_product(torch.ones(2, 3), torch.ones(2, 3))
        tensor(6.)
    """
    return (a * b).sum(dim=list(range(1, a.ndim))).sum(dtype=torch.float64).to(a.dtype)
