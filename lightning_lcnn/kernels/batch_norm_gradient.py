"""The gradient of batch normalisation in training, with a derivative that costs little more than itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.kernels.modes import wanted_gradients


def input_gradient_of_batch_norm(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, gain: Tensor) -> Tensor:
    r"""Pull a gradient back through batch normalisation by the statistics of the batch.

    .. math:: w g P(\mathrm{grad}), \quad P(y) = y - \overline{y} - \hat x \, \overline{y \hat x},
              \quad \hat x = (x - μ) g

    P is symmetric, so its derivative by ``grad`` is the same map again; that by x is a sum of x, ``grad`` and the
    incoming gradient with one factor per channel each. Torch composes the derivative of some forty operations on whole
    tensors.

    Args:
        grad: Gradient by the output, (N, C, ...), of the statistics' type.
        x: Input (N, C, ...).
        weight: Affine weight w (C,).
        mean: μ of the batch, (C,).
        gain: g = 1 / sqrt(variance + ε) of the batch, (C,).

    Returns:
        Gradient by x, differentiable in ``grad``, ``x`` (of which μ and g are functions) and ``weight``.

    Source:
        Ours.

    Example:
        >>> x, ones = torch.tensor([[-1.0], [1.0]]), torch.ones(1)
        >>> input_gradient_of_batch_norm(x + 1, x, ones, 0 * ones, ones)  # a line has no gradient left
        tensor([[0.],
                [0.]])
    """
    return _InputGradient.apply(grad, x, weight, mean, gain)


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, gain: Tensor) -> Tensor:
        value, inner, total = _backward(grad, x, weight, mean, gain)
        ctx.save_for_backward(grad, x, weight, mean, gain, inner, total)
        return value

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, gain, inner, total = ctx.saved_tensors
        of_grad, of_x, of_weight = wanted_gradients(ctx)[:3]
        if torch.is_grad_enabled():  # torch's own, which raises where somebody takes a third derivative
            return (*_by_torch(v, grad, x, weight, mean, gain), None, None)
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count = x.numel() / x.shape[1]
        pulled, v_inner, v_total = _backward(v, x, weight, mean, gain)
        if not (of_x or of_weight):
            return pulled, None, None, None, None
        m1, m2, v1, v2 = (sums / count for sums in (total, inner, v_total, v_inner))  # means of y and of y·x̂
        both = (v * grad).sum([d for d in range(x.ndim) if d != 1]) / count - m1 * v1 - m2 * v2
        grad_x = None
        if of_x:
            square = weight * gain.square()
            slope = square * gain * (2 * m2 * v2 - both)  # of x
            constant = square * (v2 * m1 + m2 * v1) - slope * mean
            of_v, of_g = [(-square * m).view(shape) for m in (m2, v2)]
            grad_x = torch.addcmul(constant.view(shape), x, slope.view(shape))
            grad_x.addcmul_(grad, of_g).addcmul_(v, of_v)
        return pulled if of_grad else None, grad_x, gain * count * both if of_weight else None, None, None


def _backward(y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pull y back, w g P(y); the sums of y·x̂ and of y over each channel."""
    return torch.ops.aten.native_batch_norm_backward(
        y, x, weight, None, None, mean, gain, True, 0.0, [True, True, True]
    )


def _by_torch(
    v: Tensor, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, gain: Tensor
) -> tuple[Tensor | None, ...]:
    inputs = grad, x, weight
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(_backward(*inputs, mean, gain)[0], wanted, v, create_graph=True))
    return tuple(next(gradients) if tensor.requires_grad else None for tensor in inputs)
