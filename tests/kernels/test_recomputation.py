"""Batch norm and activation computed again in backward: equal gradients, and only a convolution's output is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lightning_lcnn.functional import recompute_activations
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm1d, LipschitzBatchNorm2d, SpectralConv2d
from lightning_lcnn.models import resnet18
from lightning_lcnn.penalties import GradientNormPenalty
from tests.lightning_helpers import COMPILER_WARNINGS


def images(n: int = 6, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def residual(inplace: bool = True) -> nn.Module:
    """ResNet-18, whose residual sums stand between batch norm and activation."""
    network = resnet18(5, 8, low_curvature=True, input_size=(16, 16))
    for module in network.modules():
        if isinstance(module, CenteredSoftplus):
            module.inplace = inplace
    return network


def chain(inplace: bool = True, norm: dict[str, Any] | None = None, **activation: Any) -> nn.Sequential:
    """Convolution, batch norm, activation, three times, and a head."""
    layers: list[nn.Module] = []
    for channels in (3, 8, 8):
        layers += [
            SpectralConv2d(channels, 8, 3, padding=1, input_size=(16, 16), gamma=2.0),
            LipschitzBatchNorm2d(8, **(norm or {"gamma": 0.7})),
            CenteredSoftplus(3.0, inplace=inplace, **activation),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def before_the_convolution() -> nn.Sequential:
    """Batch norm behind an activation, as in pre-activation networks."""
    parts = [(LipschitzBatchNorm2d(8), CenteredSoftplus(inplace=True)) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *(m for part in parts for m in part), nn.Flatten(), nn.Linear(8 * 196, 5))


def vectors() -> nn.Sequential:
    """Without images inside."""
    hidden = [nn.Linear(768, 9), LipschitzBatchNorm1d(9, gamma=0.5), CenteredSoftplus(inplace=True)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(9, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "residual, out of place": lambda: residual(inplace=False),
    "chain": chain,
    "chain, out of place": lambda: chain(inplace=False),
    "chain, fixed β": lambda: chain(learnable=False),
    "chain, β per channel": lambda: chain(num_channels=8),
    "chain, no affine weight": lambda: chain(norm={"gamma": 0.7, "affine": False}),
    "chain, no clip": lambda: chain(norm={"gamma": None}),
    "chain, no running statistics": lambda: chain(norm={"track_running_stats": False}),
    "chain, evaluation": lambda: chain().eval(),
    "before the convolution": before_the_convolution,
    "vectors": vectors,
}


def made(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return NETWORKS[name]().to(dtype)


def loss_of(network: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(network(x), torch.arange(len(x)) % 5)


def gradients(network: nn.Module, x: Tensor, again: bool) -> list[Tensor]:
    """By input and parameters, and the running statistics afterwards."""
    x = x.clone().requires_grad_()
    with recompute_activations(again):
        loss = loss_of(network, x)
    loss.backward()
    parameters = [torch.zeros(()) if p.grad is None else p.grad for p in network.parameters()]
    return [x.grad, *parameters, *network.buffers()]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("batch", [6, 40])  # torch's batch norm, and ours for many values
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_equal_to_the_last_bit(name: str, dtype: torch.dtype, batch: int) -> None:
    x = images(batch).to(dtype)
    assert_equal(gradients(made(name, dtype), x, True), gradients(made(name, dtype), x, False))


@pytest.mark.parametrize("name", ["residual", "chain, out of place"])
def test_under_autocast_and_channels_last(name: str) -> None:
    x = images().to(memory_format=torch.channels_last)
    networks = [made(name).to(memory_format=torch.channels_last) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(gradients(networks[0], x, True), gradients(networks[1], x, False))


@pytest.mark.parametrize("name", ["residual", "residual, out of place", "before the convolution"])
def test_second_derivatives(name: str) -> None:
    found = []
    for again in (False, True):
        network, x = made(name, torch.float64), images().double().requires_grad_()
        with recompute_activations(again):
            logits = network(x)
            target = torch.arange(len(x)) % 5
            penalty = GradientNormPenalty(0.5)(network, x, target, logits=logits)
        (F.cross_entropy(logits, target) + penalty).backward()
        found.append([p.grad for p in network.parameters()])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def kept(network: nn.Module, again: bool, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Names of the modules whose output's memory is still held when forward has ended."""
    outputs: dict[str, StorageWeakRef] = {}
    for name, module in network.named_modules():
        if isinstance(module, kinds):

            def hook(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = StorageWeakRef(output.untyped_storage())

            module.register_forward_hook(hook)
    with recompute_activations(again):
        loss = loss_of(network, images())
    held = [name for name, reference in outputs.items() if not reference.expired()]
    loss.backward()
    assert all(reference.expired() for reference in outputs.values())
    return held


KINDS = (CenteredSoftplus, LipschitzBatchNorm2d)


@pytest.mark.parametrize("inplace", [True, False])
def test_only_the_output_of_the_convolution_is_kept(inplace: bool) -> None:
    network = chain(inplace)
    assert len(kept(network, again=False, kinds=KINDS)) == 6
    assert kept(network, again=True, kinds=KINDS) == []
    assert len(kept(network, again=True, kinds=(SpectralConv2d,))) == 3


def test_residual_sums_are_kept_once() -> None:
    activations = {f"layer{i}.{j}.act2" for i in range(1, 5) for j in range(2)}
    assert set(kept(residual(), again=True, kinds=KINDS)) == activations  # in place: the sum is gone
    assert kept(residual(inplace=False), again=True, kinds=KINDS) == []  # the sum itself is there


def test_each_is_computed_once_for_all_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network, calls = chain(), []
    function = torch.native_batch_norm
    monkeypatch.setattr(torch, "native_batch_norm", lambda *args: calls.append(1) or function(*args))
    with recompute_activations():
        loss = loss_of(network, images(40))
    assert len(calls) == 3
    loss.backward(retain_graph=True)
    assert len(calls) == 6  # the convolution behind and the activation itself read the same
    first = [p.grad.clone() for p in network.parameters()]
    loss.backward()
    assert len(calls) == 9
    for p, gradient in zip(network.parameters(), first, strict=True):
        assert torch.equal(p.grad, 2 * gradient)


@pytest.mark.parametrize("inplace", [True, False])
def test_an_output_that_is_written_over_is_kept(inplace: bool) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0)

    found = []
    for again in (False, True):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            network = chain(inplace).insert(2, Shifted()).insert(1, Shifted())  # before and after the batch norm
        found.append(gradients(network, images(), again))
    assert_equal(*found)
    value = torch.randn(4, 3, requires_grad=True)
    with recompute_activations():
        product = CenteredSoftplus()(value * 1.0).add_(1.0) * value
    expected = torch.autograd.grad(((CenteredSoftplus()(value) + 1.0) * value).sum(), value)
    torch.testing.assert_close(torch.autograd.grad(product.sum(), value), expected)


