"""Triton kernels of :mod:`~lightning_lcnn.kernels.log_rules`; its references say what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:  # pragma: no cover
    raise ImportError("these kernels need Triton, which torch's packages for CUDA bring along.") from error

_PARAMETER, _BATCH_NORM = 0, 1
_BLOCK = 1024


@triton.jit
def _largest(vector, start, length, other, eps, kind, BLOCK: tl.constexpr):
    """Maximum over a leaf's tensor, of kind 1 over magnitudes by deviations, and how often it occurs."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full((), -float("inf"), vector.dtype.element_ty)
    times = tl.full((), 0.0, vector.dtype.element_ty)
    unknown = times  # the maximum ignores NaN
    for first in range(0, length, BLOCK):
        inside = first + lanes < length
        value = _value(vector, start, other, eps, kind, first + lanes, inside)
        top = tl.max(value, 0)
        count = tl.sum(tl.where(inside & (value == top), 1.0, 0.0).to(value.dtype), 0)
        times = tl.where(top > best, count, tl.where(top == best, times + count, times))
        best = tl.maximum(best, top)
        unknown += tl.sum(tl.where(value != value, value, 0.0), 0)
    return best + unknown, times


@triton.jit
def _value(vector, start, other, eps, kind, place, inside):
    if kind == 1:
        gain = 1.0 / tl.sqrt(tl.load(vector + other + place, mask=inside, other=1.0) + eps)
        weight = tl.load(vector + start + place, mask=inside & (start >= 0), other=1.0)
        value = tl.abs(weight) * gain
    else:
        value = tl.load(vector + start + place, mask=inside, other=0.0)
    return tl.where(inside, value, -float("inf"))


