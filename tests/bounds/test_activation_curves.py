"""Derivative ranges of the activations against the derivatives themselves on a dense grid."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.bounds.rules.activations import CURVES, Curve, curve_of
from lightning_lcnn.layers import (
    CenteredSoftplus,
    PiecewiseSoftplus,
    ScaledActivation,
    SmoothELU,
    SmoothHardswish,
    SmoothPReLU,
)

SMOOTH = [
    nn.Tanh(),
    nn.Sigmoid(),
    nn.LogSigmoid(),
    nn.Softplus(),
    nn.Softplus(beta=7.0, threshold=30.0),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.Mish(),
    nn.ELU(),
    nn.CELU(0.3),
    nn.CELU(2.0),
    nn.Softsign(),
    nn.Tanhshrink(),
    CenteredSoftplus(3.0),
    PiecewiseSoftplus(kinks=(0.0, 6.0), changes=(1.0, -1.0), beta=20.0),
    PiecewiseSoftplus(kinks=(0.0,), changes=(0.99,), slope=0.01, beta=4.0),
    ScaledActivation(nn.SiLU(), beta=3.0),
    ScaledActivation(nn.GELU(), beta=0.2),
    SmoothPReLU(init=0.25, beta=6.0),
    SmoothPReLU(init=1.5, beta=6.0),
    SmoothPReLU(init=-0.5, beta=2.0),
]
# ranges that hold for every β without being attained: the share of the wider end that the derivatives reach
SELU = {"alpha": 1.6732632, "scale": 1.0507010}
LOOSE = [
    *((SmoothHardswish(beta), 0.7) for beta in (0.5, 2.0, 5.0, 50.0)),
    *((SmoothELU(**SELU, beta=beta), 0.5) for beta in (0.5, 1.0, 5.0, 50.0)),
    *((SmoothELU(alpha=alpha, beta=beta), 0.5) for alpha in (0.3, 2.0, -0.5) for beta in (0.5, 5.0)),
]
KINKED = [
    nn.ReLU(),
    nn.LeakyReLU(0.1),
    nn.LeakyReLU(-0.5),
    nn.LeakyReLU(1.7),
    nn.RReLU().eval(),
    nn.Hardtanh(),
    nn.ReLU6(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Softshrink(),
    nn.PReLU(3, init=0.3),
    nn.SELU(),
    nn.ELU(0.5),
    nn.ELU(2.0),
]


def curve(module: nn.Module) -> Curve:
    return curve_of(module, CURVES[type(module)])


def derivatives(module: nn.Module) -> tuple[Tensor, Tensor]:
    """First and second derivative on a grid that is denser near 0, where all of them turn."""
    line = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    x = torch.cat([line * 8, line[::10] * 60]).requires_grad_()
    y = (
        module.double()(x[:, None].expand(-1, 3)).sum() / 3
        if isinstance(module, nn.PReLU)
        else module.double()(x).sum()
    )
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    curved = first.requires_grad and not isinstance(module, nn.Hardsigmoid)  # torch has no second derivative of it
    second = torch.autograd.grad(first.sum(), x)[0] if curved else torch.zeros_like(x)
    return first.detach(), second


@pytest.mark.parametrize("module", SMOOTH, ids=str)
def test_smooth_ranges_hold_and_are_attained(module: nn.Module) -> None:
    with torch.no_grad():
        ranges = curve(module.double())
    assert not ranges.reason
    for values, (low, high) in zip(derivatives(module), (ranges.slope, ranges.bend), strict=True):
        # 1e-12: rounding of the derivative itself; 1e-6: between two points of the grid, or a limit at infinity
        assert float(low) - 1e-12 <= values.min() <= float(low) + 2e-3
        assert float(high) - 1e-6 <= values.max() <= float(high) + 1e-12 or values.max() > float(high) - 2e-3


@pytest.mark.parametrize(("module", "share"), LOOSE, ids=str)
def test_loose_ranges_hold(module: nn.Module, share: float) -> None:
    with torch.no_grad():
        ranges = curve(module.double())
        by_itself = module.curvature_bound()
    for values, (low, high) in zip(derivatives(module), (ranges.slope, ranges.bend), strict=True):
        low, high = float(low), float(high)
        assert low - 1e-12 <= values.min()
        assert values.max() <= high + 1e-12
        assert values.abs().max() >= share * max(-low, high)
    assert float(by_itself) == pytest.approx(max(abs(float(end)) for end in ranges.bend), rel=1e-12)


@pytest.mark.parametrize("module", KINKED, ids=str)
def test_kinked_ranges_hold_and_say_why(module: nn.Module) -> None:
    ranges = curve(module)
    first, second = derivatives(module)
    assert ranges.slope[0] <= first.min()
    assert first.max() <= ranges.slope[1] + 1e-7  # torch takes 1 / 6 in float32
    assert max(abs(first.min()), abs(first.max())) >= 0.99 * max(abs(end) for end in ranges.slope)
    assert math.inf in (abs(end) for end in ranges.bend)
    assert ranges.bend[0] <= second.min()
    assert second.max() <= ranges.bend[1]
    assert "kink" in ranges.reason


def test_one_sided_kinks_name_the_right_side() -> None:
    assert curve(nn.ReLU()).bend == (0.0, math.inf)
    assert curve(nn.LeakyReLU(1.7)).bend == (-math.inf, 0.0)
    assert curve(nn.ELU(2.0)).bend[0] == -math.inf


def test_softplus_with_low_threshold_jumps() -> None:
    ranges = curve(nn.Softplus(threshold=5.0))
    assert ranges.slope[1] == math.inf
    assert "threshold of at least 20" in ranges.reason
    x = torch.tensor([5.0, 5.0 + 1e-9], dtype=torch.float64)
    y = F.softplus(x, threshold=5.0)
    assert abs(y[1] - y[0]) > 1e-3  # the reason: a step of 0.007 over 1e-9


def test_linear_cases_have_no_curvature() -> None:
    assert curve(nn.LeakyReLU(1.0)).bend == (0.0, 0.0)
    assert curve(nn.CELU(-1.0)).slope[1] == math.inf


def test_every_activation_of_the_table_is_tested() -> None:
    tested = {type(module) for module in SMOOTH + KINKED + [module for module, _ in LOOSE]}
    assert set(CURVES) <= tested
