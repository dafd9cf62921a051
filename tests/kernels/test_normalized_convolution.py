"""Eager convolution divided by its norm: against composed operations; what it keeps; copies; graphs kept alive."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from lightning_lcnn.layers import SpectralConv2d
from lightning_lcnn.layers import spectral as spectral_conv

SIZES = [(8, 16, 10), (32, 64, 4)]  # channels in and out, input size: the weight is scaled, the output is scaled


def gradients(layer: SpectralConv2d, x: Tensor) -> list[Tensor]:
    """Output, gradients of both orders."""
    x = x.clone().requires_grad_()
    value = layer(x)
    first = torch.autograd.grad(value.pow(3).sum(), [x, *layer.parameters()], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *layer.parameters()])
    return [value, *first, *second]


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_composed_operations(size, bias, gamma, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SpectralConv2d(*size[:2], 3, stride=2, padding=1, bias=bias, gamma=gamma, input_size=size[2:] * 2).double()
    x = torch.randn(2, size[0], size[2], size[2], dtype=torch.float64)
    assert (x.numel() < layer.weight.numel()) == (size == SIZES[1])
    got = gradients(layer, x)
    monkeypatch.setattr(spectral_conv, "on_plain_cpu", lambda *_: False)
    for a, b in zip(got, gradients(layer, x), strict=True):
        torch.testing.assert_close(a, b)


def test_keeps_the_weight_and_the_input_only() -> None:
    saved: list[Tensor] = []
    layer = SpectralConv2d(4, 4, 3, input_size=(8, 8))
    x = torch.randn(2, 4, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), layer.weight.data_ptr()}


def test_refresh_after_forward_changes_no_graph_that_is_alive() -> None:
    layer = SpectralConv2d(4, 4, 3, input_size=(8, 8))
    x = torch.randn(2, 4, 8, 8)
    losses = [layer(x).pow(3).sum() for _ in range(2)]
    expected = torch.autograd.grad(losses[0], layer.weight)
    with torch.no_grad():
        layer.spectral_gradient.mul_(1.0)  # as the buffer broadcast of DDP
    before = layer.spectral_gradient.clone()
    layer.right_vector.copy_(torch.randn_like(layer.right_vector))
    layer.update_spectral_norm()
    assert not torch.equal(layer.spectral_gradient, before)
    assert torch.equal(torch.autograd.grad(losses[1], layer.weight)[0], expected[0])


def test_copies_and_pickles_while_a_graph_is_alive() -> None:
    layer = SpectralConv2d(4, 4, 3, input_size=(8, 8))
    x = torch.randn(2, 4, 8, 8)
    value = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), value)
        other.update_spectral_norm()
    value.sum().backward()
