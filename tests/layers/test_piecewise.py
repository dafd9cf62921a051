"""PiecewiseSoftplus: the smooth ReLU6, LeakyReLU and Hardtanh."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lcnn.bounds import network_bound, trace
from lightning_lcnn.layers import PiecewiseSoftplus, log_betas

CASES = [
    (nn.ReLU6(), {"kinks": (0.0, 6.0), "changes": (1.0, -1.0)}, 1.0, 1.0),
    (nn.LeakyReLU(0.1), {"kinks": (0.0,), "changes": (0.9,), "slope": 0.1}, 1.0, 0.9),
    (nn.LeakyReLU(3.0), {"kinks": (0.0,), "changes": (-2.0,), "slope": 3.0}, 3.0, 2.0),
    (nn.Hardtanh(-2, 1), {"kinks": (-2.0, 1.0), "changes": (1.0, -1.0), "offset": -2.0}, 1.0, 1.0),
    (nn.Hardsigmoid(), {"kinks": (-3.0, 3.0), "changes": (1 / 6, -1 / 6)}, 1 / 6, 1 / 6),
]


@pytest.mark.parametrize(("stock", "arguments", "slope", "change"), CASES)
def test_limit_and_derivatives(stock, arguments, slope, change):
    x = torch.linspace(-10, 10, 20001, dtype=torch.float64, requires_grad=True)
    for beta in (0.5, 5.0, 1e4):
        layer = PiecewiseSoftplus(**arguments, beta=beta).double()
        # every term is off by at most log(2) / β: the softplus lies log(2) / β below ReLU on the left of its kink
        error = (layer(x) - stock(x)).abs().max()
        assert error <= sum(map(abs, arguments["changes"])) * 0.6932 / beta
        (first,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert layer.slope_bound() == pytest.approx(slope)
        assert first.abs().max() <= slope + 1e-12
        assert layer.curvature_bound().item() == pytest.approx(change * beta / 4, rel=1e-6)
        assert second.abs().max() <= change * beta / 4 * (1 + 1e-6)


def test_bounds_know_it_and_penalties_reach_its_beta():
    net = nn.Sequential(nn.Linear(2, 2), PiecewiseSoftplus((0.0, 6.0), (1.0, -1.0), beta=4.0), nn.Linear(2, 1))
    for layer in (net[0], net[2]):
        nn.init.eye_(layer.weight)
    bound = network_bound(net.eval(), torch.zeros(1, 2))
    assert bound.slope == pytest.approx(1.0, rel=1e-3)
    assert 0 < bound.curvature <= 1.0 * (1 + 1e-3)  # β/4
    assert list(log_betas(net)) == ["1.softplus.log_beta"]
    trace(net).surrogate().log_curvature.backward()
    assert net[1].softplus.log_beta.grad.abs() > 0


def test_contract():
    layer = PiecewiseSoftplus((0.0, 6.0), (1.0, -1.0), beta=3.0)
    x = torch.randn(4, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert list(layer.state_dict()) == ["softplus.log_beta"]
    assert "kinks=(0.0, 6.0)" in repr(layer)
    assert not list(PiecewiseSoftplus((0.0,), (1.0,), learnable=False).parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "`changes` must have one entry for each kink"),
        (((0.0,), (1.0, 2.0)), "`changes` must have one entry for each kink"),
        (((1.0, 0.0), (1.0, 2.0)), "`kinks` must be in ascending order"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseSoftplus(*arguments)
