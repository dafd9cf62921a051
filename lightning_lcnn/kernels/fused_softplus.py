"""The centered softplus as custom autograd functions, and which of its forms runs where."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn._compat import softplus_over
from lightning_lcnn.kernels import compiled_softplus as compiled
from lightning_lcnn.kernels import softplus_formulas as formulas
from lightning_lcnn.kernels.modes import (
    is_compiling_for_training,
    is_dense,
    is_recomputing,
    needs_composite,
    on_plain_cpu,
    wanted_gradients,
)
from lightning_lcnn.kernels.recomputation import remember, write_over

# From this β on the in-place form errs by at most 1e-7 / β in the value.
_MIN_IN_PLACE_BETA = 1.0
# exp(-80) adds nothing to 1, and is a normal number of float32: exp takes 20 times as long where it underflows.
_UNDERFLOW = 80.0


def softplus(x: Tensor, beta: float | Tensor, inplace: bool = False) -> Tensor:
    """s(x; β) by the form that serves best here; see :func:`~lightning_lcnn.functional.centered_softplus`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`x` must be a floating-point tensor, got {kind}; convert it with `.float()` first.")
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(beta, Tensor):
        beta = beta.to(dtype=compute_dtype)
    else:
        beta = torch.as_tensor(beta, dtype=compute_dtype, device=x.device)
    if is_compiling_for_training():
        if inplace and beta.numel() == 1 and x.dtype == torch.float32 and x.device.type == "cpu":
            return _TracedFromOutput.apply(x, beta)
        return _TracedCenteredSoftplus.apply(x.to(compute_dtype), beta).to(x.dtype)
    if needs_composite():
        return composite(x.to(compute_dtype), beta).to(x.dtype)
    if inplace and on_plain_cpu(x, beta) and beta.numel() == 1 and beta.item() >= _MIN_IN_PLACE_BETA:
        return _InPlaceCenteredSoftplus.apply(x, beta)
    return _FusedCenteredSoftplus.apply(x, beta)


def composite(x: Tensor, beta: Tensor) -> Tensor:
    """max(x, 0) + (log(1 + e^t) - log 2) / β with t the negative of abs(βx): accurate under autograd to any order."""
    positive = x > 0  # at x = 0 both terms take the branch of x < 0, so that autograd gives s'(0) = 1/2
    t = torch.where(positive, -x, x) * beta
    near = t > -1.0
    near_value = torch.log1p(torch.expm1(torch.where(near, t, 0.0)) * 0.5)
    far_value = F.softplus(torch.where(near, -1.0, t)) - math.log(2.0)
    return torch.where(positive, x, 0.0) + torch.where(near, near_value, far_value) / beta


def _values(x: Tensor, beta: Tensor) -> Tensor:
    """max(x, 0) + log(1 + expm1(-abs(βx)) / 2) / β without a graph: no operand ever cancels."""
    value = torch.relu(x)
    tail = torch.sub(x, value, alpha=2).mul_(beta).expm1_().mul_(0.5).log1p_().div_(beta)
    return value.add_(tail)


def _value(x: Tensor, beta: Tensor) -> Tensor:
    if compiled.in_use and compiled.fits(x) and on_plain_cpu(x, beta) and beta.numel() == 1:
        return compiled.value(x, beta)
    return _values(x.to(beta.dtype), beta).to(x.dtype)


def _overwritten(x: Tensor, beta: Tensor) -> Tensor:
    if compiled.in_use and compiled.fits(x):
        compiled.overwrite(x, beta)
    else:
        _write_value(x, beta.item())
    return x


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
        function = functools.partial(_value, beta=beta.detach())
        value = function(x)
        if is_recomputing():
            remember(value, x, function)
        ctx.save_for_backward(x, beta, value if ctx.needs_input_grad[1] else None)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, beta, value = ctx.saved_tensors
        z = x.to(beta.dtype) * beta
        # with gradients enabled somebody differentiates this backward again
        grad_x = grad.to(beta.dtype) * _Sigmoid.apply(z) if torch.is_grad_enabled() else z.sigmoid_().mul_(grad)
        grad_beta = None
        if wanted_gradients(ctx)[1]:
            grad_beta = (_sum_product(grad_x, x, beta) - _sum_product(grad, value, beta)) / beta
        return grad_x.to(x.dtype), grad_beta


