"""The penalty in a few operations: against composed operations, and its Triton kernels against the references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.bounds import CurvatureGraph, graph, trace
from lightning_lcnn.bounds.rules.pieces import readings
from lightning_lcnn.kernels import log_rules
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm1d, SpectralLinear
from lightning_lcnn.models import resnet18, vgg11

kernels = pytest.importorskip("lightning_lcnn.kernels.triton_log_rules", exc_type=ImportError)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = SpectralLinear(6, 4, gamma=3.0), nn.Linear(6, 4)
        self.norm, self.plain = LipschitzBatchNorm1d(8, gamma=0.5), nn.BatchNorm1d(8)
        self.bare = LipschitzBatchNorm1d(8, affine=False, gamma=None)
        self.act, self.each = CenteredSoftplus(4.0), CenteredSoftplus(2.0, num_channels=8)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.left(x), self.act(self.right(x))], dim=1)
        joined = self.norm(joined) + self.each(self.plain(joined))
        return self.bare(joined * torch.sigmoid(self.each(joined)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: resnet18(width=2, low_curvature=True),
    "vgg": lambda: vgg11(width=2, low_curvature=True),
    "converted by halves": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(96, 3)
    ),
    "branches": Branches,
}


def traced(name: str) -> tuple[nn.Module, CurvatureGraph]:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    for module in network.modules():  # with equal weights the maximum is shared; one layer keeps them
        if isinstance(module, nn.Module) and getattr(module, "running_var", None) is not None and name != "vgg":
            module.running_var.uniform_(0.5, 2.0)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -2.0, 2.0)
    return network, trace(network)


def ends(graph: CurvatureGraph) -> Tensor:
    surrogate = graph.surrogate()
    return torch.stack([surrogate.log_slope, surrogate.log_curvature, surrogate.log_ratio])


@pytest.mark.parametrize("name", NETWORKS)
def test_operators_equal_composed_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, curves = traced(name)
    parameters = [p for p in network.parameters() if p.requires_grad]
    expected, shares = ends(curves), curves.surrogate().shares()
    monkeypatch.setattr(graph, "runs_operators", lambda device: True)
    found = ends(curves)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for k in range(3):
        arguments = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        wanted = torch.autograd.grad(expected[k], parameters, **arguments)
        torch.testing.assert_close(
            torch.autograd.grad(found[k], parameters, **arguments), wanted, rtol=1e-11, atol=1e-12
        )
        again = torch.autograd.grad(found[k], parameters, create_graph=True, **arguments)
        torch.testing.assert_close(again, wanted, rtol=1e-11, atol=1e-12)
    surrogate = curves.surrogate()
    torch.testing.assert_close(surrogate.shares(), shares)
    (gradient,) = torch.autograd.grad(surrogate.layer_log_slopes.sum(), parameters[0], allow_unused=True) or (None,)
    assert gradient is None or gradient.isfinite().all()


def test_both_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(3, 4), CenteredSoftplus(3.0), LipschitzBatchNorm1d(4, gamma=0.7)).double()
    curves = trace(network)
    monkeypatch.setattr(graph, "runs_operators", lambda device: True)
    names, values = zip(*network.named_parameters(), strict=True)

    def function(*values: Tensor) -> Tensor:
        for name, value in zip(names, values, strict=True):
            module = network.get_submodule(name.rpartition(".")[0])
            module._parameters[name.rpartition(".")[2]] = value
        return ends(curves)

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_equal_their_references(name: str, dtype: torch.dtype) -> None:
    network, curves = traced(name)
    network.to(dtype)
    with torch.no_grad():
        tensors, reads = readings([s.piece for s in curves._slope_leaves], [s.piece for s in curves._bend_leaves])
    reading = log_rules.Reading(reads, [tensor.numel() for tensor in tensors])
    vector = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    tables = *reading.tables(vector), reading.width
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    leaves = log_rules._leaves_reference(vector, *tables)
    torch.testing.assert_close(kernels.leaves(vector, *tables), leaves, **close)
    program = *curves._program.tables(vector), curves._program.shape
    *ends, gradients = log_rules._solve_reference(leaves, *program)
    *found, slopes = kernels.solve(leaves, *program)
    torch.testing.assert_close(found, ends, **close)
    torch.testing.assert_close(slopes, gradients, **close)
    one = vector.new_tensor(0.7)
    for grads in ((one, None, None, None), (None, one, one, None), (None, None, None, leaves.sin())):
        wanted = log_rules._leaf_gradients_reference(vector, *tables, gradients, *grads)
        torch.testing.assert_close(kernels.leaf_gradients(vector, *tables, gradients, *grads), wanted, **close)


@pytest.mark.parametrize(("shape", "groups"), [((5, 7), 1), ((6, 2, 3, 3), 3), ((1030, 4), 1)])
def test_sums_over_weights(shape: tuple[int, ...], groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    sums = log_rules.weight_sums(weight, groups)
    torch.testing.assert_close(kernels.weight_sums(weight, groups), sums)
    grad = torch.randn_like(sums)
    wanted = log_rules._sums_gradient_reference(weight, grad, groups)
    torch.testing.assert_close(kernels.weight_sums_gradient(weight, grad, groups), wanted)
    small = weight[:6, :3].contiguous().requires_grad_() if groups == 1 else weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: log_rules.weight_sums(w, groups), small)
