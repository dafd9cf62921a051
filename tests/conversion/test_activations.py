"""What to_low_curvature makes of every activation, as a module and as a functional call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.conversion import fold, to_low_curvature
from lightning_lcnn.layers import CenteredSoftplus, ScaledActivation
from lightning_lcnn.penalties import CurvaturePenalty

BETA = 1e9  # in float64: the smooth form differs from the original by about 1/β, less than rounding
# activation, class of its counterpart
KINKED = {
    "ReLU": (nn.ReLU(), "CenteredSoftplus"),
    "ReLU6": (nn.ReLU6(), "PiecewiseSoftplus"),
    "LeakyReLU": (nn.LeakyReLU(0.2), "PiecewiseSoftplus"),
    "Hardtanh": (nn.Hardtanh(-1, 2), "PiecewiseSoftplus"),
    "Hardsigmoid": (nn.Hardsigmoid(), "PiecewiseSoftplus"),
    "Softshrink": (nn.Softshrink(0.3), "PiecewiseSoftplus"),
    "Hardswish": (nn.Hardswish(), "SmoothHardswish"),
    "PReLU": (nn.PReLU(), "SmoothPReLU"),
    "PReLU per channel": (nn.PReLU(4, init=-0.3), "SmoothPReLU"),
    "SELU": (nn.SELU(), "SmoothELU"),
    "ELU": (nn.ELU(0.4), "SmoothELU"),
}
SCALED = {
    "SiLU": nn.SiLU(),
    "GELU": nn.GELU(),
    "GELU tanh": nn.GELU("tanh"),
    "Mish": nn.Mish(),
    "ELU": nn.ELU(),
    "CELU": nn.CELU(0.5),
    "Softplus": nn.Softplus(2.0),
}
X = 4 * torch.randn(60, 4, dtype=torch.float64)


def between(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), activation, nn.Linear(4, 3)).double().eval()


def converted(net: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    return to_low_curvature(net, X, return_report=True, **options)


@pytest.mark.parametrize("name", KINKED)
def test_kinked(name: str) -> None:
    activation, expected = KINKED[name]
    net = between(activation)
    smooth, report = converted(net, beta=BETA)
    assert type(smooth[1]).__name__ == expected
    assert not report.kinks
    torch.testing.assert_close(smooth(X), net(X), atol=1e-7, rtol=0)
    torch.testing.assert_close(fold(smooth)(X), smooth(X))
    bound = network_bound(converted(net, beta=3.0)[0].eval(), X)
    assert 0 < bound.curvature < float("inf")


@pytest.mark.parametrize("name", SCALED)
def test_smooth_ones_stay_the_same_and_get_a_beta(name: str) -> None:
    net = between(SCALED[name])
    smooth, report = converted(net)
    assert isinstance(smooth[1], ScaledActivation)
    assert smooth[1].learnable
    assert next(row.note for row in report.changed if row.name == "1") == "β 1, the same function"
    torch.testing.assert_close(smooth(X), net(X), atol=1e-12, rtol=1e-12)
    plain = fold(smooth)
    assert repr(plain[1]) == repr(net[1])
    with torch.no_grad():
        smooth[1].log_beta.fill_(-0.5)
    fixed = fold(smooth)
    assert not fixed[1].learnable
    torch.testing.assert_close(fixed(X), smooth(X))
    before = network_bound(net, X).curvature
    assert network_bound(smooth.eval(), X).curvature == pytest.approx(before * 2.718281828**-0.5, rel=1e-4)
    penalty = CurvaturePenalty(weight=1.0)(smooth)
    penalty.backward()
    assert float(smooth[1].log_beta.grad) == pytest.approx(1.0)  # log C̄ = log β + ...


def test_left_alone() -> None:
    activations = [nn.Sigmoid(), nn.Tanh(), nn.Softsign(), nn.LogSigmoid()]
    smooth, report = converted(nn.Sequential(nn.Linear(4, 4), *activations).double())
    assert [type(layer) for layer in list(smooth)[1:]] == [type(layer) for layer in activations]
    assert {row.reason for row in report.kept if row.name != "0"} == {"smooth already"}


@pytest.mark.filterwarnings("ignore:to_low_curvature left")
def test_those_that_jump_or_draw_random_slopes_are_kept_with_a_reason() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Softplus(threshold=5.0), nn.Hardshrink(), nn.CELU(-1.0))
    _, report = converted(net.double().eval())
    reasons = {row.name: row.reason for row in report.kept}
    assert "RReLU has a kink" in reasons["1"]
    assert "threshold of at least 20" in reasons["2"]
    assert "hardshrink" in next(row.what for row in report.kinks if row.name == "3")
    assert "grows without bound" in reasons["4"]


def test_kinks_without_counterpart_are_warned_of() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Hardshrink()).double().eval()
    with pytest.warns(UserWarning, match=r"left 2 operation.s. with kinks.*\n  1 \(RReLU\).*\n  2 \(hardshrink"):
        _, report = converted(net)
    assert [row.name for row in report.kinks] == ["1", "2"]
    converted(net, skip=[nn.RReLU, "2"])  # asked for: no warning


def test_asked_for_it_becomes_a_centered_softplus() -> None:
    smooth, _ = converted(nn.Sequential(nn.SiLU(), nn.GELU()), beta=3.0, activations=[nn.SiLU])
    assert type(smooth[0]) is CenteredSoftplus
    assert smooth[0].beta.item() == pytest.approx(3.0)
    assert type(smooth[1]) is ScaledActivation


def test_prelu_keeps_its_parameter() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)).double()
    smooth, _ = converted(net)
    assert "1.weight" in smooth.state_dict()
    assert torch.equal(smooth[1].weight, net[1].weight)


def test_converting_twice_changes_no_activation() -> None:
    once, _ = converted(between(nn.SiLU()))
    twice, report = converted(nn.Sequential(once, nn.Linear(3, 3).double(), nn.ReLU()))
    assert repr(twice[0][1]) == repr(once[1])
    assert "0.1" not in {row.name for row in report.changed}


class Functional(nn.Module):
    """One call of each function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 3), F.gelu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        kinked = F.hardswish(x) + F.selu(x) + F.elu(x, 0.5) + F.softshrink(x, 0.2)
        smooth = F.silu(x) + F.gelu(x, approximate="tanh") + F.mish(x) + F.elu(x) + F.celu(x, alpha=0.7) + F.softplus(x)
        return self.second(kinked + smooth + self.act(x))


def test_functional_calls() -> None:
    net = Functional().double().eval()
    smooth, report = converted(net, beta=BETA)
    after = [row.after for row in report.changed if "Spectral" not in row.after]
    assert sorted(after) == sorted(
        [*["ScaledActivation"] * 7, "SmoothHardswish", *["SmoothELU"] * 2, "PiecewiseSoftplus"]
    )
    assert not report.kinks
    torch.testing.assert_close(smooth(X), net(X), atol=1e-7, rtol=0)


class Reused(nn.Module):
    """SiLU twice, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, 3), nn.SiLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(self.act(self.first(x))))


def test_one_beta_for_a_shared_module_or_one_for_each_call() -> None:
    shared, _ = converted(Reused().double())
    separate, _ = converted(Reused().double(), separate_activations=True)
    assert [sum(type(m) is ScaledActivation for m in net.modules()) for net in (shared, separate)] == [1, 2]
