"""Triton kernels of :mod:`~lightning_lcnn.kernels.refresh_operators`; its references say what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:  # pragma: no cover
    raise ImportError("these kernels need Triton, which torch's packages for CUDA bring along.") from error

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _sum_of_squares(a, more, start, length, MORE: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], a.dtype.element_ty)
    for first in range(0, length, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(a + start + k, mask=k < length, other=0.0)
        if MORE:
            value += tl.load(more + start + k, mask=k < length, other=0.0)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def unit_kernel(
    vector, more, places, result, norms, TINY: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    own = tl.program_id(0)
    start, length = tl.load(places + 2 * own), tl.load(places + 2 * own + 1)
    norm = tl.sqrt(_sum_of_squares(vector, more, start, length, MORE, BLOCK))
    for first in range(0, length, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(vector + start + k, mask=k < length, other=0.0)
        if MORE:
            value += tl.load(more + start + k, mask=k < length, other=0.0)
        tl.store(result + start + k, value / tl.maximum(norm, TINY), mask=k < length)
    tl.store(norms + own, norm)


@triton.jit
def first_kernel(
    begin, product, image, places, image_places, result, half, TINY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    own = tl.program_id(0)
    start, length = tl.load(image_places + 2 * own), tl.load(image_places + 2 * own + 1)
    square = _sum_of_squares(image, image, start, length, False, BLOCK)
    h = tl.maximum(square * 9 / 20, TINY)
    tl.store(half + own, h)
    start, length = tl.load(places + 2 * own), tl.load(places + 2 * own + 1)
    for first in range(0, length, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(product + start + k, mask=k < length, other=0.0) / h
        tl.store(result + start + k, value - tl.load(begin + start + k, mask=k < length, other=0.0), mask=k < length)


@triton.jit
def following_kernel(
    before, vector, product, half, places, scaled, result, TINY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    own = tl.program_id(0)
    start, length = tl.load(places + 2 * own), tl.load(places + 2 * own + 1)
    scale = tl.maximum(tl.sqrt(_sum_of_squares(vector, vector, start, length, False, BLOCK)), TINY)
    h = tl.load(half + own)
    for first in range(0, length, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < length
        v = tl.load(vector + start + k, mask=inside, other=0.0)
        value = tl.load(product + start + k, mask=inside, other=0.0) / h - v
        value = (2 * value - tl.load(before + start + k, mask=inside, other=0.0)) / scale
        tl.store(scaled + start + k, v / scale, mask=inside)
        tl.store(result + start + k, value, mask=inside)


@triton.jit
def last_kernel(
    back, right, norms, places, result, residuals, TINY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    own = tl.program_id(0)
    start, length = tl.load(places + 2 * own), tl.load(places + 2 * own + 1)
    value = tl.sqrt(_sum_of_squares(back, back, start, length, False, BLOCK))
    norm, divisor = tl.load(norms + own), tl.maximum(value, TINY)
    total = tl.zeros([BLOCK], back.dtype.element_ty)
    for first in range(0, length, BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < length
        b = tl.load(back + start + k, mask=inside, other=0.0)
        r = tl.load(right + start + k, mask=inside, other=0.0)
        total += (b - norm * r) * (b - norm * r)
        tl.store(result + start + k, tl.where(value > 0, b / divisor, r), mask=inside)
    tl.store(residuals + own, tl.sqrt(tl.sum(total, 0)) / divisor)


def unit(vector: Tensor, more: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and norms."""
    result, norms = torch.empty_like(vector), vector.new_empty(len(places))
    other, given = (vector, False) if more is None else (more, True)
    unit_kernel[(len(places),)](
        vector, other, places, result, norms, _tiny(vector), given, _BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return result, norms


def first(start: Tensor, product: Tensor, image: Tensor, places: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """First vector of the recurrence, and the divisor of the following."""
    result, half = torch.empty_like(start), start.new_empty(len(places))
    first_kernel[(len(places),)](
        start, product, image, places, images, result, half, _tiny(start), _BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return result, half


def following(before: Tensor, vector: Tensor, product: Tensor, half: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The vector, and the one after it, on one scale."""
    scaled, result = torch.empty_like(vector), torch.empty_like(vector)
    following_kernel[(len(places),)](
        before, vector, product, half, places, scaled, result, _tiny(vector), _BLOCK, num_warps=_WARPS
    )
    return scaled, result


def last(back: Tensor, right: Tensor, norms: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Right vectors and residuals."""
    result, residuals = torch.empty_like(back), back.new_empty(len(places))
    last_kernel[(len(places),)](
        back, right, norms, places, result, residuals, _tiny(back), _BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return result, residuals


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
