"""Batch normalisation as an affine map of known slope, and the factor that limits the slope."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.kernels.batch_norm_gradient import input_gradient_of_batch_norm
from lightning_lcnn.kernels.modes import (
    is_compiling_for_training,
    is_recomputing,
    needs_composite,
    on_plain_cpu,
    stored,
    wanted_gradients,
)
from lightning_lcnn.kernels.recomputation import remember

_MIN_ROW = 16  # values of a channel of one image from which on sums over rows take less time than torch's kernel
_MIN_VALUES = 2**14
# Where mean² / variance is at most this, the raw moments give the variance to 1e-6; torch's kernel takes the rest.
_MAX_OFFSET = 16.0
_MAX_VARIANCE = 1e30  # squares near the end of float32 are left to torch's kernel as well


def batch_norm_slope(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    r"""Spectral norm of a batch normalisation with given variances.

    .. math:: \mathrm{SN} = \max_c \frac{|w_c|}{\sqrt{v_c + ε}}

    The map multiplies each channel by :math:`w_c / \sqrt{v_c + ε}` and shifts it, so this is its exact Lipschitz
    constant, for inputs of any spatial size.

    Args:
        weight: Affine weight w of shape (C,), or None for a weight of one.
        variance: Variance v of each channel, shape (C,).
        eps: The ε that is added to the variance.

    Returns:
        0-d tensor, differentiable in both tensors.

    Source:
        LCNN (Srinivas et al., 2022).

    Example:
        >>> batch_norm_slope(torch.tensor([1.0, -3.0]), torch.tensor([4.0, 1.0]), eps=0.0)
        tensor(3.)
    """
    return _steepest(weight, torch.rsqrt(variance + eps))


def _steepest(weight: Tensor | None, gain: Tensor) -> Tensor:
    return (gain if weight is None else gain * weight.abs()).max()


def clip_factor(slope: Tensor, gamma: Tensor) -> Tensor:
    r"""Factor that brings a slope down to at most γ and leaves smaller slopes alone.

    .. math:: f = \min(1, γ / \mathrm{SN})

    At SN = γ the derivative is that of the clipped side, so that a γ which starts at the slope of its layer can fall.
    A slope of zero gives 1, with zero gradient.

    Args:
        slope: Non-negative 0-d tensor SN.
        gamma: Positive 0-d tensor γ.

    Returns:
        0-d tensor in (0, 1].

    Source:
        LCNN (Srinivas et al., 2022).

    Example:
        >>> clip_factor(torch.tensor(4.0), torch.tensor(2.0))
        tensor(0.5000)
    """
    clipped = slope >= gamma
    return torch.where(clipped, gamma / torch.where(clipped, slope, 1.0), 1.0)


def channel_variance(x: Tensor) -> Tensor:
    """Biased variance of each channel of a batch (N, C, ...) in at least float32, without a graph.

    Two reductions of the raw moments: a sixth of the time of ``Tensor.var`` on the CPU, at a relative error in float32
    of up to 1e-6 (1 + mean²/variance).

    Example:
        >>> channel_variance(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([1., 0.])
    """
    x = x.detach()
    dims = [d for d in range(x.ndim) if d != 1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.numel() / x.shape[1]
    mean = x.mean(dim=dims, dtype=dtype)
    square = torch.linalg.vector_norm(x, dim=dims, dtype=dtype).square() / count
    return (square - mean.square()).clamp(min=0.0)


def scaled_affine(
    weight: Tensor | None, bias: Tensor | None, factor: Tensor, running_mean: Tensor | None, num_features: int
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a batch norm times a 0-d factor; a missing weight counts as ones of the statistics' type.

    Example:
        >>> scaled_affine(None, None, torch.tensor(0.5), None, 2)
        (tensor([0.5000, 0.5000]), None)
    """
    if weight is None:
        # contiguous: the CPU's channels_last backward misreads an expanded weight (stride 0) and returns gradients of
        # 1e37, without a word. So still in torch 2.14; tests/layers/test_batch_norm.py trains such a layer.
        common = factor if running_mean is None else factor.to(running_mean.dtype)
        return common.expand(num_features).contiguous(), None
    return (weight * factor).to(weight.dtype), None if bias is None else (bias * factor).to(bias.dtype)


def fits_one_pass(x: Tensor, weight: Tensor | None) -> bool:
    """Whether :func:`clipped_batch_norm` takes the batch: compiled, or eager on the CPU, not one value per channel."""
    tensors = (x,) if weight is None else (x, weight)
    fits = is_compiling_for_training() or (not needs_composite() and on_plain_cpu(*tensors))
    return fits and x.numel() > x.shape[1]


def clipped_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    r"""Batch normalisation in training whose slope is limited to γ, by statistics that are computed once.

    .. math:: y = \mathrm{BN}(x) \cdot \min(1, γ / \mathrm{SN})

    The gradient takes the variance inside SN as a constant. Nothing more than in ``F.batch_norm`` is saved. Large
    contiguous batches of images take a sixth of its time forward: :func:`_moments_by_rows`, then one pass that clips,
    too.

    Args:
        x: Batch (N, C, ...) for which :func:`fits_one_pass` holds.
        weight: Affine weight (C,), or None.
        bias: Affine bias (C,), or None.
        running_mean: Updated in place, (C,), or None.
        running_var: Updated in place, (C,), or None.
        gamma: Positive 0-d tensor γ.
        momentum: Weight of this batch in the running statistics.
        eps: The ε that is added to the variance.

    Returns:
        Tensor of the shape of x.

    Source:
        LCNN (Srinivas et al., 2022), with the statistics of the batch; one pass is ours.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> clipped_batch_norm(x, None, None, None, None, torch.tensor(0.5), momentum=0.1, eps=0.0)
        tensor([[-0.5000],
                [ 0.5000]])
    """
    if not is_compiling_for_training():
        return _ClippedBatchNorm.apply(x, weight, bias, gamma, running_mean, running_var, momentum, eps)
    with torch.no_grad():
        mean, variance = _moments_by_two_passes(x)
        gain = torch.rsqrt(variance + eps)
        _update_running(running_mean, running_var, mean, variance, momentum, x.numel() // x.shape[1])
    weight, bias = _clipped_affine(weight, bias, gain, gamma)
    return _TracedNormalized.apply(x, weight, bias, mean, gain, eps)


def _clipped_affine(
    weight: Tensor | None, bias: Tensor | None, gain: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias times the clip factor, differentiable."""
    factor = clip_factor(_steepest(weight, gain), gamma)
    return scaled_affine(weight, bias, factor, gain, gain.numel())


def _moments_by_rows(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance of each channel (C,) in a sixth of the time that torch's kernel takes for them.

    Sums of x and x² over each channel of each image, and over these in float64. None for layouts and sizes that have no
    long rows, and where a channel is so far from zero that too few digits of x² are left for its variance.
    """
    count, channels = x.numel() // x.shape[1], x.shape[1]
    if not x.is_contiguous() or count < _MIN_ROW * x.shape[0] or x.numel() < _MIN_VALUES:
        return None
    rows = x.view(x.shape[0] * channels, -1)
    sums = torch.stack((rows.sum(1), torch.linalg.vector_norm(rows, dim=1))).view(2, -1, channels).double()
    sums[1].square_()
    mean, square = sums.sum(1).div_(count).unbind()
    variance = torch.addcmul(square, mean, mean, value=-1)
    offset = torch.sub(square, variance, alpha=1.0 + _MAX_OFFSET).max()
    if not (offset.item() <= 0.0 and variance.max().item() < _MAX_VARIANCE):  # or not finite
        return None
    return mean.to(x.dtype), variance.to(x.dtype)


def _moments_by_two_passes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for the compiler, whose own batch norm takes one pass of many divisions and more time."""
    dims = [d for d in range(x.ndim) if d != 1]
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = values.mean(dims)
    centre = stored(mean).view(-1, *[1] * (x.ndim - 2))
    return mean, (values - centre).square().mean(dims)


def _update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    count: int,
) -> None:
    """As torch's kernel does, with the unbiased variance."""
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)


# One node, because composed operations would compute the statistics twice, once for the clip and once in F.batch_norm,
# which takes 1.3 ns a value forward on the CPU where this takes 0.2: 19 ms of a training step of ResNet-18. Its double
# backward is by hand for a penalty on input gradients (batch_norm_gradient.py). May go when torch's kernel is as fast.
class _ClippedBatchNorm(torch.autograd.Function):
    """All of it in one node, whose few numbers besides the values are read once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gamma: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        moments = _moments_by_rows(x)
        if moments is None:
            value, mean, gain = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        else:
            mean, variance = moments
            gain = torch.rsqrt(variance + eps)
            _update_running(running_mean, running_var, mean, variance, momentum, x.numel() // x.shape[1])
        slope, limit = _steepest(weight, gain).item(), gamma.item()
        ctx.clipped = slope >= limit
        ctx.factor, ctx.slope, ctx.eps = limit / slope if ctx.clipped else 1.0, slope, eps
        factor = ctx.factor
        if moments is None:
            if factor < 1.0:
                value.mul_(factor)
            shift = None if bias is None else bias.clone()  # autograd notices when weight changes until backward

            def again(x: Tensor) -> Tensor:
                return torch.native_batch_norm(x, weight, shift, None, None, True, 0.0, eps)[0].mul_(factor)
        else:
            affine = _times(weight, factor, mean), None if bias is None else bias * factor

            def again(x: Tensor) -> Tensor:
                return torch.native_batch_norm(x, *affine, mean, variance, False, 0.0, eps)[0]

            value = again(x)
        if is_recomputing():
            remember(value, x, again)
        ctx.save_for_backward(x, weight, bias, gamma, mean, gain)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, gamma, mean, gain = ctx.saved_tensors  # read once: activation checkpointing unpacks them once
        wanted = wanted_gradients(ctx)[:4]
        if torch.is_grad_enabled():  # somebody differentiates this backward again
            return (*differentiable_gradients(grad, x, weight, bias, gamma, mean, gain, ctx.eps, wanted), *[None] * 4)
        of_x, of_weight, of_bias, of_gamma = wanted
        of_factor = ctx.clipped and (of_weight or of_gamma)
        asked = of_x, of_weight or of_factor, of_bias or (of_factor and bias is not None)
        grad_x, grad_weight, grad_bias = _gradients(
            grad, x, _times(weight, ctx.factor, mean), mean, gain, ctx.eps, asked
        )
        grad_gamma = torch.zeros_like(gamma)
        grad_slopes: Tensor | float = 0.0
        if of_factor:  # which is γ / max_c slope_c, for weight and bias alike
            total = grad_weight.sum() if weight is None else torch.dot(grad_weight, weight)
            grad_gamma = (total if bias is None else total + torch.dot(grad_bias, bias)) / ctx.slope
            if of_weight:
                slopes = gain * weight.abs()
                steepest = (slopes == slopes.max()).to(gain.dtype)
                grad_slopes = steepest * gain * weight.sign() * (-ctx.factor * grad_gamma / steepest.sum())
        return (
            grad_x,
            grad_weight * ctx.factor + grad_slopes if of_weight else None,
            grad_bias * ctx.factor if of_bias else None,
            grad_gamma.to(gamma.dtype) if of_gamma else None,
            *[None] * 4,
        )


def _times(weight: Tensor | None, factor: float, like: Tensor) -> Tensor:
    if weight is None:
        return torch.full_like(like, factor)
    return weight if factor == 1.0 else weight * factor


def differentiable_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    mean: Tensor,
    gain: Tensor,
    eps: float,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias and γ by operations that are differentiable again."""
    scaled = _clipped_affine(weight, bias, gain, gamma)
    if wanted == (True, False, False, False):
        return input_gradient_of_batch_norm(grad, x, scaled[0], mean, gain), None, None, None
    grad_x, *of_scaled = _gradients(grad, x, scaled[0], mean, gain, eps, (wanted[0], True, bias is not None))
    inputs = [t for t, w in zip((weight, bias, gamma), wanted[1:], strict=True) if w and t is not None]
    outputs = [t for t in scaled if t is not None]
    found = iter(torch.autograd.grad(outputs, inputs, of_scaled[: len(outputs)], create_graph=True) if inputs else ())
    return grad_x, *(next(found) if w else None for w in wanted[1:])


class _TracedNormalized(torch.autograd.Function):
    """The same for the compiler, from the statistics and by one multiplication and addition a value."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, gain: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, gain)
        ctx.eps = eps
        scale = gain * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = [stored(v).view(-1, *[1] * (x.ndim - 2)) for v in (scale, shift)]
        return (x * scale + shift).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, gain = ctx.saved_tensors
        return (*_gradients(grad, x, weight, mean, gain, ctx.eps, ctx.needs_input_grad[:3]), None, None, None)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, gain: Tensor, eps: float, wanted: tuple[bool, ...]
) -> tuple[Any, ...]:
    gradients = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, gain, True, eps, list(wanted)
    )
    return tuple(g if w else None for g, w in zip(gradients, wanted, strict=True))
