r"""A network's graph, and the differentiable surrogate of its slope and curvature bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._compat import uncompiled
from lightning_lcnn.bounds.rules.modules import is_known
from lightning_lcnn.bounds.rules.pieces import Concat, Diagonal, Number, Product, Sum, batch_norm_log_slopes, readings
from lightning_lcnn.bounds.steps import Step, build_steps
from lightning_lcnn.kernels.log_rules import Program, Read, Reading, Rule, solve
from lightning_lcnn.kernels.modes import needs_composite, unsharded
from lightning_lcnn.kernels.operators import runs_operators
from lightning_lcnn.recording.tracing import record

_ZERO = -1e30  # logarithm of zero that survives float32 arithmetic without NaN
_Parts = tuple[tuple[int, float], ...]  # numbers of values, and coefficients
_Terms = tuple[tuple[_Parts, float], ...]  # with offsets
_JOINS = {Sum: "sum", Product: "product", Concat: "concat"}


@dataclass(frozen=True)
class Surrogate:
    """Differentiable estimate of the logarithms of a network's slope and curvature bound.

    Args:
        log_slope: log L̄, shape ().
        log_curvature: log K, shape (); -1e30 when nothing in the network has a finite positive curvature.
        log_ratio: log C̄ = log K - log L̄, shape (); for a chain Σ_i (β_i/4) Π_{j≤i} L_j.
        layers: module paths of the layers with a slope of their own.
        layer_log_slopes: their log slopes, shape (len(layers),).
        activations: names of the steps with curvature, once per use.
        shares: share of each activation in the curvature, shape (len(activations),), detached; sums to 1. A
            function, because it costs a small backward pass.
    """

    log_slope: Tensor
    log_curvature: Tensor
    log_ratio: Tensor
    layers: tuple[str, ...]
    layer_log_slopes: Tensor
    activations: tuple[str, ...]
    shares: Callable[[], Tensor]


class CurvatureGraph:
    """A traced network: its steps, and the recursion over them compiled once.

    It refers to the model's layers, so parameters are read anew at every call. Trace again after layers were
    replaced. Copies and pickles together with the model.

    Args:
        steps: what :func:`trace` found, in order.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.steps = tuple(steps)
        self._slope_leaves: list[Step] = []
        self._bend_leaves: list[Step] = []
        with torch.no_grad():
            nodes = [self._node(step) for step in self.steps]
        self._recursion = Recursion(nodes, len(self._slope_leaves))
        self._uses = [self.steps[i] for i in self._recursion.occurrences]
        self._program = self._recursion.program(len(self._slope_leaves), len(self._bend_leaves))
        self._readings: dict[tuple[Any, ...], Reading] = {}

    def surrogate(self) -> Surrogate:
        r"""Differentiable surrogate of the bound, from the layers as they are now; works in training mode too.

        .. math:: L ← l L, \quad M ← l M + b L^2 \quad\text{along chains; branches add}

        Spectral layers count with their gain and batch norms with their evaluation slope, plain layers with a bound
        that needs no input size. ReLU, max pooling and other kinks count with their slope only: they have no finite
        curvature and cannot be trained to have one; :func:`network_bound` reports them as infinite. Pooling counts
        with a slope that holds for every input size, layer and group norms as at inputs of variance 1, and a product
        of two activations, which has no bound for all inputs, as if both were at most 1.

        Returns:
            A :class:`Surrogate`; nothing in it waits for the device.

        Source:
            LCNN paper, theorem 1, for chains; along graphs and with two-sided slopes ours.

        Example:
            >>> from lightning_lcnn.layers import CenteredSoftplus, SpectralLinear
            >>> net = nn.Sequential(SpectralLinear(3, 4, gamma=2.0), CenteredSoftplus(beta=8.0), SpectralLinear(4, 2))
            >>> round(trace(net).surrogate().log_ratio.exp().item(), 4)  # (8/4) * 2
            4.0
        """
        device = self._where()
        if device.type != "cpu" and not needs_composite() and runs_operators(device):
            tensors, reads = readings([s.piece for s in self._slope_leaves], [s.piece for s in self._bend_leaves])
            if all(tensor.device == tensors[0].device for tensor in tensors):
                return self._by_operators(tensors, reads)
        slopes, bends = self._leaf_values()
        segments, contributions = self._recursion.contributions(slopes, bends)
        log_slope, log_curvature = self._recursion.totals(segments, contributions)
        return self._surrogate(log_slope, log_curvature, log_curvature - log_slope, slopes, bends)

    def _where(self) -> torch.device:
        """Where the parameters of the first layer are that has any."""
        modules = (step.module for step in (*self._slope_leaves, *self._bend_leaves) if step.module is not None)
        return next((tensor.device for m in modules for tensor in (*m.parameters(), *m.buffers())), torch.device("cpu"))

    def _by_operators(self, tensors: list[Tensor], reads: list[Read]) -> Surrogate:
        """A few operations on all layers at once."""
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        tensors = [tensor.to(dtype) for tensor in tensors]
        sizes, count = tuple(tensor.numel() for tensor in tensors), len(self._slope_leaves)
        key = (*reads, *sizes)
        if key not in self._readings:
            self._readings[key] = Reading(reads, sizes)

        def composed(leaves: Tensor) -> tuple[Tensor, Tensor]:
            pieces = self._recursion.contributions(leaves[:count], leaves[count:])
            slopes, curvatures = self._recursion.run(*pieces)
            return slopes[-1], curvatures[-1]

        slope, curvature, ratio, leaves = solve(self._program, self._readings[key], tensors, composed)
        return self._surrogate(slope, curvature, ratio, leaves[:count], leaves[count:])

    def _surrogate(
        self, log_slope: Tensor, log_curvature: Tensor, log_ratio: Tensor, slopes: Tensor, bends: Tensor
    ) -> Surrogate:
        return Surrogate(
            log_slope=log_slope,
            log_curvature=log_curvature,
            log_ratio=log_ratio,
            layers=tuple(step.name for step in self._slope_leaves),
            layer_log_slopes=slopes,
            activations=tuple(step.name for step in self._uses),
            shares=partial(_leaf_shares, self._recursion, slopes.detach(), bends.detach()),
        )

    def _leaf_values(self) -> tuple[Tensor, Tensor]:
        pieces = [step.piece for step in self._slope_leaves]
        norms = iter(batch_norm_log_slopes([p.module for p in pieces if isinstance(p, Diagonal)]))
        slopes = [next(norms) if isinstance(piece, Diagonal) else piece.log_slope() for piece in pieces]
        bends = [step.piece.log_bend() for step in self._bend_leaves]
        tensors = [value for value in (*slopes, *bends) if isinstance(value, Tensor)]
        like = next(iter(tensors), torch.zeros(()))
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return _stack(slopes, like, dtype), _stack(bends, like, dtype)

    def _node(self, step: Step) -> Node:
        if type(step.piece) in _JOINS:
            return Node(step.inputs, join=_JOINS[type(step.piece)])
        try:
            log_slope, bend = step.piece.log_slope(), step.piece.log_bend()
        except ValueError as error:
            raise ValueError(f"`model` has no surrogate at '{step.name}' ({step.kind}): {error}.") from error
        slope = _fixed_or_leaf(log_slope, step, self._slope_leaves)
        return Node(step.inputs, "", slope, None if bend is None else _fixed_or_leaf(bend, step, self._bend_leaves))


