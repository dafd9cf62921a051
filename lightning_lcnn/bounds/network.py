"""Certified bounds of whole networks, and what they return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice
from lightning_lcnn.bounds.backward import Gradient, any_direction, backward_pass, direction
from lightning_lcnn.bounds.forward import forward_pass, norm_of
from lightning_lcnn.bounds.graph import Leaf, Node, Recursion, shares
from lightning_lcnn.bounds.measured import MeasuredNetwork, measure
from lightning_lcnn.bounds.rules.pieces import Concat, Shape, Sum

INFLATION = 1 + 1e-6  # covers rounding: these recursions err by less than 1e-9 in float64
_MAX_OUTPUTS = 128


@dataclass(frozen=True)
class LayerRow:
    """One step of the network in the table of a bound.

    Args:
        name: module path, or path and function name.
        kind: class or function.
        slope: certified slope of the step alone.
        cumulative_slope: certified slope from the network's input to the step's output.
        curvature: what the step's own non-linearity adds to the network's curvature bound; infinite for a kink.
        share: its share of the network's curvature, between 0 and 1. Kinks share an infinite total equally.
        reason: why the curvature is infinite, or "".
    """

    name: str
    kind: str
    slope: float
    cumulative_slope: float
    curvature: float
    share: float
    reason: str = ""


@dataclass(frozen=True)
class NetworkBound:
    """Certified bounds of a network g, valid for every input.

    Args:
        slope: sup ‖Dg(x)‖₂ is at most this.
        curvature: sup over x and unit u, v of ‖D²g(x)[u, v]‖₂ is at most this, so it bounds the Hessian norm of every
            unit combination of outputs.
        layers: one row for each step that has a slope other than 1 or a curvature, in order.
        method: "fast" or "tight".
    """

    slope: float
    curvature: float
    layers: tuple[LayerRow, ...]
    method: str

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the curvature is infinite, one line for each step that makes it so."""
        return tuple(f"{row.name}: {row.reason}" for row in self.layers if row.reason)

    def __str__(self) -> str:
        """Aligned table with the totals above."""
        head = f"slope <= {self.slope:.6g}, curvature <= {self.curvature:.6g} (certified, method '{self.method}')"
        titles = ("layer", "kind", "slope", "cumulative", "curvature", "share")
        rows = [titles, *(_cells(row) for row in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = [
            "  ".join(_aligned(cell, w, i) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
        ]
        reasons = [f"infinite: {reason}" for reason in self.reasons[:5]]
        more = [f"... and {len(self.reasons) - 5} more"] if len(self.reasons) > 5 else []
        return "\n".join([head, *(line.rstrip() for line in lines), *reasons, *more])


def _cells(row: LayerRow) -> tuple[str, ...]:
    curvature = f"{row.curvature:.4g}" if row.curvature else ""
    share = f"{100 * row.share:.1f}%" if row.curvature else ""
    return row.name, row.kind, f"{row.slope:.4g}", f"{row.cumulative_slope:.4g}", curvature, share


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)


def network_bound(model: nn.Module, example_input: Tensor, method: str = "fast") -> NetworkBound:
    r"""Certified bounds on slope and curvature that no input exceeds.

    .. math:: \sup_x \|Dg(x)\|_2 \le \text{slope}, \quad
              \sup_{x, \|u\|=\|v\|=1} \|D^2 g(x)[u, v]\|_2 \le \text{curvature}

    The bound is for the network in exact arithmetic with the parameters it has now, computed in float64 and inflated
    by 1e-6. It holds for every input of the example's shape.

    Args:
        model: network in evaluation mode, whose ``forward`` takes one tensor (N, ...) and returns one.
        example_input: any input of the true shape (N, ...); only the shape matters.
        method: "fast" composes one slope and one curvature per layer; "tight" also follows row norms forward and
            intervals of the gradient backward, which costs seconds and gains most on wide layers near the output.

    Returns:
        A :class:`NetworkBound`; ``print`` shows the table. A kink (ReLU, max pooling) makes the curvature infinite
        and says so in its row.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the model is in training mode, cannot be traced, holds a layer without a bound, or does not
            accept the example.

    Source:
        Ours; docs/theory.md derives every rule.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
        >>> bound = network_bound(net, torch.zeros(1, 3))
        >>> bound.curvature < float("inf"), bound.layers[1].share
        (True, 1.0)
    """
    check_choice("method", method, ("fast", "tight"))
    network = measure(model, example_input)
    fast = fast_bound(network)
    return fast if method == "fast" else tight_bound(network, fast)


def fast_bound(network: MeasuredNetwork) -> NetworkBound:
    """The scalar recursion on a measured network."""
    slopes, bends = _leaves(network)
    recursion = Recursion(_nodes(network), len(slopes), compress=False)
    segments, contributions = recursion.contributions(slopes, bends)
    log_slope, log_curvature = recursion.run(segments, contributions)
    share = shares(recursion, segments, contributions).tolist()
    jumps = any(math.isinf(float(bound.slope)) for bound in network.bounds)
    total = _exp(log_curvature[-1]) * INFLATION
    own = {i: s * total for i, s in zip(recursion.occurrences, share, strict=True) if s > 0}
    own |= {i: math.inf for i, bound in enumerate(network.bounds) if math.isinf(float(bound.curvature))}
    cumulative = [_exp(value) * INFLATION for value in log_slope]
    slope = math.inf if jumps else cumulative[-1]
    curvature = math.inf if jumps or math.inf in own.values() else total
    return NetworkBound(slope, curvature, _rows(network, cumulative, own), "fast")


def tight_bound(network: MeasuredNetwork, fast: NetworkBound) -> NetworkBound:
    """The smaller of the fast bound and the tight method's; the table shows the one that wins."""
    if math.isinf(fast.slope):
        return replace(fast, method="tight")
    folded = network.folded()
    forward = forward_pass(folded)
    result = backward_pass(folded, forward, _heads(network.shapes[-1][1:]))
    slope = min(fast.slope, _over_directions(result.slope), forward.slopes[-1] * INFLATION)
    own = {i: _over_directions(value) for i, value in result.contributions.items()}
    if not sum(own.values()) < fast.curvature:
        return replace(fast, slope=slope, method="tight")
    rows = _rows(network, [value * INFLATION for value in forward.slopes], own)
    return NetworkBound(slope, sum(own.values()), rows, "tight")


def _heads(shape: Shape) -> Gradient:
    """All unit directions as one head, then every output for itself, as long as they are few."""
    together, outputs = any_direction(shape), math.prod(shape)
    if outputs > _MAX_OUTPUTS:
        return together
    return together.joined(direction(torch.eye(outputs, dtype=torch.float64).view(outputs, *shape)))


def _over_directions(values: Tensor) -> float:
    """The bound over unit directions from those of :func:`_heads`: the first, or the others' root-sum-square."""
    single = float(norm_of(values[1:])) if len(values) > 1 else math.inf
    return min(float(values[0]), single) * INFLATION


def _rows(network: MeasuredNetwork, cumulative: Sequence[float], own: dict[int, float]) -> tuple[LayerRow, ...]:
    """The table, without the steps that change nothing; infinite contributions share the total equally."""
    total = sum(own.values())
    kinks = sum(math.isinf(value) for value in own.values())
    rows = []
    for i, (step, bound) in enumerate(zip(network.steps, network.bounds, strict=True)):
        value = own.get(i, 0.0)
        share = float(math.isinf(value)) / kinks if kinks else value / total if value else 0.0
        slope = float(bound.slope)
        if slope != 1 or value or isinstance(step.piece, Sum | Concat):
            rows.append(LayerRow(step.name, step.kind, slope, cumulative[i], value, share, bound.reason))
    return tuple(rows)


def _leaves(network: MeasuredNetwork) -> tuple[Tensor, Tensor]:
    """Logarithms of every step's slope, and of every positive finite curvature in order."""
    slopes = [_log(_finite(float(bound.slope))) for bound in network.bounds]
    bends = [_log(float(bound.curvature)) for bound in network.bounds if _bends(float(bound.curvature))]
    return torch.tensor(slopes, dtype=torch.float64), torch.tensor(bends, dtype=torch.float64)


def _nodes(network: MeasuredNetwork) -> list[Node]:
    nodes, count = [], 0
    for i, (step, bound) in enumerate(zip(network.steps, network.bounds, strict=True)):
        if isinstance(step.piece, Sum):
            nodes.append(Node(step.inputs, "sum", offsets=tuple(math.log(c) for c in network.copies(i))))
        elif isinstance(step.piece, Concat):
            nodes.append(Node(step.inputs, "concat"))
        else:
            bend = Leaf(count) if _bends(float(bound.curvature)) else None
            count += bend is not None
            nodes.append(Node(step.inputs, "", Leaf(i), bend))
    return nodes


def _bends(curvature: float) -> bool:
    return 0 < curvature < math.inf


def _finite(slope: float) -> float:
    return slope if math.isfinite(slope) else 1.0


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))


def _exp(value: Tensor) -> float:
    return math.exp(float(value)) if float(value) < 709 else math.inf
