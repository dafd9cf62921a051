"""Layers of a training step on a GPU as a few operations: activation, clipped batch norm, normalised weight.

Each has a reference in torch's operations, Triton kernels, and one autograd function around it, whose backward is
an operation as well, and composed of differentiable ones where somebody differentiates it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn.kernels.clipped_batch_norm import differentiable_gradients
from lightning_lcnn.kernels.fused_softplus import composite, input_gradient
from lightning_lcnn.kernels.modes import is_dense, is_recomputing, needs_composite, wanted_gradients
from lightning_lcnn.kernels.operators import LARGEST_WHOLE, operator, runs_operators
from lightning_lcnn.kernels.recomputation import remember, write_over

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def takes_operators(x: Tensor, *others: Tensor | None) -> bool:
    """Whether operators serve here: plain tensors on one device that has kernels, nobody transforms or traces."""
    if needs_composite() or not runs_operators(x.device) or torch.jit.is_tracing():
        return False
    tensors = [x, *(t for t in others if t is not None)]
    return all(type(t) in (Tensor, nn.Parameter) and t.device == x.device and t.dtype in _FLOATS for t in tensors)


def kernels(name: str, arguments: Sequence[Any]) -> int:
    """Kernels that one of our operators launches.

    Example:
        >>> kernels("clipped_norm", ()), kernels("scale_weight", [torch.zeros(8)]), kernels("solve_log_rules", ())
        (2, 1, 1)
    """
    if name.startswith("scale_weight"):
        return 1 if arguments[0].numel() <= LARGEST_WHOLE else 2
    return 2 if name.startswith("clipped_norm") else 1


# --------------------------------------------------------------------------- the centered softplus


def _softplus_reference(x: Tensor, log_beta: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return composite(x.to(dtype), log_beta.to(dtype).exp()).to(x.dtype)


def _softplus_cuda(x: Tensor, log_beta: Tensor) -> Tensor:
    from lightning_lcnn.kernels import triton_layers

    result = torch.empty_like(x)
    triton_layers.softplus(x, log_beta, result)
    return result


def _softplus_in_place_reference(x: Tensor, log_beta: Tensor) -> None:
    x.copy_(_softplus_reference(x, log_beta))


def _softplus_in_place_cuda(x: Tensor, log_beta: Tensor) -> None:
    from lightning_lcnn.kernels import triton_layers

    triton_layers.softplus(x, log_beta, x)


def _softplus_gradient_reference(
    grad: Tensor, kept: Tensor, log_beta: Tensor, from_output: bool, of_beta: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(kept.dtype, torch.float32)
    beta, kept_wide, wide = log_beta.to(dtype).exp(), kept.to(dtype), grad.to(dtype)
    if from_output:
        v = beta * kept_wide
        h = torch.exp(-v) / 2
        sigma = (1 - h).clamp_min(0.0)
    else:
        v = beta * composite(kept_wide, beta)
        sigma, h = torch.sigmoid(beta * kept_wide), torch.sigmoid(-beta * kept_wide)
    grad_x = (wide * sigma).to(kept.dtype)
    if not of_beta:
        return grad_x, grad_x.new_empty(0, dtype=dtype)
    slopes = sigma * torch.log(2 * sigma.clamp_min(1e-30)) - h * v
    return grad_x, ((wide * slopes).sum() / beta).view(1)


def _softplus_gradient_meta(
    grad: Tensor, kept: Tensor, log_beta: Tensor, from_output: bool, of_beta: bool
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(kept.dtype, torch.float32)
    parts = -(-kept.numel() // 4096) if of_beta else 0
    return torch.empty_like(kept), torch.empty(parts, device=kept.device, dtype=dtype)


def _softplus_gradient_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lightning_lcnn.kernels import triton_layers

    return triton_layers.softplus_gradient(*arguments)


_softplus = operator(
    "centered_softplus(Tensor x, Tensor log_beta) -> Tensor",
    _softplus_reference,
    lambda x, log_beta: torch.empty_like(x),
    _softplus_cuda,
)
_softplus_in_place = operator(
    "centered_softplus_(Tensor(a!) x, Tensor log_beta) -> ()",
    _softplus_in_place_reference,
    lambda x, log_beta: None,
    _softplus_in_place_cuda,
)
_softplus_gradient = operator(
    "centered_softplus_gradient(Tensor grad, Tensor kept, Tensor log_beta, bool from_output, bool of_beta)"
    " -> (Tensor, Tensor)",
    _softplus_gradient_reference,
    _softplus_gradient_meta,
    _softplus_gradient_cuda,
)


def softplus_of_log(x: Tensor, log_beta: Tensor, inplace: bool) -> Tensor:
    """s(x; β) with one β, where :func:`takes_operators` holds.

    The form in place keeps its output; that of a half-precision type would be too coarse to tell the slope, so there
    the input is kept.
    """
    inplace = inplace and is_dense(x) and x.dtype in (torch.float32, torch.float64)
    return (_InPlaceSoftplus if inplace else _Softplus).apply(x, log_beta)


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_beta: Tensor) -> Tensor:
        dense = _dense(x)
        fixed = log_beta.detach()
        value = _softplus(dense, fixed)
        if is_recomputing():
            remember(value, x, lambda x: _softplus(_dense(x), fixed))
        ctx.save_for_backward(dense, log_beta)
        ctx.from_output = False
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return _backward_of_softplus(ctx, grad)


class _InPlaceSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_beta: Tensor) -> Tensor:
        fixed = log_beta.detach()

        def overwrite(x: Tensor) -> Tensor:
            _softplus_in_place(x, fixed)
            return x

        if is_recomputing():
            write_over(x, overwrite)
        else:
            overwrite(x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, log_beta)
        ctx.from_output = True
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return _backward_of_softplus(ctx, grad)


def _backward_of_softplus(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    kept, log_beta = ctx.saved_tensors
    _, of_beta = wanted_gradients(ctx)
    if torch.is_grad_enabled():  # somebody differentiates this backward again
        beta = log_beta.reshape(()).to(torch.promote_types(kept.dtype, torch.float32)).exp()
        grad_x, grad_beta = input_gradient(grad, kept, beta, ctx.from_output, of_beta)
        return grad_x, None if grad_beta is None else (grad_beta * beta).view(log_beta.shape).to(log_beta.dtype)
    grad_x, parts = _softplus_gradient(_like(grad, kept), kept, log_beta, ctx.from_output, of_beta)
    return grad_x, parts.sum(0, keepdim=True, dtype=log_beta.dtype).view(log_beta.shape) if of_beta else None


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the layout of x."""
    if grad.stride() == x.stride() or (grad.is_contiguous() and x.is_contiguous()):
        return grad
    return torch.empty_like(x, dtype=grad.dtype).copy_(grad)


