"""Penalties against closed forms, in any loop, with schedules and clear refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.functional import log_normalized_curvature_bound, reference_penalty, sum_log_penalty
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm1d, SpectralLinear
from lightning_lcnn.penalties import MODES, CurvaturePenalty, Penalty, network_of

BETAS, GAMMAS = (3.0, 0.5, 7.0), (2.0, 0.25, 4.0)


def chain() -> nn.Sequential:
    """Slopes 2, 1/4, 4, 1 and curvatures 3/4, 1/8, 7/4."""
    layers: list[nn.Module] = []
    for beta, gamma in zip(BETAS, GAMMAS, strict=True):
        layers += [SpectralLinear(4, 4, gamma=gamma), CenteredSoftplus(beta=beta)]
    return nn.Sequential(*layers, SpectralLinear(4, 2)).double()


def products() -> tuple[float, float]:
    """C̄ and L̄ of the chain by plain multiplication."""
    slope, ratio = 1.0, 0.0
    for beta, gamma in zip(BETAS, GAMMAS, strict=True):
        slope *= gamma
        ratio += beta / 4 * slope
    return ratio, slope


def expected(mode: str) -> float:
    ratio, slope = products()
    return {
        "bound": math.log(ratio),
        "log_hessian": math.log(ratio * slope),
        "sum_log": sum(map(math.log, BETAS + GAMMAS)),
        "reference": sum(BETAS) + sum(abs(math.log(g)) for g in GAMMAS),
    }[mode]


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_their_formula_on_a_chain(mode: str) -> None:
    value = CurvaturePenalty(weight=0.5, mode=mode)(chain())
    assert value.ndim == 0
    assert value.item() == pytest.approx(0.5 * expected(mode), rel=1e-6)  # log β is stored in float32 at first


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_finite_differences(mode: str) -> None:
    net, penalty, h = chain(), CurvaturePenalty(weight=2.0, mode=mode), 1e-5
    penalty(net).backward()
    for name, parameter in net.named_parameters():
        if not name.endswith(("log_beta", "log_gamma")):
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                parameter += sign * h
                values.append(penalty(net).item())
            parameter += h
        assert parameter.grad.item() == pytest.approx((values[0] - values[1]) / (2 * h), abs=1e-6), name


def test_chain_formula_has_no_overflow() -> None:
    log_beta, log_slope = torch.full((40,), 5.0), torch.full((40,), 30.0)
    value = log_normalized_curvature_bound(log_beta, log_slope)
    assert value.item() == pytest.approx(5 - math.log(4) + 1200, rel=1e-6)


def test_graph_equals_the_chain_formula() -> None:
    value = log_normalized_curvature_bound(torch.tensor(BETAS).log(), torch.tensor(GAMMAS).log())
    assert CurvaturePenalty(weight=1.0)(chain()).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("mode", ["sum_log", "reference"])
def test_shared_activation_counts_once(mode: str) -> None:
    activation = CenteredSoftplus(beta=3.0)
    net = nn.Sequential(SpectralLinear(2, 2), activation, SpectralLinear(2, 2), activation)
    value = CurvaturePenalty(weight=1.0, mode=mode)(net).item()
    assert value == pytest.approx(math.log(3) if mode == "sum_log" else 3.0)


def test_shared_activation_counts_per_use_along_the_graph() -> None:
    activation = CenteredSoftplus(beta=4.0)
    net = nn.Sequential(SpectralLinear(2, 2), activation, SpectralLinear(2, 2), activation)
    assert CurvaturePenalty(weight=1.0)(net).item() == pytest.approx(math.log(2.0))


def test_channels_count_as_one_layer() -> None:
    beta = torch.tensor([1.0, 4.0])
    assert sum_log_penalty([beta.log()], []).item() == pytest.approx(math.log(2))
    assert reference_penalty([beta.log()], []).item() == pytest.approx(2.5)


def test_residual_branches_add() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = SpectralLinear(3, 3, gamma=2.0), CenteredSoftplus(beta=4.0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.inner(x))

    # slope 1 + 2, curvature 2², ratio 4/3
    assert CurvaturePenalty(weight=1.0)(Block()).item() == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_autocast_does_not_lower_the_precision() -> None:
    net, penalty = chain().float(), CurvaturePenalty()
    exact = penalty(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(penalty(net), exact)


def test_schedules() -> None:
    net = chain()
    full = CurvaturePenalty(weight=1.0)(net).item()
    warm_up = CurvaturePenalty(weight=1.0, schedule=4)
    assert [warm_up(net, step=i).item() / full for i in (0, 1, 3, 9)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    falling = CurvaturePenalty(weight=1.0, schedule=lambda step: 1 / (1 + step))
    assert falling(net, step=3).item() == pytest.approx(full / 4)
    with pytest.raises(ValueError, match=r"needs the optimizer step: call penalty\(model, step=...\)"):
        warm_up(net)


def test_parts_are_detached_and_consistent() -> None:
    value, parts = CurvaturePenalty(weight=0.1).evaluate(chain())
    assert set(parts) == {"curvature", "log_slope", "log_curvature", "curvature_penalty"}
    assert not any(part.requires_grad for part in parts.values())
    assert parts["curvature_penalty"] == value
    assert parts["curvature"].item() == pytest.approx((parts["log_curvature"] - parts["log_slope"]).item())


def test_replaced_layers_are_noticed() -> None:
    net, penalty = chain(), CurvaturePenalty(weight=1.0)
    before = penalty(net).item()
    net[1] = CenteredSoftplus(beta=300.0).double()
    assert penalty(net).item() > before
    assert penalty(chain()).item() == pytest.approx(before)


def test_copies_and_pickles_work_after_use() -> None:
    net, penalty = chain(), CurvaturePenalty(weight=0.3, schedule=10)
    value = penalty(net, step=4)
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert repr(twin) == repr(penalty)
        assert torch.equal(twin(net, step=4), value)
    buffer = io.BytesIO()
    torch.save(penalty, buffer)
    assert buffer.tell() < 5000  # without the traced network


def test_submodule_is_penalised_alone() -> None:
    holder = nn.ModuleDict({"a": chain(), "b": chain()})
    assert CurvaturePenalty(submodule="b")(holder).item() == CurvaturePenalty()(holder["b"]).item()
    assert network_of(holder) is holder  # two candidates: not ours to choose


def test_modules_keep_their_modes() -> None:
    net = nn.Sequential(SpectralLinear(2, 2), LipschitzBatchNorm1d(2), CenteredSoftplus()).train()
    net[1].eval()
    CurvaturePenalty()(net)
    assert [module.training for module in net] == [True, False, True]


@pytest.mark.parametrize("mode", MODES)
def test_model_without_low_curvature_layer_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=r"found no CenteredSoftplus in Sequential.*`to_low_curvature"):
        CurvaturePenalty(mode=mode)(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


class Branching(nn.Module):
    """Its graph depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


