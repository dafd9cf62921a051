"""The differentiable surrogate of the bound against closed formulas."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.bounds import LayerBound, network_bound, register_rule, trace
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralConv2d, SpectralLinear


def chain(gains: list[float], betas: list[float]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for gain, beta in zip(gains, betas, strict=False):
        layers += [SpectralLinear(5, 5, gamma=gain), CenteredSoftplus(beta)]
    return nn.Sequential(*layers, SpectralLinear(5, 2, gamma=gains[-1]))


def test_chain_equals_the_closed_formula() -> None:
    gains, betas = [0.5, 3.0, 1.5, 0.7], [5.0, 1.0, 20.0]
    surrogate = trace(chain(gains, betas)).surrogate()
    terms = [math.log(b / 4) + sum(map(math.log, gains[: i + 1])) for i, b in enumerate(betas)]
    assert surrogate.log_ratio.item() == pytest.approx(torch.tensor(terms).logsumexp(0).item(), abs=1e-5)
    assert surrogate.log_slope.item() == pytest.approx(sum(map(math.log, gains)), abs=1e-6)
    expected = torch.tensor(terms).softmax(0)
    torch.testing.assert_close(surrogate.shares(), expected, rtol=1e-5, atol=1e-6)


def test_gradient_reaches_every_parameter_and_equals_the_shares() -> None:
    net = chain([0.5, 3.0, 1.5, 0.7], [5.0, 1.0, 20.0])
    surrogate = trace(net).surrogate()
    surrogate.log_ratio.backward()
    gradients = torch.cat([m.log_beta.grad for m in net if isinstance(m, CenteredSoftplus)])
    torch.testing.assert_close(gradients, surrogate.shares())
    later = gradients.flip(0).cumsum(0).flip(0)  # γ_j scales every later activation
    torch.testing.assert_close(torch.cat([net[2 * i].log_gamma.grad for i in range(3)]), later)


def test_deep_chain_does_not_overflow() -> None:
    net = chain([1e3] * 40, [1e4] * 39)
    assert torch.isfinite(trace(net).surrogate().log_curvature)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SpectralConv2d(2, 2, 3, padding=1, gamma=2.0)
        self.norm = LipschitzBatchNorm2d(2, gamma=0.5)
        self.act = CenteredSoftplus(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


def test_residual_sum_and_shared_module_count_once_per_use() -> None:
    block = Residual()
    surrogate = trace(nn.Sequential(block, block)).surrogate()
    slope = (2.0 * 0.5 + 1) ** 2
    curvature = 1.0 * 2**2 * 2 + 1.0 * slope**2  # b L² of the first use through the second, and of the second
    assert surrogate.log_slope.exp().item() == pytest.approx(slope, rel=1e-5)
    assert surrogate.log_curvature.exp().item() == pytest.approx(curvature, rel=1e-5)
    assert len(surrogate.layers) == 2
    assert surrogate.activations == ("0.act", "0.act")


class Concatenate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = SpectralLinear(3, 4, gamma=3.0), SpectralLinear(3, 4, gamma=4.0)
        self.act = CenteredSoftplus(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.act(self.right(x))], dim=1)


def test_concatenation_is_root_sum_square() -> None:
    surrogate = trace(Concatenate()).surrogate()
    assert surrogate.log_slope.exp().item() == pytest.approx(5.0, rel=1e-5)
    assert surrogate.log_curvature.exp().item() == pytest.approx(16.0, rel=1e-5)


def test_surrogate_follows_training_and_training_mode() -> None:
    net = chain([1.0, 1.0], [4.0]).train()
    graph = trace(net)
    before = graph.surrogate().log_ratio.item()
    with torch.no_grad():
        net[1].log_beta += 1.0
    assert graph.surrogate().log_ratio.item() == pytest.approx(before + 1.0, abs=1e-5)
    assert net.training


def test_copies_and_pickles_agree_and_follow_their_own_model() -> None:
    net = chain([2.0, 1.0], [4.0])
    graph = trace(net)
    other_net, other_graph = copy.deepcopy((net, graph))
    assert pickle.loads(pickle.dumps(graph)).surrogate().log_ratio == graph.surrogate().log_ratio
    with torch.no_grad():
        other_net[1].log_beta += 1.0
    assert other_graph.surrogate().log_ratio > graph.surrogate().log_ratio


def test_plain_layers_are_bounded_from_above() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)
    )
    net.eval()
    certified, surrogate = network_bound(net, torch.zeros(1, 4, 8, 8)), trace(net).surrogate()
    assert surrogate.log_slope.exp() >= certified.slope
    assert surrogate.log_curvature.exp() >= certified.curvature


def test_kinks_count_with_their_slope_only() -> None:
    surrogate = trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).surrogate()
    assert surrogate.log_curvature.item() < -1e29
    assert surrogate.shares().numel() == 0


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.log_gain.exp())


class CustomChild(Custom):
    def forward(self, x: Tensor) -> Tensor:
        return 1 / x


def test_user_rule_is_differentiable_and_not_inherited() -> None:
    register_rule(Custom, lambda m, shape: LayerBound(m.log_gain.exp(), m.log_gain.exp() ** 2))
    custom = Custom()
    trace(nn.Sequential(custom)).surrogate().log_curvature.backward()
    assert custom.log_gain.grad.item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"module '1'.*division by an activation"):
        trace(nn.Sequential(nn.Identity(), CustomChild()))