def _dense(x: Tensor) -> Tensor:
    return x if is_dense(x) else x.contiguous()


# --------------------------------------------------------------------------- batch norm with a clipped slope


def _norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    log_gamma: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, count = torch.promote_types(x.dtype, torch.float32), x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.to(dtype), [d for d in range(x.ndim) if d != 1], correction=0)
    gain = torch.rsqrt(variance + eps)
    slope = (gain if weight is None else gain * weight.to(dtype).abs()).max()
    factor = torch.ones_like(slope)
    if log_gamma is not None:
        gamma = log_gamma.to(dtype).exp().reshape(())
        factor = torch.where(slope >= gamma, gamma / slope, 1.0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    if batches is not None:
        batches.add_(1)
    scale = gain * factor if weight is None else gain * factor * weight
    shift = -mean * scale if bias is None else bias * factor - mean * scale
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return (x.to(dtype) * scale.view(shape) + shift.view(shape)).to(x.dtype), mean, gain, factor


def _norm_meta(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = torch.empty(x.shape[1], device=x.device, dtype=dtype)
    return torch.empty_like(x), mean, torch.empty_like(mean), mean.new_empty(())


def _norm_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lightning_lcnn.kernels import triton_layers

    return triton_layers.normalize(*arguments)


def _norm_gradient_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    log_gamma: Tensor | None,
    mean: Tensor,
    gain: Tensor,
    factor: Tensor,
    of_x: bool,
) -> tuple[Tensor, ...]:
    wide, dims = mean.dtype, [d for d in range(x.ndim) if d != 1]
    shape, count = [1, -1, *[1] * (x.ndim - 2)], x.numel() // x.shape[1]
    normalized = (x.to(wide) - mean.view(shape)) * gain.view(shape)
    total, product = grad.to(wide).sum(dims), (grad.to(wide) * normalized).sum(dims)
    w = torch.ones_like(mean) if weight is None else weight.to(wide)
    of_weight, own = factor * product, factor
    if log_gamma is not None:
        slopes = gain * w.abs()
        of_factor = (product * w if bias is None else product * w + total * bias).sum()
        own = torch.where(slopes.max() >= log_gamma.to(wide).exp().reshape(()), factor * of_factor, 0.0)
        steepest = (slopes == slopes.max()).to(wide)
        of_weight = of_weight - steepest * gain * w.sign() * own / (slopes.max() * steepest.sum())
    none = x.new_empty(0)
    grad_x = none
    if of_x:
        mean_of = total.view(shape) / count + normalized * (product.view(shape) / count)
        grad_x = ((gain * factor * w).view(shape) * (grad.to(wide) - mean_of)).to(x.dtype)
    return (
        grad_x,
        none if weight is None else of_weight.to(weight.dtype),
        none if bias is None else (factor * total).to(bias.dtype),
        none if log_gamma is None else own.to(log_gamma.dtype).view(log_gamma.shape),
    )


def _norm_gradient_meta(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    log_gamma: Tensor | None,
    mean: Tensor,
    gain: Tensor,
    factor: Tensor,
    of_x: bool,
) -> tuple[Tensor, ...]:
    given = x if of_x else None, weight, bias, log_gamma
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given)


