r"""A table of rules log Σ exp over a network's slopes and curvatures, with its gradient, in a few operations.

The penalty of a network reads a few numbers of every layer and combines them by some hundred additions and
log-sum-exps. On a GPU each would be a launch, forward and backward; here all parameters are put into one vector (one
launch), reduced to one logarithm for each layer (one), combined together with the gradient of the result (one), and
backward is one more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.kernels.operators import operator

_Parts = tuple[tuple[int, float], ...]  # numbers of values, and coefficients
_LARGEST_STEP = 4096  # numbers that one step of the kernel reads at once
_FIELDS = 8  # integers that describe a layer
PARAMETER, BATCH_NORM, WEIGHT = range(3)


@dataclass(frozen=True)
class Rule:
    """Value number ``result`` is scale · log Σ exp(Σ coefficient · value + offset)."""

    result: int
    terms: tuple[tuple[_Parts, float], ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Read:
    """How the logarithm of a layer follows from tensors: their positions in a list, and two constants.

    ``PARAMETER``: the maximum of the first, plus ``constant``. ``BATCH_NORM``: of log |w| / sqrt(v + constant), with w
    or None, v, and an upper limit or None. ``WEIGHT``: of sums over a weight, see :func:`weight_sums`; the logarithm
    of min(sqrt(rows · columns), constant · Frobenius norm).
    """

    kind: int
    tensors: tuple[int | None, ...]
    constant: float = 0.0
    rows: int = 0  # of a weight
    columns: int = 0


class Program:
    """Rules in an order in which everything that a rule reads is known, as tables for one kernel.

    Args:
        num_leaves: Values that are given; they have the first numbers.
        start: All values before the first rule; those of the leaves are ignored.
        rules: The rules in order.
        ends: Numbers of the log slope and of the log curvature among the values.
    """

    def __init__(self, num_leaves: int, start: Sequence[float], rules: Sequence[Rule], ends: tuple[int, int]) -> None:
        self.num_leaves, self.ends = num_leaves, ends
        level = [0] * len(start)
        for rule in rules:
            level[rule.result] = 1 + max((level[k] for parts, _ in rule.terms for k, _ in parts), default=0)
        spare = len(start)  # a value that padding reads and writes
        terms = _width(len(rule.terms) for rule in rules)
        parts = _width(len(parts) for rule in rules for parts, _ in rule.terms)
        steps = _steps(list(rules), [level[rule.result] for rule in rules], max(_LARGEST_STEP // (terms * parts), 1))
        width = _width(map(len, steps))
        self.forward_shape, index = (len(steps), width, terms, parts), 0
        size = len(steps) * width * terms
        numbers, factors = [spare] * (size * parts), [0.0] * (size * parts)
        offsets, results, scales = [-math.inf] * size, [spare] * (size // terms), [0.0] * (size // terms)
        uses: dict[int, list[tuple[int, float, int]]] = {k: [] for k in range(len(start))}
        for s, step in enumerate(steps):
            for r, rule in enumerate(step):
                results[s * width + r], scales[s * width + r] = rule.result, rule.scale
                for t, (sources, offset) in enumerate(rule.terms):
                    index = (s * width + r) * terms + t
                    offsets[index] = offset
                    for p, (k, c) in enumerate(sources):
                        numbers[index * parts + p], factors[index * parts + p] = k, c
                        uses[k].append((index, c, rule.result))
        read = [k for k in uses if uses[k]]
        count = _width(len(uses[k]) for k in read)
        backward = _steps(read, [-level[k] for k in read], max(_LARGEST_STEP // count, 1))
        rows = _width(map(len, backward))
        self.backward_shape = (len(backward), rows, count)
        size = len(backward) * rows * count
        of, by, at, targets = [0] * size, [0.0] * size, [spare] * size, [spare] * (size // count)
        for s, group in enumerate(backward):
            for r, k in enumerate(group):
                targets[s * rows + r] = k
                for u, use in enumerate(uses[k]):
                    position = (s * rows + r) * count + u
                    of[position], by[position], at[position] = use
        self._integers = [*numbers, *results, *of, *at, *targets]
        self._floats = [*start, 0.0, *factors, *offsets, *scales, *by]
        self._on: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Integers and numbers of all steps, on the device and in the type of ``like``."""
        key = like.device, like.dtype
        if key not in self._on:
            floats = torch.tensor(self._floats, dtype=torch.float64)
            self._on[key] = torch.tensor(self._integers, dtype=torch.int32).to(like.device), floats.to(like)
        return self._on[key]

    @property
    def shape(self) -> list[int]:
        """Sizes of the tables, as the operator takes them."""
        return [self.num_leaves, len(self._floats_start()), *self.ends, *self.forward_shape, *self.backward_shape]

    def _floats_start(self) -> list[float]:
        steps, width, terms, parts = self.forward_shape
        rest = steps * width * (terms * parts + terms + 1) + math.prod(self.backward_shape)
        return self._floats[: len(self._floats) - rest]


