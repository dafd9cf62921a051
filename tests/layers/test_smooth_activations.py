"""Smooth counterparts of kinked activations, and smooth activations with a β."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.layers import (
    LearnableBeta,
    ScaledActivation,
    SmoothELU,
    SmoothHardswish,
    SmoothPReLU,
    lcnn_parameter_groups,
    log_betas,
)

SELU = {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}
# smooth form by β, what it tends to, and sup |difference| times β, which scaling makes a constant for large β
LIMITS: dict[str, tuple[Callable[[float], nn.Module], nn.Module, float]] = {
    "PReLU": (lambda beta: SmoothPReLU(init=0.25, beta=beta), nn.PReLU(init=0.25), 0.75 * math.log(2)),
    "SELU": (lambda beta: SmoothELU(**SELU, beta=beta), nn.SELU(), 0.7074 * math.log(2)),
    "ELU": (lambda beta: SmoothELU(alpha=0.3, beta=beta), nn.ELU(0.3), 0.7 * math.log(2)),
    # at ±3 the gate is off by log(2) / (6 β), times 3
    "Hardswish": (lambda beta: SmoothHardswish(beta), nn.Hardswish(), math.log(2) / 2),
    "SiLU": (lambda beta: ScaledActivation(nn.SiLU(), beta), nn.ReLU(), 0.27846),  # min of SiLU
    "GELU": (lambda beta: ScaledActivation(nn.GELU(), beta), nn.ReLU(), 0.16998),
}
LINE = torch.linspace(-12, 12, 48_001, dtype=torch.float64)  # has -3, 0 and 3
SMOOTH = [ScaledActivation, SmoothELU, SmoothHardswish, SmoothPReLU]


def distance(smooth: nn.Module, limit: nn.Module) -> float:
    with torch.no_grad():
        return float((smooth.double()(LINE) - limit.double()(LINE)).abs().max())


@pytest.mark.parametrize("name", LIMITS)
def test_tends_to_its_original_like_one_over_beta(name: str) -> None:
    make, limit, constant = LIMITS[name]
    for beta in (100.0, 300.0):
        # a hundredth: distance of the grid's points, and the curvature of the pieces themselves
        assert distance(make(beta), limit) * beta == pytest.approx(constant, rel=1e-2)


@pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.ELU(), nn.Softplus()], ids=str
)
def test_a_scaled_activation_is_the_activation_at_one(activation: nn.Module) -> None:
    x = torch.randn(1000) * 5
    assert torch.equal(ScaledActivation(activation)(x), activation(x))


def test_scaling_multiplies_the_curvature_and_keeps_the_slope() -> None:
    def extremes(beta: float) -> tuple[float, float]:
        x = LINE.clone().requires_grad_()
        (first,) = torch.autograd.grad(ScaledActivation(nn.Mish(), beta).double()(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        return float(first.detach().abs().max()), float(second.abs().max())

    slope, curvature = extremes(1.0)
    assert extremes(4.0) == pytest.approx((slope, 4 * curvature), rel=1e-4)  # the grid's points


@pytest.mark.parametrize("make", SMOOTH, ids=lambda make: make.__name__)
def test_first_and_second_derivatives_in_input_and_parameters(make: Callable[..., nn.Module]) -> None:
    module = (make(nn.GELU(), 1.3) if make is ScaledActivation else make(beta=1.3)).double()
    names, parameters = zip(*module.named_parameters(), strict=True)
    x = torch.tensor([-3.4, -1.1, -0.2, 0.3, 2.0, 4.5], dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_beta_is_found_and_not_decayed() -> None:
    net = nn.Sequential(nn.Linear(2, 2), ScaledActivation(nn.SiLU()), SmoothHardswish(), SmoothPReLU(), SmoothELU())
    assert list(log_betas(net)) == [
        "1.log_beta",
        "2.gate.softplus.log_beta",
        "3.softplus.log_beta",
        "4.softplus.log_beta",
    ]
    exempt = lcnn_parameter_groups(net, weight_decay=0.1)[1]
    assert exempt["weight_decay"] == 0
    assert {id(p) for p in exempt["params"]} == {id(p) for p in log_betas(net).values()}


def test_a_fixed_beta_is_a_buffer() -> None:
    module = ScaledActivation(nn.SiLU(), 0.5, learnable=False)
    assert not module.learnable
    assert list(module.parameters()) == []
    assert isinstance(module, LearnableBeta)
    assert "log_beta" in module.state_dict()


def test_prelu_per_channel_takes_its_weight_by_name() -> None:
    original = nn.PReLU(3)
    nn.init.uniform_(original.weight, -0.5, 1.5)
    smooth = SmoothPReLU(3, beta=1e6)
    smooth.load_state_dict(original.state_dict(), strict=False)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(smooth(x), original(x), atol=2e-6, rtol=0)  # 1.5 log(2) / 1e6


@pytest.mark.parametrize("make", SMOOTH, ids=lambda make: make.__name__)
@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_beta(make: Callable[..., nn.Module], beta: float) -> None:
    with pytest.raises(ValueError, match="`beta` must be"):
        make(nn.SiLU(), beta) if make is ScaledActivation else make(beta=beta)


def test_bad_scale() -> None:
    with pytest.raises(ValueError, match="`scale` must be"):
        SmoothELU(scale=-1.0)