@triton.jit
def _total(vector, start, length, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.full((), 0.0, vector.dtype.element_ty)
    for first in range(0, length, BLOCK):
        total += tl.sum(tl.load(vector + start + first + lanes, mask=first + lanes < length, other=0.0), 0)
    return total


@triton.jit
def leaves_kernel(vector, integers, constants, result, TINY: tl.constexpr, BLOCK: tl.constexpr):
    leaf = tl.program_id(0)
    row = integers + leaf * 8
    kind, length, rows, columns = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    a, b, c = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    constant = tl.load(constants + leaf)
    if kind == 2:
        of_rows, _ = _largest(vector, a, rows, -1, constant, 0, BLOCK)
        of_columns, _ = _largest(vector, a + rows, columns, -1, constant, 0, BLOCK)
        square = _total(vector, a + rows + columns, length - rows - columns, BLOCK)
        product = tl.sqrt(tl.maximum(of_rows * of_columns, 1e-37))
        value = tl.log(tl.maximum(tl.minimum(product, constant * tl.sqrt(square)), TINY))
    elif kind == 1:
        best, _ = _largest(vector, a, length, b, constant, 1, BLOCK)
        value = tl.log(tl.maximum(best, TINY))
        limit = tl.load(vector + c, mask=c >= 0, other=float("inf"))
        value = tl.minimum(value, limit)
    else:
        best, _ = _largest(vector, a, length, b, constant, 0, BLOCK)
        value = best + constant
    tl.store(result + leaf, value)


@triton.jit
def _spread(vector, result, start, length, other, eps, kind, best, share, BLOCK: tl.constexpr):
    """Write the share of every value of a tensor that attains the maximum, and zero elsewhere."""
    lanes = tl.arange(0, BLOCK)
    for first in range(0, length, BLOCK):
        inside = first + lanes < length
        value = _value(vector, start, other, eps, kind, first + lanes, inside)
        grad = tl.where(value == best, share, 0.0)
        value = tl.where(inside, value, 0.0)
        if kind == 1:
            variance = tl.load(vector + other + first + lanes, mask=inside, other=1.0) + eps
            weight = tl.load(vector + start + first + lanes, mask=inside & (start >= 0), other=1.0)
            sign = tl.where(weight > 0, 1.0, tl.where(weight < 0, -1.0, 0.0))
            tl.store(result + other + first + lanes, grad * value * (-0.5) / variance, mask=inside)
            grad = grad * sign / tl.sqrt(variance)
            tl.store(result + start + first + lanes, grad, mask=inside & (start >= 0))
        else:
            tl.store(result + start + first + lanes, grad, mask=inside)


@triton.jit
def leaf_gradients_kernel(
    vector, integers, constants, gradients, of_slope, of_curvature, of_ratio, of_leaves, result, count,
    HAS_SLOPE: tl.constexpr, HAS_CURVATURE: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_LEAVES: tl.constexpr,
    TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    leaf = tl.program_id(0)
    slope, curvature = tl.load(gradients + leaf), tl.load(gradients + count + leaf)
    grad = slope * 0.0
    if HAS_SLOPE:
        grad += tl.load(of_slope) * slope
    if HAS_CURVATURE:
        grad += tl.load(of_curvature) * curvature
    if HAS_RATIO:
        grad += tl.load(of_ratio) * (curvature - slope)
    if HAS_LEAVES:
        grad += tl.load(of_leaves + leaf)
    row = integers + leaf * 8
    kind, length, rows, columns = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    a, b, c = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    constant = tl.load(constants + leaf)
    if kind == 2:
        of_rows, row_times = _largest(vector, a, rows, -1, constant, 0, BLOCK)
        of_columns, column_times = _largest(vector, a + rows, columns, -1, constant, 0, BLOCK)
        square = _total(vector, a + rows + columns, length - rows - columns, BLOCK)
        product, norm = of_rows * of_columns, constant * tl.sqrt(square)
        least = tl.sqrt(tl.maximum(product, 1e-37))
        by_product = tl.where(least < norm, 1.0, tl.where(least == norm, 0.5, 0.0))
        by_norm = tl.where(tl.minimum(least, norm) < TINY, 0.0, (1.0 - by_product) * grad)
        by_product = tl.where((product < 1e-37) | (least < TINY), 0.0, by_product * grad)
        of_row = by_product * 0.5 / tl.where(of_rows == 0, 1.0, of_rows) / row_times
        of_column = by_product * 0.5 / tl.where(of_columns == 0, 1.0, of_columns) / column_times
        _spread(vector, result, a, rows, -1, constant, 0, of_rows, of_row, BLOCK)
        _spread(vector, result, a + rows, columns, -1, constant, 0, of_columns, of_column, BLOCK)
        each = by_norm * 0.5 / tl.where(square == 0, 1.0, square)
        lanes = tl.arange(0, BLOCK)
        for first in range(0, length - rows - columns, BLOCK):
            place = a + rows + columns + first + lanes
            tl.store(result + place, each + tl.zeros([BLOCK], each.dtype), mask=first + lanes < length - rows - columns)
    elif kind == 1:
        best, times = _largest(vector, a, length, b, constant, 1, BLOCK)
        log = tl.log(tl.maximum(best, TINY))
        limit = tl.load(vector + c, mask=c >= 0, other=float("inf"))
        own = tl.where(log < limit, 1.0, tl.where(log == limit, 0.5, 0.0))
        tl.store(result + c, (1.0 - own) * grad, mask=c >= 0)
        share = tl.where(best < TINY, 0.0, own * grad / tl.maximum(best, TINY)) / times
        _spread(vector, result, a, length, b, constant, 1, best, share, BLOCK)
    else:
        best, times = _largest(vector, a, length, b, constant, 0, BLOCK)
        _spread(vector, result, a, length, -1, constant, 0, best, grad / times, BLOCK)


@triton.jit
def solve_kernel(
    leaves, index, results, of, at, targets, start, factors, offsets, scales, by,
    values, derivatives, adjoint, out_slope, out_curvature, out_ratio, out_gradients,
    num_leaves, num_values, slope, curvature, steps, backward,
    R: tl.constexpr, T: tl.constexpr, P: tl.constexpr, V: tl.constexpr, U: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a barrier after each step makes its values visible to all threads."""
    lanes = tl.arange(0, BLOCK)
    for first in range(0, num_values, BLOCK):
        k = first + lanes
        given = tl.load(leaves + k, mask=k < num_leaves, other=0.0)
        fixed = tl.load(start + k, mask=k < num_values, other=0.0)
        tl.store(values + k, tl.where(k < num_leaves, given, fixed), mask=k < num_values)
        tl.store(adjoint + k, tl.where(k == slope, 1.0, 0.0), mask=k < num_values)
        tl.store(adjoint + num_values + k, tl.where(k == curvature, 1.0, 0.0), mask=k < num_values)
    tl.debug_barrier()
    r, t, p = tl.arange(0, R), tl.arange(0, T), tl.arange(0, P)
    terms = r[:, None] * T + t[None, :]
    parts = terms[:, :, None] * P + p[None, None, :]
    for step in range(0, steps):
        factor = tl.load(factors + step * (R * T * P) + parts)
        value = tl.load(values + tl.load(index + step * (R * T * P) + parts))
        offset = tl.load(offsets + step * (R * T) + terms)
        present = offset > -float("inf")
        sums = tl.sum(tl.where(factor != 0, factor * value, 0.0), 2) + offset
        # max drops NaN; the sum of shares keeps it
        top = tl.max(tl.where(present, sums, -float("inf")), 1)
        endless = (top == float("inf")) | (top == -float("inf"))
        finite = tl.where(endless, 0.0, top)[:, None]
        share = tl.where(endless[:, None], tl.where(sums == top[:, None], 1.0, 0.0), tl.exp(sums - finite))
        share = tl.where(present, tl.where(sums != sums, sums, share), 0.0)
        total = tl.sum(share, 1)
        total = tl.where(total == 0, 1.0, total)
        scale = tl.load(scales + step * R + r)
        result = scale * (tl.where(scale == 0, 0.0, top) + tl.log(total))  # zero where a row is padding
        tl.store(derivatives + step * (R * T) + terms, scale[:, None] * share / total[:, None])
        tl.store(values + tl.load(results + step * R + r), result)
        tl.debug_barrier()
    v, u = tl.arange(0, V), tl.arange(0, U)
    uses = v[:, None] * U + u[None, :]
    for step in range(0, backward):
        factor = tl.load(by + step * (V * U) + uses)
        chain = factor * tl.load(derivatives + tl.load(of + step * (V * U) + uses))
        place = tl.load(at + step * (V * U) + uses)
        target = tl.load(targets + step * V + v)
        kept = factor != 0
        for root in tl.static_range(2):
            own = adjoint + root * num_values
            found = tl.sum(tl.where(kept, chain * tl.load(own + place), 0.0), 1) + tl.load(own + target)
            # padding writes to the spare value, which nobody reads
            tl.store(own + target, found, mask=target < num_values - 1)
        tl.debug_barrier()
    for first in range(0, num_leaves, BLOCK):
        k = first + lanes
        inside = k < num_leaves
        tl.store(out_gradients + k, tl.load(adjoint + k, mask=inside), mask=inside)
        tl.store(out_gradients + num_leaves + k, tl.load(adjoint + num_values + k, mask=inside), mask=inside)
    one, other = tl.load(values + slope), tl.load(values + curvature)
    tl.store(out_slope, one)
    tl.store(out_curvature, other)
    tl.store(out_ratio, other - one)


@triton.jit
def weight_sums_kernel(
    weight, result, rows, columns, per_group, taps, groups, BLOCK: tl.constexpr
):  # fmt: skip
    """A program for each row (C_out) and each column (C_in) of the weight."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.full((), 0.0, weight.dtype.element_ty)
    square = total
    if program < rows:
        length = per_group * taps
        for first in range(0, length, BLOCK):
            value = tl.load(weight + program * length + first + lanes, mask=first + lanes < length, other=0.0)
            total += tl.sum(tl.abs(value), 0)
            square += tl.sum(value * value, 0)
        tl.store(result + rows + columns + program, square)
    else:
        column = program - rows
        group, own = column // per_group, column % per_group
        length = rows // groups * taps
        for first in range(0, length, BLOCK):
            k = first + lanes
            row = group * (rows // groups) + k // taps
            place = (row * per_group + own) * taps + k % taps
            total += tl.sum(tl.abs(tl.load(weight + place, mask=k < length, other=0.0)), 0)
    tl.store(result + program, total)


@triton.jit
def weight_sums_gradient_kernel(
    weight, grad, result, size, rows, columns, per_group, taps, groups, BLOCK: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    value = tl.load(weight + k, mask=inside, other=0.0)
    row = k // (per_group * taps)
    column = row // (rows // groups) * per_group + k // taps % per_group
    both = tl.load(grad + row, mask=inside, other=0.0) + tl.load(grad + rows + column, mask=inside, other=0.0)
    square = tl.load(grad + rows + columns + row, mask=inside, other=0.0)
    sign = tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))
    tl.store(result + k, sign * both + 2.0 * square * value, mask=inside)


def leaves(vector: Tensor, integers: Tensor, constants: Tensor, width: int) -> Tensor:
    """Logarithm of every leaf."""
    result = vector.new_empty(len(integers))
    tiny = torch.finfo(vector.dtype).tiny
    leaves_kernel[(len(integers),)](vector, integers, constants, result, tiny, _block(width))
    return result


def leaf_gradients(
    vector: Tensor, integers: Tensor, constants: Tensor, width: int, gradients: Tensor, *grads: Tensor | None
) -> Tensor:
    """Gradient by the vector."""
    result, tiny = torch.empty_like(vector), torch.finfo(vector.dtype).tiny
    given = [vector if grad is None else grad.contiguous() for grad in grads]
    flags = [grad is not None for grad in grads]
    leaf_gradients_kernel[(len(integers),)](
        vector, integers, constants, gradients, *given, result, len(integers), *flags, tiny, _block(width)
    )
    return result


def solve(leaves: Tensor, integers: Tensor, floats: Tensor, shape: list[int]) -> tuple[Tensor, ...]:
    """Both ends, their difference, and the gradients by all leaves."""
    num_leaves, num_values, slope, curvature, steps, width, terms, parts, backward, rows, uses = shape
    tables, start = [], 0
    sizes = steps * width * terms * parts, steps * width, *[backward * rows * uses] * 2, backward * rows
    for size in sizes:
        tables.append(integers[start : start + size])
        start += size
    numbers, start = [], 0
    sizes = num_values, steps * width * terms * parts, steps * width * terms, steps * width, backward * rows * uses
    for size in sizes:
        numbers.append(floats[start : start + size])
        start += size
    values, adjoint = leaves.new_empty(num_values), leaves.new_empty(2 * num_values)
    derivatives = leaves.new_empty(steps * width * terms)
    ends = [leaves.new_empty(()) for _ in range(3)]
    gradients = leaves.new_empty(2, num_leaves)
    solve_kernel[(1,)](
        leaves, *tables, *numbers, values, derivatives, adjoint, *ends, gradients,
        num_leaves, num_values, slope, curvature, steps, backward, width, terms, parts, rows, uses, _BLOCK, num_warps=8,
    )  # fmt: skip
    return (*ends, gradients)


def weight_sums(weight: Tensor, groups: int) -> Tensor:
    """Sums over rows and columns."""
    weight = weight.contiguous()
    rows, per_group = weight.shape[:2]
    columns, taps = groups * per_group, weight[0, 0].numel()
    result = weight.new_empty(2 * rows + columns)
    weight_sums_kernel[(rows + columns,)](weight, result, rows, columns, per_group, taps, groups, _BLOCK)
    return result


def weight_sums_gradient(weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    """Gradient of the sums by the weight."""
    weight = weight.contiguous()
    rows, per_group = weight.shape[:2]
    columns, taps, size = groups * per_group, weight[0, 0].numel(), weight.numel()
    result = torch.empty_like(weight)
    weight_sums_gradient_kernel[(triton.cdiv(size, _BLOCK),)](
        weight, grad, result, size, rows, columns, per_group, taps, groups, _BLOCK
    )
    return result


def _block(width: int) -> int:
    return min(max(triton.next_power_of_2(width), 32), _BLOCK)
