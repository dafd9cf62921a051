"""Triton kernels of a training step's layers; :mod:`~lightning_lcnn.kernels.layer_operators` says what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lcnn.kernels.operators import LARGEST_WHOLE

try:
    import triton
    import triton.language as tl
except ImportError as error:  # pragma: no cover
    raise ImportError("these kernels need Triton, which torch's packages for CUDA bring along.") from error

_BLOCK = 1024
_TURNS = 4  # blocks of one program of the activation's backward
_PROGRAMS = 512  # that read a tensor for its sums; a few for each multiprocessor
_MOST_SUMS = 2048  # splits times channels, which every program that normalises reads
_MOST_PARTS = 64  # of a weight


# --------------------------------------------------------------------------- the centered softplus


@triton.jit
def _log1p(u):
    """For u in [0, 1]: Triton's own logarithm has no relative accuracy near 1."""
    if u.dtype == tl.float64:
        w = 1.0 + u
        return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    p = -0.0724618183 * u + 0.168099731
    p = p * u - 0.24452839
    p = p * u + 0.332893025
    p = p * u - 0.499986835
    return u * (p * u + 0.999999936)


@triton.jit
def _softplus(x, beta):
    """s(x; β) with a small error relative to its size; the polynomials are those of ``softplus_formulas``."""
    z = x * beta
    u = tl.exp(-tl.abs(z))
    log2 = 0.6931471805599453
    if x.dtype == tl.float64:
        t = -tl.abs(z)
        plain = (u == 1.0) | (t < -40.0)
        less = tl.where(t < -40.0, u - 1.0, t)
        less = 0.5 * tl.where(plain, less, (u - 1.0) * t / tl.log(tl.where(plain, 0.5, u)))  # (exp(t) - 1) / 2
        w = 1.0 + less
        near = tl.where(w == 1.0, less, tl.log(w) * (less / tl.where(w == 1.0, 1.0, w - 1.0)))
        return tl.maximum(x, 0.0) + near / beta
    square = z * z
    p = -2.25472933e-05 * square + 0.000344942774
    p = p * square - 0.00520788852
    p = p * square + 0.124999986
    near = x * (z * p + 0.5)
    far = tl.maximum(x, 0.0) + (_log1p(u) - log2) / beta
    return tl.where(square < 1.0, near, far)


@triton.jit
def _of_beta(v, sigma, h):
    """β² ∂s/∂β with v = βs, σ the slope and h = 1 - σ."""
    far = sigma * tl.log(2.0 * tl.maximum(sigma, 1e-30)) - h * v
    if v.dtype == tl.float64:
        return far
    p = 0.261636599 * v - 0.29484771
    p = p * v + 0.374978094
    p = p * v - 0.499992015
    p = p * v + 0.500000017
    return tl.where(tl.abs(v) < 0.1, v * v * p, far)