def trace(model: nn.Module) -> CurvatureGraph:
    """Trace a model, in evaluation mode and without running it.

    Args:
        model: any module, a LightningModule too, whose ``forward`` takes one tensor (further arguments keep their
            defaults) and returns one tensor. ``torch.compile`` wrappers are looked through.

    Returns:
        A :class:`CurvatureGraph`. The model and its training flags stay as they are.

    Raises:
        TypeError: when ``model`` is not a module.
        ValueError: when ``forward`` branches on values, changes a tensor in place that it reads again, or holds an
            operation without a bound; the message names the module's path and :func:`register_rule`.

    Source:
        Ours.

    Example:
        >>> [step.kind for step in trace(nn.Sequential(nn.Linear(3, 2), nn.Tanh())).steps]
        ['input', 'Linear', 'Tanh', 'output']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    model = unsharded(uncompiled(model), gather=False)
    return CurvatureGraph(build_steps(model, record(model, is_known)))


def shares(recursion: Recursion, segments: Tensor, contributions: Tensor) -> Tensor:
    """Share of every contribution in the curvature: the gradient of its logarithm, which sums to 1.

    Args:
        recursion: the compiled recursion.
        segments: logarithms of the segments' slopes, detached.
        contributions: logarithms of the contributions, detached.

    Returns:
        Shares, shape (number of contributions,).
    """
    with torch.enable_grad():
        contributions = contributions.clone().requires_grad_()
        _, log_curvature = recursion.totals(segments, contributions)
        if contributions.numel() == 0:
            return contributions.detach()
        return torch.autograd.grad(log_curvature, contributions)[0]


def _leaf_shares(recursion: Recursion, slopes: Tensor, bends: Tensor) -> Tensor:
    return shares(recursion, *recursion.contributions(slopes, bends))


def _fixed_or_leaf(value: Number, step: Step, leaves: list[Step]) -> float | Leaf:
    """A float as it is; for a tensor its position among the leaves, shared modules once."""
    if not isinstance(value, Tensor):
        return value
    for index, leaf in enumerate(leaves):
        if step.module is not None and leaf.module is step.module:
            return Leaf(index)
    leaves.append(step)
    return Leaf(len(leaves) - 1)


def _stack(values: Sequence[Number | None], like: Tensor, dtype: torch.dtype) -> Tensor:
    if not values:
        return torch.zeros(0, device=like.device, dtype=dtype)
    return torch.stack([value.to(like.device, dtype) for value in values if isinstance(value, Tensor)])


@dataclass(frozen=True)
class Leaf:
    """Position of a number that is only known when the recursion runs."""

    index: int


@dataclass(frozen=True)
class Node:
    """A step as the recursion sees it: logarithms of slope and curvature, fixed or by position."""

    inputs: tuple[int, ...]
    join: str = ""  # "", "sum", "product" or "concat"
    slope: float | Leaf = 0.0
    bend: float | Leaf | None = None
    offsets: tuple[float, ...] = ()  # joins: logarithms of factors on the inputs


@dataclass
class _Segment:
    source: int
    steps: list[int] = field(default_factory=list)


class Recursion:
    """The recursion of one graph, compiled once; all its state is small constant tensors.

    Args:
        nodes: steps in order; the first is the network's input, the last its output.
        num_slopes: length of the vector of slopes that :meth:`run` will be given.
        compress: treat chains as single maps (faster); otherwise every step's values are available.
    """

    def __init__(self, nodes: Sequence[Node], num_slopes: int, compress: bool = True) -> None:
        self.nodes = list(nodes)
        self.plan: list[_Segment | int] = []  # segments and joins in order of execution
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}
        self.segments = self._split(compress)
        self.occurrences: list[int] = []  # steps with curvature, as the contributions are ordered
        self._tables(num_slopes)
        self._rules = self._program()

    def _split(self, compress: bool) -> list[_Segment]:
        users = [0] * len(self.nodes)
        for node in self.nodes:
            for i in node.inputs:
                users[i] += 1
        open_segments: dict[int, _Segment] = {}  # by last step
        segments = []
        for i, node in enumerate(self.nodes[1:], start=1):
            if node.join:
                self.plan.append(i)
                continue
            source = node.inputs[0]
            segment = open_segments.pop(source, None) if compress and users[source] == 1 else None
            if segment is None:
                segment = _Segment(source)
                segments.append(segment)
                self.plan.append(segment)
            segment.steps.append(i)
            open_segments[i] = segment
        return segments

    def _tables(self, num_slopes: int) -> None:
        """Coefficients of the slopes in every segment's slope and in every contribution to its curvature."""
        slope_rows, bend_rows, members = [], [], []
        bends: list[float | Leaf] = []
        for segment in self.segments:
            rows = torch.stack([self._row(i, num_slopes) for i in segment.steps])
            total, until = rows.sum(0), rows.cumsum(0)
            slope_rows.append(total)
            first = len(bends)
            for k, i in enumerate(segment.steps):
                bend = self.nodes[i].bend
                if bend is not None:
                    bend_rows.append(2 * (until[k] - rows[k]) + total - until[k])
                    bends.append(bend)
                    self.occurrences.append(i)
            members.append(range(first, len(bends)))
        fixed = [0.0 if isinstance(bend, Leaf) else bend for bend in bends]
        self._bend_index = torch.tensor([b.index if isinstance(b, Leaf) else -1 for b in bends], dtype=torch.long)
        width = max((len(m) for m in members), default=0) + 1
        pad = len(bends)
        self._members = torch.tensor([[*m] + [pad] * (width - len(m)) for m in members], dtype=torch.long)
        self._slopes = torch.stack(slope_rows)
        rows = torch.stack(bend_rows) if bend_rows else torch.zeros(0, num_slopes + 1, dtype=torch.float64)
        rows[:, -1] += torch.tensor(fixed, dtype=torch.float64)
        self._bends = rows

    def _row(self, i: int, num_slopes: int) -> Tensor:
        """Coefficients of one step's slope; the last column takes fixed numbers."""
        row = torch.zeros(num_slopes + 1, dtype=torch.float64)
        slope = self.nodes[i].slope
        if isinstance(slope, Leaf):
            row[slope.index] = 1.0
        else:
            row[-1] = slope
        return row

    def contributions(self, slopes: Tensor, bends: Tensor) -> tuple[Tensor, Tensor]:
        """Slope of every segment, and what each activation adds to the curvature of its segment, as logarithms.

        Args:
            slopes: logarithms of the slopes, shape (num_slopes,).
            bends: logarithms of the curvatures, shape (num_bends,).
        """
        slope_rows, bend_rows, bend_index, _ = self._on(slopes)
        # sums of products, not matmul: autocast and TF32 would round it
        slopes = torch.cat([slopes, slopes.new_ones(1)])
        bends = torch.cat([bends, bends.new_zeros(1)])
        return (slope_rows * slopes).sum(1), (bend_rows * slopes).sum(1) + bends[bend_index]

    def _program(self) -> list[Rule]:
        """What follows from what, in order: slopes of steps, their curvatures, slopes of segments, their curvatures."""
        n, rules = len(self.nodes), []
        segment = 2 * n
        for entry in self.plan:
            if isinstance(entry, _Segment):
                last, source = entry.steps[-1], entry.source
                s, c = segment, segment + len(self.segments)
                segment += 1
                slope: _Parts = ((source, 1.0), (s, 1.0))
                after: _Terms = (((n + source, 1.0), (s, 1.0)), 0.0), (((source, 2.0), (c, 1.0)), 0.0)
                if source == 0:  # the network's input has slope 1 and no curvature
                    slope, after = ((s, 1.0),), ((((c, 1.0),), 0.0),)
                rules += [Rule(last, ((slope, 0.0),)), Rule(n + last, after)]
            else:
                rules += self._join(entry, self.nodes[entry])
        return rules

    def _join(self, i: int, node: Node) -> list[Rule]:
        """Sum, or root-sum-square for a concatenation, of the inputs' numbers."""
        n, power = len(self.nodes), 2.0 if node.join == "concat" else 1.0
        offsets = node.offsets or (0.0,) * len(node.inputs)
        slopes: _Terms
        bends: _Terms
        slopes, bends = [
            tuple((((k + first, power),), power * o) for k, o in zip(node.inputs, offsets, strict=True))
            for first in (0, n)
        ]
        if node.join == "product":
            bends = (*bends, (tuple((k, 1.0) for k in node.inputs), math.log(2)))
        return [Rule(i, slopes, 1 / power), Rule(n + i, bends, 1 / power)]

    def run(self, segment_slopes: Tensor, contributions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logarithms of slope and curvature at every step that ends a segment or joins; zeros elsewhere.

        Args:
            segment_slopes: first result of :meth:`contributions`.
            contributions: second result of :meth:`contributions`.
        """
        n = len(self.nodes)
        origin = [segment_slopes.new_zeros(())] * n + [segment_slopes.new_full((), _ZERO)] * n
        values = [*origin, *segment_slopes.unbind(), *self._of_segments(contributions).unbind()]
        for rule in self._rules:
            terms = []
            for parts, offset in rule.terms:
                first, *rest = [values[k] if c == 1.0 else c * values[k] for k, c in parts]
                term = sum(rest, first)
                terms.append(term + offset if offset else term)
            joined = terms[0] if len(terms) == 1 else torch.logsumexp(torch.stack(terms), dim=0)
            values[rule.result] = joined if rule.scale == 1.0 else rule.scale * joined
        return values[:n], values[n : 2 * n]

    def program(self, num_slopes: int, num_bends: int) -> Program:
        """All rules from the logarithms of slopes and curvatures on, for one kernel."""
        shift, n, m = num_slopes + num_bends, len(self.nodes), len(self.segments)
        slope_rows, bend_rows, bend_index = self._slopes.tolist(), self._bends.tolist(), self._bend_index.tolist()

        def parts(row: list[float], bend: int = -1) -> tuple[_Parts, float]:
            known = tuple((k, c) for k, c in enumerate(row[:-1]) if c)
            return known + (((num_slopes + bend, 1.0),) if bend >= 0 else ()), row[-1]

        rules = []
        for j, members in enumerate(self._members.tolist()):
            rules.append(Rule(shift + 2 * n + j, (parts(slope_rows[j]),)))
            terms = tuple(parts(bend_rows[k], bend_index[k]) for k in members if k < len(bend_rows))
            if terms:
                rules.append(Rule(shift + 2 * n + m + j, terms))
        for rule in self._rules:
            shifted = tuple((tuple((k + shift, c) for k, c in known), offset) for known, offset in rule.terms)
            rules.append(Rule(rule.result + shift, shifted, rule.scale))
        start = [0.0] * (shift + n) + [_ZERO] * (n + 2 * m)
        return Program(shift, start, rules, (shift + n - 1, shift + 2 * n - 1))

    def totals(self, segment_slopes: Tensor, contributions: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of slope and curvature at the last step, 0-d; arguments as for :meth:`run`."""
        slopes, curvatures = self.run(segment_slopes, contributions)
        return slopes[-1], curvatures[-1]

    def _of_segments(self, contributions: Tensor) -> Tensor:
        """Logarithm of the curvature of every segment by itself."""
        padded = torch.cat([contributions, contributions.new_full((1,), _ZERO)])
        return torch.logsumexp(padded[self._on(contributions)[3]], dim=1)

    def _on(self, like: Tensor) -> tuple[Tensor, ...]:
        """The constant tables on the device and in the type of ``like``."""
        key = (like.device, like.dtype)
        if key not in self._constants:
            floats = [t.to(like) for t in (self._slopes, self._bends)]
            self._constants[key] = (*floats, *(t.to(like.device) for t in (self._bend_index, self._members)))
        return self._constants[key]
