"""Bounds of layer, group, instance and RMS norm, and of products in the surrogate, against dense derivatives."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.bounds import network_bound, trace
from lightning_lcnn.conversion import to_low_curvature
from lightning_lcnn.penalties import CurvaturePenalty

# layer, shape of one input, number n of entries that share statistics
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "layer norm": (lambda: nn.LayerNorm(6, eps=0.1), (6,), 6),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((2, 3), eps=0.1), (4, 2, 3), 6),
    "layer norm without weight": (lambda: nn.LayerNorm(5, eps=1e-3, elementwise_affine=False), (2, 5), 5),
    "RMS norm": (lambda: nn.RMSNorm(4, eps=0.02), (3, 4), 4),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.05), (4, 3), 6),
    "instance norm": (lambda: nn.InstanceNorm1d(3, eps=0.05, affine=True), (3, 4), 4),
}


class Called(nn.Module):
    """The same through functions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if isinstance(norm, nn.RMSNorm):
            return F.rms_norm(x, norm.normalized_shape, weight=norm.weight, eps=norm.eps)
        if isinstance(norm, nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, norm.weight, eps=norm.eps)
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)


def made(name: str) -> nn.Module:
    norm = NORMS[name][0]().double().eval()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -2.0, 2.0)
    return norm.requires_grad_(False)


def largest_weight(norm: nn.Module) -> float:
    return 1.0 if norm.weight is None else float(norm.weight.detach().abs().max())


def second_derivative(norm: nn.Module, x: Tensor, u: Tensor, scale: float) -> float:
    """‖D²f(x)[u, u]‖ by central differences; forward over forward mode is wrong for torch's layer norm."""
    h = 1e-3 * scale  # truncation 1e-6, rounding 1e-10 of the value
    before, here, after = (norm((x + t * u)[None])[0] for t in (-h, 0.0, h))
    return float(torch.linalg.vector_norm(after - 2 * here + before)) / h**2


def within_a_group(shape: tuple[int, ...]) -> Tensor:
    """A unit vector within one group, without mean."""
    flat = torch.zeros(math.prod(shape), dtype=torch.float64)
    flat[0], flat[1] = 1.0, -1.0
    return (flat / math.sqrt(2)).view(shape)


@pytest.mark.parametrize("name", NORMS)
def test_bounds_hold_and_are_attained_without_weight(name: str) -> None:
    _, shape, n = NORMS[name]
    norm = made(name)
    x = torch.randn(1, *shape, dtype=torch.float64)
    net = nn.Sequential(norm).eval()
    bound = network_bound(net, x)
    eps, weight = norm.eps, largest_weight(norm)
    assert bound.slope == pytest.approx(weight / math.sqrt(eps), rel=1e-5)
    assert network_bound(net, x, "tight").slope <= bound.slope
    for _ in range(60):
        point = torch.randn(shape, dtype=torch.float64) * math.sqrt(eps) * 2 * torch.rand(())
        jacobian = torch.autograd.functional.jacobian(lambda v: norm(v[None])[0].flatten(), point)
        assert torch.linalg.matrix_norm(jacobian.flatten(1), 2) <= bound.slope
        u = F.normalize(torch.randn(math.prod(shape), dtype=torch.float64), dim=0).view(shape)
        assert second_derivative(norm, point, u, math.sqrt(eps)) <= bound.curvature
    if norm.weight is not None:
        nn.init.ones_(norm.weight)
    if hasattr(norm, "bias") and norm.bias is not None:
        nn.init.zeros_(norm.bias)
    plain = network_bound(net, x)
    u = within_a_group(shape)
    jacobian = torch.autograd.functional.jacobian(lambda v: norm(v[None])[0].flatten(), 0 * u)
    assert torch.linalg.matrix_norm(jacobian.flatten(1), 2) == pytest.approx(plain.slope, rel=1e-5)
    attained = second_derivative(norm, u * math.sqrt(n * eps) / 2, u, math.sqrt(eps))
    assert attained == pytest.approx(plain.curvature, rel=1e-4)  # rounding of the constant


@pytest.mark.parametrize("name", [name for name in NORMS if name != "instance norm"])
def test_functions_have_the_bounds_of_the_modules(name: str) -> None:
    norm = made(name)
    x = torch.randn(1, *NORMS[name][1], dtype=torch.float64)
    for method in ("fast", "tight"):
        module, function = network_bound(norm, x, method), network_bound(Called(norm).eval(), x, method)
        expected = (module.slope, module.curvature)
        assert (function.slope, function.curvature) == pytest.approx(expected, rel=1e-12)