def test_untraceable_model_has_ways_out() -> None:
    model = Branching()
    with pytest.raises(ValueError, match=r"needs the graph of Branching: .*mode='sum_log'.*submodule="):
        CurvaturePenalty()(model)
    CurvaturePenalty(mode="sum_log")(model)
    CurvaturePenalty(submodule="net")(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1.0}, ValueError, "`weight` must be a finite number >= 0"),
        ({"weight": "1"}, TypeError, "`weight` must be a number >= 0"),
        ({"mode": "product"}, ValueError, "`mode` must be one of .*'bound'.*, got 'product'"),
        ({"schedule": 0}, ValueError, "`schedule` must be at least 1, got 0"),
        ({"schedule": 0.5}, TypeError, "`schedule` must be an integer"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CurvaturePenalty(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("formula", [sum_log_penalty, reference_penalty])
def test_formulas_refuse_nothing(formula: object) -> None:
    with pytest.raises(ValueError, match="needs at least one β or γ"):
        formula([], [])  # type: ignore[operator]


def test_chain_formula_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"one shape \(n,\) with n >= 1, got \(2,\) and \(3,\)"):
        log_normalized_curvature_bound(torch.zeros(2), torch.zeros(3))


def test_penalties_of_ones_own_see_the_batch() -> None:
    class Outputs(Penalty):
        name = "outputs"
        needs_batch = True

        def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
            x, target = inputs
            return {"outputs": model(x)[target].square().sum()}

    net, x = nn.Linear(2, 2), torch.ones(3, 2)
    value = Outputs(weight=2.0)(net, x, torch.tensor([0]))
    torch.testing.assert_close(value, 2 * net(x)[0].square().sum())
