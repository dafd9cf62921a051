"""The composition rules against the same rules on slopes and curvatures themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_lcnn.bounds.graph import _ZERO, Leaf, Node, Recursion

LAYERS = [Node((0,), slope=Leaf(0)), Node((1,), bend=Leaf(0)), Node((2,), slope=Leaf(1))]
GRAPHS = {
    "chain": [Node(()), *LAYERS, Node((3,), slope=0.3, bend=Leaf(1))],
    "residual": [Node(()), *LAYERS, Node((1, 3), "sum"), Node((4,), slope=Leaf(1), bend=Leaf(1)), Node((5,))],
    "input joined": [Node(()), *LAYERS, Node((0, 3), "sum"), Node((4,), slope=Leaf(0), bend=Leaf(1))],
    "concatenation": [Node(()), *LAYERS, Node((1, 2, 3), "concat", offsets=(0.5, 0.0, -1.0)), Node((4,), bend=Leaf(1))],
    "product": [Node(()), *LAYERS, Node((1, 3), "product"), Node((4,), slope=Leaf(1), bend=Leaf(1))],
    "nested": [
        Node(()),
        *LAYERS,
        Node((1, 3), "sum"),
        Node((4,), slope=Leaf(1), bend=Leaf(1)),
        Node((3, 4, 5), "sum", offsets=(0.0, 0.2, 0.0)),
        Node((6, 5), "product"),
        Node((7, 1), "concat"),
    ],
    "no curvature": [Node(()), Node((0,), slope=Leaf(0)), Node((1,), slope=Leaf(1))],
}


def by_hand(nodes: list[Node], slopes: Tensor, bends: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and curvature of the last step, no logarithms inside."""

    def number(value: float | Leaf | None, leaves: Tensor) -> Tensor:
        if value is None:
            return leaves.new_zeros(())
        return leaves[value.index].exp() if isinstance(value, Leaf) else leaves.new_tensor(math.exp(value))

    slope, bend = [slopes.new_ones(())], [slopes.new_zeros(())]
    for node in nodes[1:]:
        factors = [math.exp(o) for o in node.offsets or [0.0] * len(node.inputs)]
        ls = [f * slope[i] for f, i in zip(factors, node.inputs, strict=True)]
        bs = [f * bend[i] for f, i in zip(factors, node.inputs, strict=True)]
        if not node.join:
            own = number(node.slope, slopes)
            slope.append(own * ls[0])
            bend.append(own * bs[0] + number(node.bend, bends) * ls[0] ** 2)
        elif node.join == "concat":
            slope.append(sum(v**2 for v in ls) ** 0.5)
            bend.append(sum(v**2 for v in bs) ** 0.5)
        else:
            slope.append(sum(ls))
            bend.append(sum(bs) + (2 * slope[node.inputs[0]] * slope[node.inputs[1]] if node.join == "product" else 0))
    return slope[-1].log(), bend[-1].log()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    numbers = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return numbers[:2].clone().requires_grad_(), numbers[2:].clone().requires_grad_()


def with_zeros(zeros: dict[int, float]) -> tuple[Tensor, Tensor]:
    """The inputs with other numbers at some positions: 0 and 1 are slopes, 2 and 3 curvatures."""
    numbers = torch.cat(inputs()).detach()
    for position, number in zeros.items():
        numbers[position] = number
    return numbers[:2].clone().requires_grad_(), numbers[2:].clone().requires_grad_()


def forward_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            columns = [function(forward_ad.make_dual(x, direction)) for direction in torch.eye(len(x)).to(x)]
            return torch.stack([forward_ad.unpack_dual(column).tangent for column in columns])

    return gradient


def compiled_gradient(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(torch.compile(function, backend="aot_eager", fullgraph=True)(x), x)[0]

    return gradient


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_value_and_gradients_by_hand(graph: str, compress: bool) -> None:
    recursion, arguments = Recursion(GRAPHS[graph], 2, compress), inputs()
    expected = by_hand(GRAPHS[graph], *arguments)
    pieces = recursion.contributions(*arguments)
    composed = recursion.run(*pieces)
    for k, value in enumerate(recursion.totals(*pieces)):
        if graph == "no curvature" and k == 1:
            assert value < -1e29
            continue
        torch.testing.assert_close(value, expected[k])
        torch.testing.assert_close(composed[k][-1], expected[k])
        wanted = torch.autograd.grad(expected[k], arguments, retain_graph=True, materialize_grads=True)
        for form in (value, composed[k][-1]):
            found = torch.autograd.grad(form, arguments, retain_graph=True, materialize_grads=True)
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("graph", [name for name in GRAPHS if name != "no curvature"])
def test_both_derivatives(graph: str) -> None:
    recursion = Recursion(GRAPHS[graph], 2)

    def function(slopes: Tensor, bends: Tensor) -> tuple[Tensor, Tensor]:
        return recursion.totals(*recursion.contributions(slopes, bends))

    assert torch.autograd.gradcheck(function, inputs())
    assert torch.autograd.gradgradcheck(function, inputs())


DEAD = math.log(torch.finfo(torch.float64).tiny)  # a layer whose slope is the smallest normal number
ZEROS = [{}, {0: DEAD}, {1: DEAD}, {2: _ZERO}, {3: _ZERO}, {0: DEAD, 1: DEAD, 2: _ZERO}, {0: _ZERO, 1: _ZERO}]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_values_and_gradients_at_zero_are_finite(graph: str, zeros: dict[int, float]) -> None:
    recursion, arguments = Recursion(GRAPHS[graph], 2), with_zeros(zeros)
    for value in recursion.totals(*recursion.contributions(*arguments)):
        assert value.isfinite()
        if value.requires_grad:  # not the curvature of a network that has none
            gradients = torch.autograd.grad(value, arguments, retain_graph=True, materialize_grads=True)
            assert torch.cat(gradients).isfinite().all()


@pytest.mark.parametrize("transform", [torch.func.grad, forward_gradient, compiled_gradient])
def test_under_transforms(transform: Callable[..., Any]) -> None:
    recursion, (slopes, bends) = Recursion(GRAPHS["nested"], 2), inputs()

    def function(slopes: Tensor) -> Tensor:
        return recursion.totals(*recursion.contributions(slopes, bends.detach()))[1]

    expected = torch.autograd.grad(function(slopes), slopes)[0]
    torch.testing.assert_close(transform(function)(slopes.detach()), expected)


@pytest.mark.parametrize("number", [-math.inf, math.nan])
def test_numbers_that_are_not_finite_stay_visible(number: float) -> None:
    recursion = Recursion(GRAPHS["residual"], 2)
    slopes = torch.tensor([number, 0.0])
    bends = torch.zeros(2)
    slope, curvature = recursion.totals(*recursion.contributions(slopes, bends))
    assert slope.isnan()  # 0 times infinity, in the steps that the layer is no part of
    assert curvature.isnan()