@triton.jit
def softplus_kernel(x, log_beta, result, size, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    beta = tl.exp(tl.load(log_beta).to(WIDE))
    value = _softplus(tl.load(x + k, mask=inside, other=0.0).to(WIDE), beta)
    tl.store(result + k, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def softplus_gradient_kernel(
    grad, kept, log_beta, grad_x, parts, size,
    OUTPUT: tl.constexpr, OF_BETA: tl.constexpr, WIDE: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of x and, a part of the sum for each program, of log β; ``kept`` is the input or the output."""
    beta = tl.exp(tl.load(log_beta).to(WIDE))
    total = tl.zeros([BLOCK], WIDE)
    for turn in range(TURNS):
        k = (tl.program_id(0).to(tl.int64) * TURNS + turn) * BLOCK + tl.arange(0, BLOCK)
        inside = k < size
        g = tl.load(grad + k, mask=inside, other=0.0).to(WIDE)
        value = tl.load(kept + k, mask=inside, other=0.0).to(WIDE)
        if OUTPUT:
            v = value * beta
            h = 0.5 * tl.exp(-v)
            sigma = tl.maximum(1.0 - h, 0.0)
        else:
            z = value * beta
            u = tl.exp(-tl.abs(z))
            larger = 1.0 / (1.0 + u)
            sigma = tl.where(z > 0, larger, u * larger)
            h = tl.where(z > 0, u * larger, larger)
            v = _softplus(value, beta) * beta
        tl.store(grad_x + k, (g * sigma).to(grad_x.dtype.element_ty), mask=inside)
        if OF_BETA:
            total += tl.where(inside, g * _of_beta(v, sigma, h), 0.0)
    if OF_BETA:
        tl.store(parts + tl.program_id(0), tl.sum(total, 0) / beta)


def softplus(x: Tensor, log_beta: Tensor, result: Tensor) -> None:
    """Write s(x; β) to ``result``, which may be x, of the same dense layout."""
    size = x.numel()
    softplus_kernel[(triton.cdiv(size, _BLOCK),)](x, log_beta, result, size, _wide(x), _BLOCK)


def softplus_gradient(
    grad: Tensor, kept: Tensor, log_beta: Tensor, from_output: bool, of_beta: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and the parts of the gradient of log β."""
    size = kept.numel()
    programs = triton.cdiv(size, _BLOCK * _TURNS)
    grad_x = torch.empty_like(kept)
    parts = torch.empty(
        programs if of_beta else 0, device=kept.device, dtype=torch.promote_types(kept.dtype, torch.float32)
    )
    softplus_gradient_kernel[(programs,)](
        grad,
        kept,
        log_beta,
        grad_x,
        parts if of_beta else grad_x,
        size,
        from_output,
        of_beta,
        _wide(kept),
        _TURNS,
        _BLOCK,
    )
    return grad_x, parts


# --------------------------------------------------------------------------- batch norm with a clipped slope


@triton.jit
def _place(channel, m, channels, inner, LAST: tl.constexpr):
    """Offset of the value of a channel at position m = n · inner + s of all images."""
    if LAST:
        return m.to(tl.int64) * channels + channel
    return (m // inner).to(tl.int64) * (channels * inner) + channel * inner + m % inner


@triton.jit
def moments_kernel(
    x, parts, channels, inner, count, chunk, splits,
    LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sums of x - x₀ and of its squares over a part of each channel, x₀ being the channel's first value."""
    c = (tl.program_id(0) * BC + tl.arange(0, BC))[:, None]
    split = tl.program_id(1)
    inside_c = c < channels
    first = tl.load(x + _place(c, c * 0, channels, inner, LAST), mask=inside_c, other=0.0).to(WIDE)
    total, square = tl.zeros([BC, BM], WIDE), tl.zeros([BC, BM], WIDE)
    for start in range(0, chunk, BM):
        m = (split * chunk + start + tl.arange(0, BM))[None, :]
        inside = inside_c & (m < count) & (start + tl.arange(0, BM)[None, :] < chunk)
        value = tl.load(x + _place(c, m, channels, inner, LAST), mask=inside, other=0.0).to(WIDE)
        value = tl.where(inside, value - first, 0.0)
        total += value
        square += value * value
    where = parts + split * channels + c
    tl.store(where, tl.sum(total, 1)[:, None], mask=inside_c)
    tl.store(where + splits * channels, tl.sum(square, 1)[:, None], mask=inside_c)


@triton.jit
def _summed(parts, c, inside, channels, splits, SP: tl.constexpr):
    """Both sums of channels c, a column of any length."""
    s = tl.arange(0, SP)[None, :]
    where = parts + s * channels + c
    mask = inside & (s < splits)
    one = tl.sum(tl.load(where, mask=mask, other=0.0), 1)[:, None]
    return one, tl.sum(tl.load(where + splits * channels, mask=mask, other=0.0), 1)[:, None]


@triton.jit
def _statistics(x, parts, c, inside, channels, inner, count, splits, eps, LAST: tl.constexpr, SP: tl.constexpr):
    total, square = _summed(parts, c, inside, channels, splits, SP)
    first = tl.load(x + _place(c, c * 0, channels, inner, LAST), mask=inside, other=0.0).to(total.dtype)
    shift = total / count
    variance = tl.maximum(square / count - shift * shift, 0.0)
    return first + shift, variance, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def normalize_kernel(
    x, weight, bias, log_gamma, parts, result, mean, gain, factor, running_mean, running_var, batches,
    channels, inner, count, splits, momentum, eps, rows, columns,
    LAST: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, CLIP: tl.constexpr, TRACK: tl.constexpr,
    COUNT: tl.constexpr, WIDE: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Every program sums up the moments of all channels, for the largest slope; the first writes what is kept."""
    c = tl.arange(0, CP)[:, None]
    inside = c < channels
    own_mean, variance, own_gain = _statistics(x, parts, c, inside, channels, inner, count, splits, eps, LAST, SP)
    f = tl.full((), 1.0, WIDE)
    if CLIP:
        slopes = own_gain
        if AFFINE:
            slopes = slopes * tl.abs(tl.load(weight + c, mask=inside, other=0.0).to(WIDE))
        slope = tl.max(tl.max(tl.where(inside, slopes, 0.0), 1), 0)
        gamma = tl.exp(tl.load(log_gamma).to(WIDE))
        f = tl.where(slope >= gamma, gamma / tl.where(slope >= gamma, slope, 1.0), 1.0)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(mean + c, own_mean, mask=inside)
        tl.store(gain + c, own_gain, mask=inside)
        tl.store(factor, f)
        if TRACK:
            old = tl.load(running_mean + c, mask=inside, other=0.0).to(WIDE)
            tl.store(
                running_mean + c, (old + momentum * (own_mean - old)).to(running_mean.dtype.element_ty), mask=inside
            )
            old = tl.load(running_var + c, mask=inside, other=0.0).to(WIDE)
            unbiased = variance * (count / (count - 1))
            tl.store(running_var + c, (old + momentum * (unbiased - old)).to(running_var.dtype.element_ty), mask=inside)
        if COUNT:
            tl.store(batches, tl.load(batches) + 1)
    r = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
    s = (tl.program_id(1) * BS + tl.arange(0, BS))[None, :]
    inside_r = r < rows
    c = r % channels
    own_mean, variance, own_gain = _statistics(x, parts, c, inside_r, channels, inner, count, splits, eps, LAST, SP)
    scale = own_gain * f
    if AFFINE:
        scale = scale * tl.load(weight + c, mask=inside_r, other=0.0).to(WIDE)
    shift = -own_mean * scale
    if BIAS:
        shift += f * tl.load(bias + c, mask=inside_r, other=0.0).to(WIDE)
    where = s.to(tl.int64) * channels + r if LAST else r.to(tl.int64) * columns + s
    mask = inside_r & (s < columns)
    value = tl.load(x + where, mask=mask, other=0.0).to(WIDE) * scale + shift
    tl.store(result + where, value.to(result.dtype.element_ty), mask=mask)


@triton.jit
def gradient_sums_kernel(
    grad, x, mean, gain, parts, channels, inner, count, chunk, splits,
    LAST: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of its product with the normalised values, over a part of each channel."""
    c = (tl.program_id(0) * BC + tl.arange(0, BC))[:, None]
    split = tl.program_id(1)
    inside_c = c < channels
    centre = tl.load(mean + c, mask=inside_c, other=0.0).to(WIDE)
    total, product = tl.zeros([BC, BM], WIDE), tl.zeros([BC, BM], WIDE)
    for start in range(0, chunk, BM):
        m = (split * chunk + start + tl.arange(0, BM))[None, :]
        inside = inside_c & (m < count) & (start + tl.arange(0, BM)[None, :] < chunk)
        where = _place(c, m, channels, inner, LAST)
        g = tl.load(grad + where, mask=inside, other=0.0).to(WIDE)
        total += g
        product += tl.where(inside, g * (tl.load(x + where, mask=inside, other=0.0).to(WIDE) - centre), 0.0)
    where = parts + split * channels + c
    own = tl.load(gain + c, mask=inside_c, other=0.0)
    tl.store(where, tl.sum(total, 1)[:, None], mask=inside_c)
    tl.store(where + splits * channels, tl.sum(product, 1)[:, None] * own, mask=inside_c)


@triton.jit
def normalize_gradient_kernel(
    grad, x, weight, bias, log_gamma, mean, gain, factor, parts, grad_x, grad_weight, grad_bias, grad_gamma,
    channels, inner, count, splits, rows, columns,
    LAST: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, CLIP: tl.constexpr, OF_X: tl.constexpr,
    WIDE: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    f = tl.load(factor)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):  # what belongs to parameters
        c = tl.arange(0, CP)[:, None]
        inside = c < channels
        total, product = _summed(parts, c, inside, channels, splits, SP)
        w = tl.full([CP, 1], 1.0, WIDE)
        if AFFINE:
            w = tl.load(weight + c, mask=inside, other=0.0).to(WIDE)
        of_weight = f * product
        if CLIP:
            of_factor = tl.where(inside, product * w, 0.0)
            if BIAS:
                of_factor += tl.where(inside, total * tl.load(bias + c, mask=inside, other=0.0).to(WIDE), 0.0)
            of_factor = tl.sum(tl.sum(of_factor, 1), 0)
            own = tl.load(gain + c, mask=inside, other=0.0)
            slopes = tl.where(inside, own * tl.abs(w), 0.0)
            slope = tl.max(tl.max(slopes, 1), 0)
            gamma = tl.exp(tl.load(log_gamma).to(WIDE))
            clipped = tl.where(slope >= gamma, f * of_factor, 0.0)  # by log γ, and by minus log of the slope
            tl.store(grad_gamma, clipped.to(grad_gamma.dtype.element_ty))
            steepest = tl.where(inside & (slopes == slope), 1.0, 0.0)
            times = tl.sum(tl.sum(steepest, 1), 0)
            sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
            of_weight -= steepest * own * sign * (clipped / (tl.where(slope > 0, slope, 1.0) * times))
        if AFFINE:
            tl.store(grad_weight + c, of_weight.to(grad_weight.dtype.element_ty), mask=inside)
        if BIAS:
            tl.store(grad_bias + c, (f * total).to(grad_bias.dtype.element_ty), mask=inside)
    if OF_X:
        r = (tl.program_id(0) * BR + tl.arange(0, BR))[:, None]
        s = (tl.program_id(1) * BS + tl.arange(0, BS))[None, :]
        inside_r = r < rows
        c = r % channels
        total, product = _summed(parts, c, inside_r, channels, splits, SP)
        own = tl.load(gain + c, mask=inside_r, other=0.0)
        scale = own * f
        if AFFINE:
            scale = scale * tl.load(weight + c, mask=inside_r, other=0.0).to(WIDE)
        where = s.to(tl.int64) * channels + r if LAST else r.to(tl.int64) * columns + s
        mask = inside_r & (s < columns)
        g = tl.load(grad + where, mask=mask, other=0.0).to(WIDE)
        centred = tl.load(x + where, mask=mask, other=0.0).to(WIDE) - tl.load(mean + c, mask=inside_r, other=0.0)
        value = scale * (g - total / count - centred * own * (product / count))
        tl.store(grad_x + where, value.to(grad_x.dtype.element_ty), mask=mask)


class _Shape:
    """How a batch (N, C, ...) is cut: into parts of each channel for sums, into tiles for what is elementwise."""

    def __init__(self, x: Tensor) -> None:
        self.last = x.ndim == 2 or not x.is_contiguous()
        self.channels, self.count = x.shape[1], x.numel() // x.shape[1]
        self.inner = self.count // x.shape[0]
        self.block = (32, 32) if self.last else (1, 1024)
        groups = triton.cdiv(self.channels, self.block[0])
        most = max(min(_PROGRAMS // groups, _MOST_SUMS // self.channels), 1)
        self.splits = min(most, triton.cdiv(self.count, self.block[1]))
        self.chunk = triton.cdiv(triton.cdiv(self.count, self.splits), self.block[1]) * self.block[1]
        self.splits = triton.cdiv(self.count, self.chunk)
        self.grid = (groups, self.splits)
        self.rows, self.columns = (self.channels, self.count) if self.last else (x.shape[0] * self.channels, self.inner)
        inner = 64 if self.last else min(triton.next_power_of_2(self.columns), 1024)
        outer = min(triton.next_power_of_2(self.rows), 64 if self.last else max(4096 // inner, 1))
        self.tile = outer, inner
        self.tiles = (triton.cdiv(self.rows, outer), triton.cdiv(self.columns, inner))
        self.padded = triton.next_power_of_2(self.splits), triton.next_power_of_2(self.channels)


def normalize(
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
    """Clipped batch norm of a dense batch; value, mean, gain and clip factor."""
    shape, wide = _Shape(x), _wide(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = torch.empty(2, shape.splits, shape.channels, device=x.device, dtype=dtype)
    mean, gain = parts.new_empty(shape.channels), parts.new_empty(shape.channels)
    factor, value = parts.new_empty(()), torch.empty_like(x)
    sizes = shape.channels, shape.inner, shape.count
    moments_kernel[shape.grid](x, parts, *sizes, shape.chunk, shape.splits, shape.last, wide, *shape.block)
    normalize_kernel[shape.tiles](
        x, _or(weight, x), _or(bias, x), _or(log_gamma, x), parts, value, mean, gain, factor,
        _or(running_mean, x), _or(running_var, x), _or(batches, x), *sizes, shape.splits, momentum, eps,
        shape.rows, shape.columns, shape.last, weight is not None, bias is not None, log_gamma is not None,
        running_mean is not None, batches is not None, wide, *shape.padded, *shape.tile, num_warps=8,
    )  # fmt: skip
    return value, mean, gain, factor


def normalize_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    log_gamma: Tensor | None,
    mean: Tensor,
    gain: Tensor,
    factor: Tensor,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and log γ, empty where there is none."""
    shape, wide = _Shape(x), _wide(x)
    parts = mean.new_empty(2, shape.splits, shape.channels)
    sizes = shape.channels, shape.inner, shape.count
    gradient_sums_kernel[shape.grid](
        grad, x, mean, gain, parts, *sizes, shape.chunk, shape.splits, shape.last, wide, *shape.block
    )
    results = [
        x.new_empty(0) if t is None else torch.empty_like(t) for t in (x if of_x else None, weight, bias, log_gamma)
    ]
    normalize_gradient_kernel[shape.tiles if of_x else (1, 1)](
        grad, x, _or(weight, x), _or(bias, x), _or(log_gamma, x), mean, gain, factor, parts, *results,
        *sizes, shape.splits, shape.rows, shape.columns, shape.last,
        weight is not None, bias is not None, log_gamma is not None, of_x, wide, *shape.padded, *shape.tile,
        num_warps=8,
    )  # fmt: skip
    return results[0], results[1], results[2], results[3]


# --------------------------------------------------------------------------- a weight divided by its norm


@triton.jit
def _product(a, b, first, last, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a·b from the first position to before the last, by lanes in WIDE and over these in float64."""
    total = tl.zeros([BLOCK], WIDE)
    for start in range(first, last, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(a + k, mask=k < last, other=0.0).to(WIDE)
        total += value * tl.load(b + k, mask=k < last, other=0.0).to(WIDE)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def inner_product_kernel(a, b, parts, size, chunk, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A part of the sum of a·b for each program."""
    first = tl.program_id(0) * chunk
    tl.store(parts + tl.program_id(0), _product(a, b, first, tl.minimum(first + chunk, size), WIDE, BLOCK))


@triton.jit
def _inner(a, b, parts, size, count, WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """⟨a, b⟩ from its parts, or, where there are none, by every program for itself."""
    if PARTS == 0:
        return _product(a, b, 0, size, WIDE, BLOCK).to(WIDE)
    p = tl.arange(0, PARTS)
    return tl.sum(tl.load(parts + p, mask=p < count, other=0.0), 0).to(WIDE)


@triton.jit
def scale_weight_kernel(
    weight, gradient, log_gamma, parts, result, factors, size, count,
    GAIN: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sigma = _inner(weight, gradient, parts, size, count, WIDE, PARTS, BLOCK)
    inverse = 1.0 / tl.where(sigma > 0, sigma, 1.0)
    scale = inverse
    if GAIN:
        scale = scale * tl.exp(tl.load(log_gamma).to(WIDE))
    if tl.program_id(0) == 0:
        tl.store(factors, scale)
        tl.store(factors + 1, tl.where(sigma > 0, inverse, 0.0))
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    value = tl.load(weight + k, mask=inside, other=0.0).to(WIDE) * scale
    tl.store(result + k, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def scale_weight_gradient_kernel(
    grad, weight, gradient, factors, parts, grad_weight, grad_gamma, size, count,
    GAIN: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """γ/σ · grad - G · ⟨grad, W⟩ γ/σ²."""
    product = _inner(grad, weight, parts, size, count, WIDE, PARTS, BLOCK)
    scale, inverse = tl.load(factors), tl.load(factors + 1)
    product *= scale
    if GAIN:
        tl.store(grad_gamma, product.to(grad_gamma.dtype.element_ty), mask=tl.program_id(0) == 0)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    value = tl.load(grad + k, mask=inside, other=0.0).to(WIDE) * scale
    value -= tl.load(gradient + k, mask=inside, other=0.0).to(WIDE) * (product * inverse)
    tl.store(grad_weight + k, value.to(grad_weight.dtype.element_ty), mask=inside)


def _inner_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Parts of ⟨a, b⟩, their number and its bound; no parts where a launch takes more time than to sum often."""
    size = a.numel()
    if size <= LARGEST_WHOLE:
        return a, 0, 0
    chunk = triton.cdiv(triton.cdiv(size, _MOST_PARTS), _BLOCK) * _BLOCK
    parts = torch.empty(triton.cdiv(size, chunk), device=a.device, dtype=torch.float64)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    inner_product_kernel[(len(parts),)](a, b, parts, size, chunk, wide, _BLOCK)
    return parts, len(parts), _MOST_PARTS


def scale_weight(
    weight: Tensor, gradient: Tensor, log_gamma: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W γ/σ in a type, and γ/σ with 1/σ, or 0 where σ is not positive; dense tensors of one layout."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    parts, count, most = _inner_product(weight, gradient, wide)
    result = torch.empty_like(weight, dtype=dtype)
    factors = torch.empty(2, device=weight.device, dtype=wide)
    size = weight.numel()
    scale_weight_kernel[(triton.cdiv(size, _BLOCK),)](
        weight, gradient, _or(log_gamma, weight), parts, result, factors, size, count,
        log_gamma is not None, _wide(weight), most, _BLOCK,
    )  # fmt: skip
    return result, factors


def scale_weight_gradient(
    grad: Tensor, weight: Tensor, gradient: Tensor, log_gamma: Tensor | None, factors: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and of log γ, the latter empty where there is none."""
    parts, count, most = _inner_product(grad, weight, factors.dtype)
    of_weight = torch.empty_like(weight)
    of_gamma = weight.new_empty(0) if log_gamma is None else torch.empty_like(log_gamma)
    size = weight.numel()
    scale_weight_gradient_kernel[(triton.cdiv(size, _BLOCK),)](
        grad, weight, gradient, factors, parts, of_weight, of_gamma, size, count,
        log_gamma is not None, _wide(factors), most, _BLOCK,
    )  # fmt: skip
    return of_weight, of_gamma


def _wide(x: Tensor) -> tl.dtype:
    """The type in which is computed."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor
