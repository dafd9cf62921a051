"""The centered softplus: a ReLU whose curvature is a parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_lcnn._checks import check_positive

# Below |βx| = 1/2 the float32 kernel takes log((1 + e^z)/2) = z/2 + z²/8 - z⁴/192 + z⁶/2880 - 17z⁸/645120, whose first
# dropped term is 7e-8 of the sum there; above it the plain difference softplus - log 2 is exact to 5e-7 of its value.
# That takes a tenth of the time of log1p and expm1, which ATen does not vectorise well on the CPU.
_SERIES_LIMIT = 0.5
_SERIES = (1 / 8, -1 / 192, 1 / 2880, -17 / 645120)


def centered_softplus(x: Tensor, beta: float | Tensor) -> Tensor:
    r"""Smooth, strictly increasing activation through the origin, with curvature set by ``beta``.

    .. math:: s(x; β) = \frac{1}{β} \log\frac{1 + e^{βx}}{2}

    :math:`s(0) = 0`, :math:`s'(x) = σ(βx)` lies strictly between 0 and 1, and
    :math:`0 < s''(x) = β σ(βx) σ(-βx) \le β/4` with equality at 0. β → 0 gives the line x/2, β → ∞ gives ReLU.
    Values and both derivatives are finite and accurate to a few units in the last place of float32 for β from 1e-6 to
    1e4 and \|x\| up to 1e4; float16 and bfloat16 inputs are evaluated in float32.

    Eager calls run a fused kernel with its own backward, which saves the input and shares the saved output with the
    layer that follows. Under ``torch.compile``, ``torch.func`` and forward-mode differentiation the same function is
    composed of differentiable operations.

    Args:
        x: Floating-point tensor of any shape.
        beta: Positive number, or a positive tensor that broadcasts to the shape of ``x`` (one value, or one per
            channel in the shape (C, 1, 1)). Gradients flow to a tensor.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``beta`` is a number that is not positive and finite.

    Source:
        LCNN (Srinivas et al., 2022), section 4.1; the numerical scheme is ours.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0])
        >>> centered_softplus(x, beta=10.0)
        tensor([-0.0693,  0.0000,  0.9307])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`x` must be a floating-point tensor, got {kind}; convert it with `.float()` first.")
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(beta, Tensor):
        beta = beta.to(dtype=compute_dtype)
    else:
        check_positive("beta", beta)
        beta = torch.as_tensor(beta, dtype=compute_dtype, device=x.device)
    if _needs_composite():
        return _composite(x.to(compute_dtype), beta).to(x.dtype)
    return _FusedCenteredSoftplus.apply(x, beta)


def _needs_composite() -> bool:
    """True where a custom autograd function would break the graph or is not supported."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def _composite(x: Tensor, beta: Tensor) -> Tensor:
    """max(x, 0) + (log(1 + e^t) - log 2) / β with t the negative of abs(βx): accurate under autograd to any order."""
    positive = x > 0  # at x = 0 both terms take the branch of x < 0, so that autograd gives s'(0) = 1/2
    t = torch.where(positive, -x, x) * beta
    near = t > -1.0
    near_value = torch.log1p(torch.expm1(torch.where(near, t, 0.0)) * 0.5)
    far_value = F.softplus(torch.where(near, -1.0, t)) - math.log(2.0)
    return torch.where(positive, x, 0.0) + torch.where(near, near_value, far_value) / beta


def _values(x: Tensor, beta: Tensor) -> Tensor:
    """Return s(x; β) without a graph."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return _composite(x, beta)
    z = x * beta
    square = (z * z).clamp_(max=_SERIES_LIMIT**2)
    c0, c1, c2, c3 = (torch.tensor(c) for c in _SERIES)
    near_value = torch.add(c2, square, alpha=float(c3))
    torch.addcmul(c1, near_value, square, out=near_value)
    torch.addcmul(c0, near_value, square, out=near_value)
    near_value.mul_(square).add_(z, alpha=0.5)
    far_value = torch._C._nn.softplus(z, out=z).sub_(math.log(2.0))  # type: ignore[call-arg]
    is_near = square.lt_(_SERIES_LIMIT**2)  # 0.0 or 1.0, for which lerp returns one side to the last bit
    return far_value.lerp_(near_value, is_near).div_(beta)


class _Sigmoid(torch.autograd.Function):
    """σ(z) whose derivative σ(z) σ(-z) keeps its relative accuracy where 1 - σ(z) rounds to zero."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.sigmoid(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (torch.sigmoid(z) * torch.sigmoid(-z))


class _FusedCenteredSoftplus(torch.autograd.Function):
    """s(x; β) with ∂s/∂x = σ(βx) and ∂s/∂β = (x σ(βx) - s) / β."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        value = _values(x.to(beta.dtype), beta).to(x.dtype)
        ctx.save_for_backward(x, beta, value if ctx.needs_input_grad[1] else None)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, beta, value = ctx.saved_tensors
        z = x.to(beta.dtype) * beta
        # with gradients enabled somebody differentiates this backward again
        grad_x = grad.to(beta.dtype) * _Sigmoid.apply(z) if torch.is_grad_enabled() else z.sigmoid_().mul_(grad)
        grad_beta = None
        if ctx.needs_input_grad[1]:
            grad_beta = (_sum_product(grad_x, x, beta) - _sum_product(grad, value, beta)) / beta
        return grad_x.to(x.dtype), grad_beta


def _sum_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of a·b over the dimensions along which ``like`` is broadcast; one dot product where it is a scalar."""
    if like.numel() == 1 and a.dtype == b.dtype == like.dtype and a.stride() == b.stride() and _is_dense(a):
        return torch.dot(_flat(a), _flat(b)).view(like.shape)
    return (a.to(like.dtype) * b).sum_to_size(like.shape)


def _is_dense(a: Tensor) -> bool:
    return a.is_contiguous() or (a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last))


def _flat(a: Tensor) -> Tensor:
    return a.permute(0, 2, 3, 1).reshape(-1) if not a.is_contiguous() else a.reshape(-1)