def test_a_source_that_is_written_over_raises() -> None:
    conv, rest = nn.Conv2d(3, 8, 3), nn.Sequential(LipschitzBatchNorm2d(8), CenteredSoftplus(inplace=True))
    with recompute_activations():
        hidden = conv(images())
        loss = rest(hidden).square().sum()
    with torch.no_grad():
        hidden.zero_()
    with pytest.raises(RuntimeError, match=r"shape \(6, 8, 14, 14\) that backward needs was written over"):
        loss.backward()


def test_any_other_tensor_that_is_written_over_raises_too() -> None:
    x = torch.ones(3, requires_grad=True)
    with recompute_activations():
        y = x.exp()
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="written over"):
        y.sum().backward()


def test_nested_ended_by_an_error_and_without_gradients() -> None:
    x = images()
    expected = gradients(made("chain"), x, False)
    with recompute_activations():
        assert_equal(gradients(made("chain"), x, True), expected)  # inner one ends first
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                made("chain")(x)
                made("chain, out of place")(x)
        assert_equal(gradients(made("chain"), x, False), expected)
    with pytest.raises(ValueError, match="4-dimensional"), recompute_activations():
        LipschitzBatchNorm2d(3)(torch.ones(2, 3))
    assert len(kept(chain(), again=False, kinds=KINDS)) == 6  # nothing of it is in effect any more


def test_beside_checkpoints_and_transforms() -> None:
    x, target = images(), torch.arange(6) % 5
    expected = gradients(made("chain"), x, False)[1:]
    network = made("chain")
    with recompute_activations():
        loss = F.cross_entropy(network[5:](checkpoint(network[:5], x, use_reentrant=False)), target)
    loss.backward()
    assert_equal([p.grad for p in network.parameters()], expected[: len(list(network.parameters()))])

    def inside(x: Tensor) -> Tensor:
        with recompute_activations():
            return loss_of(network.eval(), x)

    with pytest.raises(RuntimeError, match="saved tensor hooks"):  # torch's own limit, and loud
        torch.func.grad(inside)(x)
    assert len(kept(chain(), again=False, kinds=KINDS)) == 6


@COMPILER_WARNINGS
def test_compiled_network_is_left_to_the_compiler() -> None:
    x, network = images(), made("chain")
    expected = gradients(made("chain"), x, False)
    compiled = torch.compile(network, backend="aot_eager")
    got = gradients(compiled, x, True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