def _width(sizes: Any) -> int:
    """The next power of two of the largest size."""
    return 1 << (max([*sizes, 1]) - 1).bit_length()


def _steps(items: list[Any], levels: list[int], most: int) -> list[list[Any]]:
    """Items of one level together, at most so many, levels in order."""
    steps = []
    for level in sorted(set(levels)):
        group = [item for item, own in zip(items, levels, strict=True) if own == level]
        steps += [group[i : i + most] for i in range(0, len(group), most)]
    return steps


class Reading:
    """Where a program's leaves lie in the vector of all tensors, as a table.

    Args:
        reads: How each leaf is read.
        sizes: Numbers of values of the tensors.
    """

    def __init__(self, reads: Sequence[Read], sizes: Sequence[int]) -> None:
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        self._constants = [read.constant for read in reads]
        self._integers = []
        for read in reads:
            places = [-1 if i is None else first[i] for i in read.tensors]
            length = sizes[next(i for i in read.tensors if i is not None)]
            row = [read.kind, length, read.rows, read.columns, *places]
            self._integers.append(row + [-1] * (_FIELDS - len(row)))
        self.width = max(row[1] for row in self._integers)
        self._on: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (leaves, 8) and constants (leaves,)."""
        key = like.device, like.dtype
        if key not in self._on:
            constants = torch.tensor(self._constants, dtype=torch.float64).to(like)
            self._on[key] = torch.tensor(self._integers, dtype=torch.int32).to(like.device), constants
        return self._on[key]


# --------------------------------------------------------------------------- the operators, and what they compute


def _leaf(vector: Tensor, row: list[int], constant: float) -> Tensor:
    """Logarithm of one layer, differentiable in the vector of all tensors."""
    kind, length, rows, columns, a, b, c = row[:7]
    tiny = torch.finfo(vector.dtype).tiny
    if kind == PARAMETER:
        return vector[a : a + length].amax() + constant
    if kind == BATCH_NORM:
        gain = (vector[b : b + length] + constant).rsqrt()
        value = (gain if a < 0 else gain * vector[a : a + length].abs()).amax().clamp_min(tiny).log()
        return value if c < 0 else torch.minimum(value, vector[c])
    sums = vector[a : a + length].split([rows, columns, length - rows - columns])
    product = (sums[0].amax() * sums[1].amax()).clamp_min(1e-37).sqrt()
    return torch.minimum(product, constant * sums[2].sum().sqrt()).clamp_min(tiny).log()


def _leaves(vector: Tensor, integers: Tensor, constants: Tensor) -> Tensor:
    rows = zip(integers.tolist(), constants.tolist(), strict=True)
    return torch.stack([_leaf(vector, row, constant) for row, constant in rows])


def _leaves_reference(vector: Tensor, integers: Tensor, constants: Tensor, width: int) -> Tensor:
    return _leaves(vector, integers, constants)


def _leaves_meta(vector: Tensor, integers: Tensor, constants: Tensor, width: int) -> Tensor:
    return vector.new_empty(len(integers))


def _leaves_cuda(vector: Tensor, integers: Tensor, constants: Tensor, width: int) -> Tensor:
    from lightning_lcnn.kernels import triton_log_rules

    return triton_log_rules.leaves(vector, integers, constants, width)


def _leaf_gradients_reference(
    vector: Tensor,
    integers: Tensor,
    constants: Tensor,
    width: int,
    gradients: Tensor,
    of_slope: Tensor | None,
    of_curvature: Tensor | None,
    of_ratio: Tensor | None,
    of_leaves: Tensor | None,
) -> Tensor:
    total = torch.zeros_like(gradients[0])
    weights = ((of_slope, (1.0, 0.0)), (of_curvature, (0.0, 1.0)), (of_ratio, (-1.0, 1.0)))
    for grad, (slope, curvature) in weights:
        if grad is not None:
            total = total + grad * (slope * gradients[0] + curvature * gradients[1])
    if of_leaves is not None:
        total = total + of_leaves
    with torch.enable_grad():
        vector = vector.detach().clone().requires_grad_()
        return torch.autograd.grad(_leaves(vector, integers, constants), vector, total)[0]


def _leaf_gradients_meta(vector: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(vector)


def _leaf_gradients_cuda(*arguments: Any) -> Tensor:
    from lightning_lcnn.kernels import triton_log_rules

    return triton_log_rules.leaf_gradients(*arguments)


def _solve_reference(
    leaves: Tensor, integers: Tensor, floats: Tensor, shape: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the same tables, in Python's numbers."""
    num_leaves, num_values, slope, curvature, steps, width, terms, parts, backward, rows, uses = shape
    tables, numbers = iter(integers.tolist()), iter(floats.tolist())

    def take(source: Any, *sizes: int) -> list[Any]:
        return [next(source) for _ in range(math.prod(sizes))]

    index, results = take(tables, steps, width, terms, parts), take(tables, steps, width)
    of, at, targets = [take(tables, backward, rows, *more) for more in ((uses,), (uses,), ())]
    values = take(numbers, num_values)
    factors, offsets = take(numbers, steps, width, terms, parts), take(numbers, steps, width, terms)
    scales, by = take(numbers, steps, width), take(numbers, backward, rows, uses)
    values[:num_leaves] = leaves.tolist()
    derivatives = [0.0] * len(offsets)
    for rule, (result, scale) in enumerate(zip(results, scales, strict=True)):
        places = [t for t in range(rule * terms, (rule + 1) * terms) if offsets[t] > -math.inf]
        if not places:
            continue
        sums = [
            sum(factors[p] * values[index[p]] for p in range(t * parts, (t + 1) * parts) if factors[p]) + offsets[t]
            for t in places
        ]
        top = max(sums)
        shares = [float(t == top) if math.isinf(top) else math.exp(t - top) for t in sums]
        values[result] = scale * (top + math.log(sum(shares)))
        for t, share in zip(places, shares, strict=True):
            derivatives[t] = scale * share / sum(shares)
    gradients = []
    for root in (slope, curvature):
        adjoint = [float(k == root) for k in range(num_values)]
        for row, target in enumerate(targets):
            own = range(row * uses, (row + 1) * uses)
            adjoint[target] += sum(by[u] * derivatives[of[u]] * adjoint[at[u]] for u in own if by[u])
        gradients.append(adjoint[:num_leaves])
    ends = values[slope], values[curvature], values[curvature] - values[slope]
    return (*(leaves.new_tensor(end) for end in ends), leaves.new_tensor(gradients))  # type: ignore[return-value]


