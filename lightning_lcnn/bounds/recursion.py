r"""The composition rules as one recursion on logarithms, shared by the surrogate and the certified bound.

A map with slope l and curvature b after one with slope L and curvature M has slope l·L and curvature l·M + b·L².
Chains without branches are summed up at once: with steps j of slope l_j and curvature b_j a chain has slope Π l_j and
curvature :math:`\sum_j b_j (\prod_{i<j} l_i)^2 \prod_{i>j} l_i`. Sums add; concatenations combine in root-sum-square;
products of factors of magnitude 1 add, and twice the product of their slopes joins their curvature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_ZERO = -1e30  # logarithm of zero that survives float32 arithmetic without NaN


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

    def run(self, segment_slopes: Tensor, contributions: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logarithms of slope and curvature at every step that ends a segment or joins; zeros elsewhere.

        Args:
            segment_slopes: first result of :meth:`contributions`.
            contributions: second result of :meth:`contributions`.
        """
        members = self._on(segment_slopes)[3]
        padded = torch.cat([contributions, contributions.new_full((1,), _ZERO)])
        curvatures = torch.logsumexp(padded[members], dim=1).unbind()
        origin = segment_slopes.new_zeros(()), segment_slopes.new_full((), _ZERO)
        slope, curvature = [origin[0]] * len(self.nodes), [origin[1]] * len(self.nodes)
        pieces = iter(zip(segment_slopes.unbind(), curvatures, strict=True))
        for entry in self.plan:
            if isinstance(entry, _Segment):
                s, c = next(pieces)
                last, source = entry.steps[-1], entry.source
                if source == 0:
                    slope[last], curvature[last] = s, c
                    continue
                slope[last] = slope[source] + s
                curvature[last] = torch.logaddexp(curvature[source] + s, 2 * slope[source] + c)
            else:
                node = self.nodes[entry]
                slope[entry], curvature[entry] = self._join(node, slope), self._join(node, curvature)
                if node.join == "product":
                    cross = slope[node.inputs[0]] + slope[node.inputs[1]] + math.log(2)
                    curvature[entry] = torch.logaddexp(curvature[entry], cross)
        return slope, curvature

    @staticmethod
    def _join(node: Node, values: list[Tensor]) -> Tensor:
        """Sum, or root-sum-square for a concatenation, of the inputs' numbers."""
        terms = [values[i] for i in node.inputs]
        if node.offsets:
            terms = [term + offset for term, offset in zip(terms, node.offsets, strict=True)]
        if node.join == "concat":
            return torch.logsumexp(2 * torch.stack(terms), dim=0) / 2
        return torch.logaddexp(*terms) if len(terms) == 2 else torch.logsumexp(torch.stack(terms), dim=0)

    def _on(self, like: Tensor) -> tuple[Tensor, ...]:
        """The constant tables on the device and in the type of ``like``."""
        key = (like.device, like.dtype)
        if key not in self._constants:
            floats = [t.to(like) for t in (self._slopes, self._bends)]
            self._constants[key] = (*floats, *(t.to(like.device) for t in (self._bend_index, self._members)))
        return self._constants[key]