def _norm_gradient_cuda(*arguments: Any) -> tuple[Tensor, ...]:
    from lightning_lcnn.kernels import triton_layers

    return triton_layers.normalize_gradient(*arguments)


_norm = operator(
    "clipped_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? log_gamma, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? batches, float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_reference,
    _norm_meta,
    _norm_cuda,
)
_norm_gradient = operator(
    "clipped_norm_gradient(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? log_gamma, Tensor mean, "
    "Tensor gain, Tensor factor, bool of_x) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_gradient_reference,
    _norm_gradient_meta,
    _norm_gradient_cuda,
)


def clipped_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    log_gamma: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
) -> Tensor:
    """As :func:`~lightning_lcnn.kernels.clipped_batch_norm.clipped_batch_norm`, where :func:`takes_operators` holds.

    Args:
        x: Batch (N, C, ...) of more than one value for each channel.
        weight: Affine weight (C,), or None.
        bias: Affine bias (C,), or None.
        log_gamma: Logarithm of γ, one number, or None.
        statistics: Running mean, running variance and number of batches, updated in place, or None.
        momentum: Weight of this batch in the running statistics.
        eps: The ε that is added to the variance.
    """
    return _ClippedNorm.apply(x, weight, bias, log_gamma, statistics, momentum, eps)