def _solve_meta(leaves: Tensor, integers: Tensor, floats: Tensor, shape: list[int]) -> tuple[Tensor, ...]:
    return (*(leaves.new_empty(()) for _ in range(3)), leaves.new_empty(2, len(leaves)))


def _solve_cuda(leaves: Tensor, integers: Tensor, floats: Tensor, shape: list[int]) -> tuple[Tensor, ...]:
    from lightning_lcnn.kernels import triton_log_rules

    return triton_log_rules.solve(leaves, integers, floats, shape)


def _sums(weight: Tensor, groups: int) -> Tensor:
    """Sums of magnitudes over rows and columns, and of squares over rows: (rows + columns + rows,)."""
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    magnitude = blocks.abs()
    return torch.cat([t.flatten() for t in (magnitude.sum((2, 3)), magnitude.sum((1, 3)), blocks.square().sum((2, 3)))])


def _sums_meta(weight: Tensor, groups: int) -> Tensor:
    return weight.new_empty(2 * weight.shape[0] + groups * weight.shape[1])


def _sums_cuda(weight: Tensor, groups: int) -> Tensor:
    from lightning_lcnn.kernels import triton_log_rules

    return triton_log_rules.weight_sums(weight, groups)


def _sums_gradient_reference(weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    rows, columns, squares = grad.split([weight.shape[0], groups * weight.shape[1], weight.shape[0]])
    rows, squares = [t.view(groups, -1, 1, 1) for t in (rows, squares)]
    signed = blocks.sign() * (rows + columns.view(groups, 1, -1, 1))
    return (signed + 2 * squares * blocks).reshape(weight.shape)


def _sums_gradient_meta(weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _sums_gradient_cuda(weight: Tensor, grad: Tensor, groups: int) -> Tensor:
    from lightning_lcnn.kernels import triton_log_rules

    return triton_log_rules.weight_sums_gradient(weight, grad, groups)


_read = operator(
    "read_leaves(Tensor vector, Tensor integers, Tensor constants, int width) -> Tensor",
    _leaves_reference,
    _leaves_meta,
    _leaves_cuda,
)
_read_gradient = operator(
    "read_leaves_gradient(Tensor vector, Tensor integers, Tensor constants, int width, Tensor gradients, "
    "Tensor? of_slope, Tensor? of_curvature, Tensor? of_ratio, Tensor? of_leaves) -> Tensor",
    _leaf_gradients_reference,
    _leaf_gradients_meta,
    _leaf_gradients_cuda,
)
_solve = operator(
    "solve_log_rules(Tensor leaves, Tensor integers, Tensor floats, int[] shape) -> (Tensor, Tensor, Tensor, Tensor)",
    _solve_reference,
    _solve_meta,
    _solve_cuda,
)
_weight_sums = operator("weight_sums(Tensor weight, int groups) -> Tensor", _sums, _sums_meta, _sums_cuda)
_weight_sums_gradient = operator(
    "weight_sums_gradient(Tensor weight, Tensor grad, int groups) -> Tensor",
    _sums_gradient_reference,
    _sums_gradient_meta,
    _sums_gradient_cuda,
)


def weight_sums(weight: Tensor, groups: int) -> Tensor:
    """Sums over the rows and columns of a weight's magnitudes, and over rows of its squares, in one operation.

    Args:
        weight: (C_out, C_in / groups, ...).
        groups: Blocks of rows that share columns.

    Returns:
        (C_out + C_in + C_out,), differentiable.

    Example:
        >>> weight_sums(torch.tensor([[1.0, -2.0]]), groups=1)
        tensor([3., 1., 2., 5.])
    """
    return _WeightSums.apply(weight, groups)


class _WeightSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.groups = groups
        return _weight_sums(weight, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        gradient = _sums_gradient_reference if torch.is_grad_enabled() else _weight_sums_gradient
        return gradient(weight, grad.contiguous(), ctx.groups), None


def solve(
    program: Program, reading: Reading, tensors: Sequence[Tensor], composed: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log slope, log curvature and their difference, 0-d, and the logarithms of all leaves, from layers' tensors.

    Args:
        program: The rules.
        reading: Where the leaves lie.
        tensors: What they are read from, of one type and device.
        composed: Both ends from the leaves by differentiable operations, for second derivatives.
    """
    return _Solve.apply(program, reading, composed, *tensors)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, reading: Reading, composed: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
        leaves = _read(vector, *reading.tables(vector), reading.width)
        slope, curvature, ratio, gradients = _solve(leaves, *program.tables(vector), program.shape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(vector, gradients, *tensors)
        ctx.reading, ctx.composed = reading, composed
        return slope, curvature, ratio, leaves

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        vector, gradients, *tensors = ctx.saved_tensors
        tables = ctx.reading.tables(vector)
        if torch.is_grad_enabled():  # somebody differentiates this backward again
            vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
            leaves = _leaves(vector, *tables)
            slope, curvature = ctx.composed(leaves)
            ends = slope, curvature, curvature - slope, leaves
            asked = [(end, grad) for end, grad in zip(ends, grads, strict=True) if grad is not None]
            inputs = [tensor for tensor in tensors if tensor.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [end for end, _ in asked], inputs, [g for _, g in asked], create_graph=True, materialize_grads=True
                )
            )
            return (None, None, None, *(next(found) if tensor.requires_grad else None for tensor in tensors))
        flat = _read_gradient(vector, *tables, ctx.reading.width, gradients, *grads)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        wanted = zip(pieces, tensors, ctx.needs_input_grad[3:], strict=True)
        return (None, None, None, *(piece.view(t.shape) if needed else None for piece, t, needed in wanted))
