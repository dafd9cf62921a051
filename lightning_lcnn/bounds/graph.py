"""A traced network and the differentiable surrogate of its slope and curvature bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_lcnn.bounds.norm_slopes import batch_norm_log_slopes
from lightning_lcnn.bounds.pieces import Concat, Diagonal, Number, Product, Sum
from lightning_lcnn.bounds.recursion import Leaf, Node, Recursion
from lightning_lcnn.bounds.steps import Step, build_steps
from lightning_lcnn.bounds.tracing import record
from lightning_lcnn.functional._sharded import unsharded

_JOINS = {Sum: "sum", Product: "product", Concat: "concat"}


@dataclass(frozen=True)
class Surrogate:
    """Differentiable estimate of the logarithms of a network's slope and curvature bound.

    Args:
        log_slope: log L̄, shape ().
        log_curvature: log K, shape (); -1e30 when nothing in the network has a finite positive curvature.
        layers: module paths of the layers with a slope of their own.
        layer_log_slopes: their log slopes, shape (len(layers),).
        activations: names of the steps with curvature, once per use.
        shares: share of each activation in the curvature, shape (len(activations),), detached; sums to 1. A
            function, because it costs a small backward pass.
    """

    log_slope: Tensor
    log_curvature: Tensor
    layers: tuple[str, ...]
    layer_log_slopes: Tensor
    activations: tuple[str, ...]
    shares: Callable[[], Tensor]

    @property
    def log_ratio(self) -> Tensor:
        r"""Log C̄ = log K - log L̄; for a chain Σ_i (β_i/4) Π_{j≤i} L_j."""
        return self.log_curvature - self.log_slope


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
        slopes, bends = self._leaf_values()
        segments, contributions = self._recursion.contributions(slopes, bends)
        log_slope, log_curvature = self._recursion.totals(segments, contributions)
        return Surrogate(
            log_slope=log_slope,
            log_curvature=log_curvature,
            layers=tuple(step.name for step in self._slope_leaves),
            layer_log_slopes=slopes,
            activations=tuple(step.name for step in self._uses),
            shares=partial(shares, self._recursion, segments.detach(), contributions.detach()),
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
    model = unsharded(getattr(model, "_orig_mod", model), gather=False)
    return CurvatureGraph(build_steps(model, record(model)))


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