class _ClippedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        log_gamma: Tensor | None,
        statistics: tuple[Tensor | None, Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        dense = _dense(x)
        value, mean, gain, factor = _norm(dense, weight, bias, log_gamma, *statistics, momentum, eps)
        if is_recomputing():
            fixed = [None if t is None else t.detach().clone() for t in (weight, bias, log_gamma)]

            def again(x: Tensor) -> Tensor:
                return _norm(_dense(x), *fixed, None, None, None, 0.0, eps)[0]

            remember(value, x, again)
        ctx.save_for_backward(dense, weight, bias, log_gamma, mean, gain, factor)
        ctx.eps = eps
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, log_gamma, mean, gain, factor = ctx.saved_tensors
        wanted = wanted_gradients(ctx)[:4]
        if torch.is_grad_enabled():  # somebody differentiates this backward again
            wide = mean.dtype
            gamma = mean.new_full((), torch.inf) if log_gamma is None else log_gamma.reshape(()).to(wide).exp()
            found = differentiable_gradients(
                grad.to(wide), x.to(wide), weight, bias, gamma, mean, gain, ctx.eps, wanted
            )
            gradients = [
                None if g is None else g.to(t.dtype) for g, t in zip(found, (x, weight, bias, gamma), strict=True)
            ]
            if gradients[3] is not None:
                gradients[3] = (gradients[3] * gamma).view(log_gamma.shape).to(log_gamma.dtype)
        else:
            found = _norm_gradient(_like(grad, x), x, weight, bias, log_gamma, mean, gain, factor, wanted[0])
            gradients = [g if needed else None for g, needed in zip(found, wanted, strict=True)]
        return (*gradients, None, None, None)


# --------------------------------------------------------------------------- a weight divided by its norm


def _scale_reference(
    weight: Tensor, gradient: Tensor, log_gamma: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    sigma = (weight.to(wide) * gradient.to(wide)).sum()
    inverse = 1.0 / torch.where(sigma > 0, sigma, 1.0)
    scale = inverse if log_gamma is None else inverse * log_gamma.to(wide).exp().reshape(())
    return (weight.to(wide) * scale).to(dtype), torch.stack([scale, inverse * (sigma > 0)])


def _scale_meta(
    weight: Tensor, gradient: Tensor, log_gamma: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.empty_like(weight, dtype=dtype), torch.empty(2, device=weight.device, dtype=wide)


def _scale_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lightning_lcnn.kernels import triton_layers

    return triton_layers.scale_weight(*arguments)


def _scale_gradient_reference(
    grad: Tensor, weight: Tensor, gradient: Tensor, log_gamma: Tensor | None, factors: Tensor
) -> tuple[Tensor, Tensor]:
    scale, inverse = factors.unbind()
    product = (grad.to(scale.dtype) * weight).sum() * scale
    of_weight = grad * scale - gradient * (product * inverse)
    of_gamma = product.new_empty(0) if log_gamma is None else product.view(log_gamma.shape)
    return of_weight.to(weight.dtype), of_gamma.to(weight.dtype)


def _scale_gradient_meta(
    grad: Tensor, weight: Tensor, gradient: Tensor, log_gamma: Tensor | None, factors: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(0) if log_gamma is None else torch.empty_like(log_gamma)


def _scale_gradient_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lightning_lcnn.kernels import triton_layers

    return triton_layers.scale_weight_gradient(*arguments)


_scale = operator(
    "scale_weight(Tensor weight, Tensor gradient, Tensor? log_gamma, ScalarType dtype) -> (Tensor, Tensor)",
    _scale_reference,
    _scale_meta,
    _scale_cuda,
)
_scale_gradient = operator(
    "scale_weight_gradient(Tensor grad, Tensor weight, Tensor gradient, Tensor? log_gamma, Tensor factors)"
    " -> (Tensor, Tensor)",
    _scale_gradient_reference,
    _scale_gradient_meta,
    _scale_gradient_cuda,
)


def scale_weight(weight: Tensor, gradient: Any, log_gamma: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W γ/σ with σ = ⟨W, G⟩, or W γ where σ is not positive, where :func:`takes_operators` holds.

    Args:
        weight: W.
        gradient: What :class:`~lightning_lcnn.kernels.normalized_convolution.SharedGradient` lends of G.
        log_gamma: Logarithm of the gain, one number, or None.
        dtype: Type of the result.
    """
    return _ScaledWeight.apply(weight, log_gamma, gradient, dtype)


class _ScaledWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_gamma: Tensor | None, gradient: Any, dtype: torch.dtype) -> Tensor:
        dense = _dense(weight)
        value, factors = _scale(dense, _like(gradient.value, dense), log_gamma, dtype)
        ctx.save_for_backward(weight, log_gamma, factors)
        ctx.gradient = gradient
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_gamma, factors = ctx.saved_tensors
        gradient = ctx.gradient.value
        if torch.is_grad_enabled():  # somebody differentiates this backward again
            wide = factors.dtype
            sigma = (weight.to(wide) * gradient).sum()
            inverse = 1.0 / torch.where(sigma > 0, sigma, 1.0)
            scale = inverse if log_gamma is None else inverse * log_gamma.reshape(()).to(wide).exp()
            product = (grad * weight).sum() * scale
            of_weight = (grad * scale - gradient * (product * inverse * (sigma > 0))).to(weight.dtype)
            return (
                of_weight,
                None if log_gamma is None else product.view(log_gamma.shape).to(log_gamma.dtype),
                None,
                None,
            )
        weight = _dense(weight)
        of_weight, of_gamma = _scale_gradient(_like(grad, weight), weight, _like(gradient, weight), log_gamma, factors)
        return of_weight, of_gamma if log_gamma is not None else None, None, None
