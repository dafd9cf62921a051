"""The gradient by a layer's input has a derivative of our own, which penalties on the input gradient differentiate.

A gradient by all tensors at once, as gradgradcheck takes it, goes another way; these tests ask for the input's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lcnn.functional import centered_softplus
from lightning_lcnn.layers import LipschitzBatchNorm1d, LipschitzBatchNorm2d, SpectralConv1d, SpectralConv2d


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def input_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(v, x, parameters) to the gradient of ⟨v, function(x, parameters)⟩ by x."""

    def gradient(v: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        x = x * 1.0  # in-place functions take no leaf
        return torch.autograd.grad(function(x, *parameters), x, v, create_graph=True)[0]

    return gradient


def of_layer(layer: nn.Module) -> Callable[..., Tensor]:
    """A layer as a function of input and parameters; the attributes are the tensors that gradcheck moves."""

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    names = [name for name, _ in layer.named_parameters()]
    return function


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "batch norm": (LipschitzBatchNorm2d(2, gamma=50.0), (3, 2, 2, 2)),
    "clipped batch norm": (LipschitzBatchNorm2d(2, gamma=None), (3, 2, 2, 2)),
    "batch norm of vectors": (LipschitzBatchNorm1d(3, gamma=None), (5, 3)),
    "convolution": (SpectralConv2d(2, 3, 3, padding=1, input_size=(4, 4)), (2, 2, 4, 4)),
    "strided, grouped, gained": (
        SpectralConv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, gamma=2.0, input_size=(5, 4)),
        (2, 4, 5, 4),
    ),
    "dilated, few inputs": (SpectralConv1d(2, 6, 5, dilation=2, bias=False, input_size=(9,)), (1, 2, 9)),
}


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    layer, shape = LAYERS[request.param]
    layer = layer.double().train()
    with torch.no_grad():
        for i, (name, p) in enumerate(layer.named_parameters()):
            if name in ("weight", "bias") and p.ndim == 1:
                p.copy_(random(*p.shape, seed=10 + i))
    x = random(*shape, seed=1).requires_grad_()
    v = random(*layer(x).shape, seed=2).requires_grad_()
    parameters = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    return of_layer(layer), (v, x, *parameters)


def test_derivative_of_the_input_gradient(case: Any) -> None:
    function, inputs = case
    assert torch.autograd.gradcheck(input_gradient(function), inputs)


def test_second_derivative_of_the_input_gradient(case: Any) -> None:
    function, inputs = case
    if inputs[2].ndim == 1:  # batch norm, of which torch has no third derivative
        with pytest.raises(RuntimeError, match="batch_norm does not support 3rd"):
            torch.autograd.gradgradcheck(input_gradient(function), inputs)
    else:
        assert torch.autograd.gradgradcheck(input_gradient(function), inputs)


@pytest.mark.parametrize("inplace", [True, False])
def test_activation(inplace: bool) -> None:
    def function(x: Tensor, beta: Tensor) -> Tensor:
        return centered_softplus(x, beta, inplace=inplace)

    beta = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inputs = random(4, 5, seed=1).requires_grad_(), random(4, 5, seed=2).requires_grad_(), beta
    assert torch.autograd.gradcheck(input_gradient(function), inputs)
    assert torch.autograd.gradgradcheck(input_gradient(function), inputs)


class Masks(TorchDispatchMode):
    """Which gradients convolutions and batch norms are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_backward" in func.name():
            self.seen.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradients_that_nobody_wants_are_not_computed(create_graph: bool) -> None:
    layer = SpectralConv2d(2, 3, 3, padding=1, input_size=(4, 4))
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    value = layer(x).sum()
    with Masks() as masks:
        torch.autograd.grad(value, x, create_graph=create_graph, retain_graph=True)
    assert masks.seen == [[True, False, False]]
    for wanted in ([x, layer.weight], [layer.weight]):
        with Masks() as masks:
            torch.autograd.grad(value, wanted, create_graph=create_graph, retain_graph=True)
        assert masks.seen == [[len(wanted) == 2, True, False]]
    with Masks() as masks:
        value.backward()
    assert masks.seen == [[True, True, False]]