def test_functional_batch_norm_is_the_module() -> None:
    norm = nn.BatchNorm2d(3).eval()
    nn.init.uniform_(norm.running_var, 0.2, 3.0)
    nn.init.uniform_(norm.weight, -2.0, 2.0)
    net, called = (nn.Sequential(nn.Conv2d(2, 3, 3), n).eval() for n in (norm, Called(norm)))
    called[0].load_state_dict(net[0].state_dict())
    x = torch.randn(1, 2, 6, 6)
    assert network_bound(called, x).slope == pytest.approx(network_bound(net, x).slope, rel=1e-12)
    values = [trace(n).surrogate().log_slope for n in (net, called)]
    torch.testing.assert_close(*values)
    values[1].backward()
    assert norm.weight.grad.isfinite().all()


def test_instance_norm_with_running_statistics_is_a_scaling() -> None:
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    nn.init.constant_(norm.running_var, 4.0)
    bound = network_bound(nn.Sequential(norm).eval(), torch.randn(1, 2, 3, 3))
    assert bound.curvature == 0
    assert bound.slope == pytest.approx(0.5, rel=1e-4)  # 1 / √(4 + ε)


def test_the_surrogate_takes_inputs_of_variance_one() -> None:
    norm = nn.LayerNorm(16)
    nn.init.constant_(norm.weight, 3.0)
    surrogate = trace(nn.Sequential(norm)).surrogate()
    assert surrogate.log_slope.exp().item() == pytest.approx(3.0)
    assert surrogate.log_curvature.exp().item() == pytest.approx(3.0 * 2 / math.sqrt(3) / 4)
    x = torch.randn(16, dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0)
    norm = copy.deepcopy(norm).double().requires_grad_(False)
    directions = F.normalize(torch.randn(200, 16, dtype=torch.float64) + 0.5 * x, dim=1)
    largest = max(second_derivative(norm, x, u, 1.0) for u in directions)
    limit = surrogate.log_curvature.exp().item()
    assert 0.7 * limit <= largest <= limit * (1 + 1e-4)  # ε


def test_graphs_with_norms_are_copied_and_pickled() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), Called(nn.GroupNorm(2, 4)), nn.Linear(4, 2)).eval()
    graph = trace(net)
    expected = graph.surrogate().log_curvature
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(other.surrogate().log_curvature, expected)


class Gate(nn.Module):
    """first(x) · sigmoid(second(x)), with scalar layers of given slopes."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.first.weight, first)
        nn.init.constant_(self.second.weight, second)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * torch.sigmoid(self.second(x))


def test_products_count_in_the_surrogate_as_if_factors_were_at_most_one() -> None:
    surrogate = trace(Gate(2.0, 3.0)).surrogate()
    gate_slope, gate_bend = 3.0 / 4, 9.0 * 0.0962250448650
    assert surrogate.log_slope.exp().item() == pytest.approx(2.0 + gate_slope)
    assert surrogate.log_curvature.exp().item() == pytest.approx(gate_bend + 2 * 2.0 * gate_slope, rel=1e-6)
    x = torch.linspace(-0.5, 0.5, 101, dtype=torch.float64, requires_grad=True)  # where |first(x)| <= 1
    y = Gate(2.0, 3.0).double()(x[:, None])[:, 0]
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert slope.abs().max() <= surrogate.log_slope.exp()
    assert bend.abs().max() <= surrogate.log_curvature.exp()
    with pytest.raises(ValueError, match="`mul` in the forward of the model: the product of two activations"):
        network_bound(Gate(2.0, 3.0).eval(), torch.ones(1, 1))


class SqueezeExcitation(nn.Module):
    """Convolution, ReLU and a gate from the mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.squeeze, self.excite = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        gate = torch.sigmoid(self.excite(self.act(self.squeeze(x.mean((2, 3))))))
        return (x * gate[:, :, None, None]).mean((2, 3))


def test_the_penalty_reaches_every_beta_and_gain_around_a_gate() -> None:
    net = to_low_curvature(SqueezeExcitation(), torch.randn(2, 3, 8, 8), separate_activations=True, return_report=False)
    CurvaturePenalty(weight=1.0)(net).backward()
    trained = {name: p for name, p in net.named_parameters() if name.endswith(("log_beta", "log_gamma"))}
    assert len(trained) == 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_a_module_called_on_constants_is_a_constant() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes, self.project = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x + self.project(self.codes))

    assert network_bound(Positions().eval(), torch.zeros(2, 3)).slope == pytest.approx(1.0, rel=1e-5)