class _InPlaceCenteredSoftplus(torch.autograd.Function):
    """s(x; β) written over x. With e = exp(-βs): ∂s/∂x = 1 - e/2 and βx = βs + log(2 - e)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        overwrite = functools.partial(_overwritten, beta=beta.detach())
        if is_recomputing():
            write_over(x, overwrite)
        else:
            overwrite(x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, beta)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        value, beta = ctx.saved_tensors
        _, of_beta = wanted_gradients(ctx)
        if torch.is_grad_enabled():  # somebody differentiates this backward again
            if not of_beta:
                return _SlopeFromOutput.apply(grad, value, beta), None
            e = _exponential(value, beta)
            grad_x = grad * (1.0 - 0.5 * e)
            x_times_beta = beta * value + torch.log1p(1.0 - e)
            return grad_x, ((grad_x * x_times_beta).sum() / beta - (grad * value).sum()) / beta
        if compiled.in_use and compiled.fits(grad, value):
            return compiled.gradients(grad, value, beta, of_beta=of_beta)
        e = _exponential(value, beta)
        grad_x = torch.addcmul(grad, grad, e, value=-0.5)
        if not of_beta:
            return grad_x, None
        logarithm = torch.sub(e.new_ones(()), e, out=e).log1p_()
        inner = _sum_product(grad_x, value, beta) - _sum_product(grad, value, beta)
        return grad_x, (inner + _sum_product(grad_x, logarithm, beta) / beta) / beta


class _SlopeFromOutput(torch.autograd.Function):
    """grad · (1 - e/2) as a function of all three, which keeps nothing but them."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, value: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(grad, value, beta)
        return torch.addcmul(grad, grad, _exponential(value, beta), value=-0.5)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, value, beta = ctx.saved_tensors
        e = _exponential(value, beta)
        of_grad = torch.addcmul(v, v, e, value=-0.5)
        if torch.is_grad_enabled():
            product = v * grad * e
            return of_grad, product * (0.5 * beta), (product * value).sum().view(beta.shape) * 0.5
        product = (v * grad).mul_(e)
        of_beta = 0.5 * _sum_product(product, value, beta)
        return of_grad, product.mul_(0.5 * beta), of_beta


def input_gradient(
    grad: Tensor, kept: Tensor, beta: Tensor, from_output: bool, of_beta: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of one β by operations that are differentiable again, from the output or the input."""
    dtype = beta.dtype
    wide = grad.to(dtype)
    if from_output:
        if not of_beta:
            return _SlopeFromOutput.apply(wide, kept.to(dtype), beta).to(kept.dtype), None
        e = _exponential(kept, beta)
        grad_x = wide * (1.0 - 0.5 * e)
        x_times_beta = beta * kept + torch.log1p(1.0 - e)
        return grad_x, ((grad_x * x_times_beta).sum() / beta - (wide * kept).sum()) / beta
    x = kept.to(dtype)
    grad_x = wide * _Sigmoid.apply(x * beta)
    of = ((grad_x * x).sum() - (wide * composite(x, beta)).sum()) / beta if of_beta else None
    return grad_x.to(kept.dtype), of


def _exponential(value: Tensor, beta: Tensor) -> Tensor:
    """Return e = exp(-βs), kept below 2, which it reaches by rounding and where log(2 - e) is infinite."""
    largest = 2.0 - 2.0 * torch.finfo(value.dtype).eps
    if torch.is_grad_enabled():
        return torch.exp(-beta * value).clamp(max=largest)
    return torch.mul(value, beta * (-1.0 / math.log(2.0))).exp2_().clamp_(max=largest)


def _write_value(x: Tensor, beta: float) -> None:
    """Overwrite x with log1p(exp(βx))/β - log(2)/β."""
    shift = x.new_tensor(-math.log(2.0) / beta)
    low, high = (end.item() for end in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
    if max(-low, high) * beta < _UNDERFLOW:  # then torch's fastest exponential, a third less time than softplus
        x.mul_(beta / math.log(2.0)).exp2_().log1p_()
        torch.add(shift, x, alpha=1.0 / beta, out=x)
        return
    x.clamp_(min=-_UNDERFLOW / beta)
    softplus_over(x, beta).add_(shift)


class _TracedFromOutput(torch.autograd.Function):
    """The same for the compiler, in float32 on the CPU: backward needs nothing but what the next layer keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        value = formulas.value(x, beta)
        ctx.save_for_backward(value, beta)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        value, beta = ctx.saved_tensors
        grad_x, grad_beta = formulas.gradients(grad, value, beta)
        return grad_x, grad_beta.view(beta.shape)


class _TracedCenteredSoftplus(torch.autograd.Function):
    """The same for the compiler, which fuses the operations and decides itself what to keep.

    Together with one-pass batch norm it takes 186 MB for a training step of ResNet-18 of width 16, where the derivative
    of :func:`composite` took 305.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        value = torch.relu(x) + torch.log1p(torch.expm1(-x.abs() * beta) * 0.5) / beta
        ctx.save_for_backward(x, beta, value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, beta, value = ctx.saved_tensors
        grad_x = grad * torch.sigmoid(x * beta)
        return grad_x, (grad_x * x - grad * value).sum_to_size(beta.shape) / beta


def _sum_product(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum of a·b over the dimensions along which ``like`` is broadcast; one dot product where it is a scalar."""
    if like.numel() == 1 and a.dtype == b.dtype == like.dtype and a.stride() == b.stride() and is_dense(a):
        return torch.dot(_flat(a), _flat(b)).view(like.shape)
    return (a.to(like.dtype) * b).sum_to_size(like.shape)


def _flat(a: Tensor) -> Tensor:
    return a.permute(0, 2, 3, 1).reshape(-1) if not a.is_contiguous() else a.reshape(-1)
