"""Certified slope and curvature of a whole network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice
from lightning_lcnn.bounds.graph import shares
from lightning_lcnn.bounds.measured import MeasuredNetwork, measure
from lightning_lcnn.bounds.pieces import Concat, Sum
from lightning_lcnn.bounds.recursion import Leaf, Node, Recursion
from lightning_lcnn.bounds.result import LayerRow, NetworkBound

INFLATION = 1 + 1e-6  # covers rounding: these recursions err by less than 1e-9 in float64


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
    return fast_bound(network)


def fast_bound(network: MeasuredNetwork) -> NetworkBound:
    """The scalar recursion on a measured network."""
    slopes, bends = _leaves(network)
    recursion = Recursion(_nodes(network), len(slopes), compress=False)
    segments, contributions = recursion.contributions(slopes, bends)
    log_slope, log_curvature = recursion.run(segments, contributions)
    share = dict(zip(recursion.occurrences, shares(recursion, segments, contributions).tolist(), strict=True))
    jumps = any(math.isinf(float(bound.slope)) for bound in network.bounds)
    kinks = [i for i, bound in enumerate(network.bounds) if math.isinf(float(bound.curvature))]
    total = _exp(log_curvature[-1]) * INFLATION
    rows = []
    for i, (step, bound) in enumerate(zip(network.steps, network.bounds, strict=True)):
        own = share.get(i, 0.0)
        rows.append(
            LayerRow(
                name=step.name,
                kind=step.kind,
                slope=float(bound.slope),
                cumulative_slope=_exp(log_slope[i]) * INFLATION,
                curvature=math.inf if i in kinks else own * total if own else 0.0,
                share=own if not kinks else (1 / len(kinks) if i in kinks else 0.0),
                reason=bound.reason,
            )
        )
    slope = math.inf if jumps else rows[-1].cumulative_slope
    return NetworkBound(slope, math.inf if kinks or jumps else total, _shown(rows), "fast")


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


def _shown(rows: list[LayerRow]) -> tuple[LayerRow, ...]:
    """Without the steps that change nothing."""
    return tuple(row for row in rows if row.slope != 1 or row.curvature or row.kind in ("add", "sub", "cat"))
