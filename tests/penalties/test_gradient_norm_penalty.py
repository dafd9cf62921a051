"""The gradient-norm penalty against per-example gradients of torch.func, in its exact and finite-difference form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_lcnn.functional import logit_margin, target_logit
from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm1d,
    SmoothELU,
    SmoothHardswish,
    SmoothPReLU,
    SpectralConv2d,
    SpectralLinear,
)
from lightning_lcnn.models import resnet18
from lightning_lcnn.penalties import GradientNormPenalty, Penalty
from tests.lightning_helpers import COMPILER_WARNINGS, examples, small_net

OUTPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": lambda logits, target: F.cross_entropy(logits, target, reduction="none"),
    "margin": logit_margin,
    "logit": target_logit,
}


def smooth_net() -> nn.Sequential:
    """Nothing in it couples examples."""
    torch.manual_seed(0)
    return nn.Sequential(
        SpectralConv2d(1, 3, 3, padding=1, stride=2, input_size=(6, 6)),
        CenteredSoftplus(beta=5.0),
        nn.Flatten(),
        SpectralLinear(27, 6, gamma=3.0),
        CenteredSoftplus(beta=3.0),
        nn.Linear(6, 3),
    ).double()


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    x, target = examples(n)
    return x.double(), target


def dense_gradients(net: nn.Module, output: str, x: Tensor, target: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """Parameters to input gradients, each example differentiated alone."""

    def value(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(net, parameters, (x[None],))
        return OUTPUTS[output](logits, target[None])[0]

    return lambda parameters: vmap(grad(value, 1), (None, 0, 0))(parameters, x, target)


def parameter_gradient(penalty: Penalty, net: nn.Module, *inputs: Tensor) -> Tensor:
    net.zero_grad()
    penalty(net, *inputs).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    return torch.cat([g.flatten() for g in gradients]).clone()


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("output", OUTPUTS)
def test_exact_form_equals_per_example_gradients(output: str, squared: bool) -> None:
    net, (x, target) = smooth_net(), batch()
    gradients = dense_gradients(net, output, x, target)

    def expected(parameters: dict[str, Tensor]) -> Tensor:
        norms = gradients(parameters).flatten(1).norm(dim=1)
        return 0.3 * (norms**2 if squared else norms).mean()

    parameters = dict(net.named_parameters())
    by_func, value = torch.func.grad_and_value(expected)(parameters)
    penalty = GradientNormPenalty(0.3, output=output, squared=squared)
    torch.testing.assert_close(penalty(net, x, target), value, rtol=1e-12, atol=0)
    expected_gradient = torch.cat([g.flatten() for g in by_func.values()])
    torch.testing.assert_close(parameter_gradient(penalty, net, x, target), expected_gradient, rtol=1e-9, atol=1e-12)


def test_parameter_gradient_equals_finite_differences_of_the_value() -> None:
    net, (x, target), h = smooth_net(), batch(4), 1e-6
    penalty = GradientNormPenalty(1.0)
    gradient = parameter_gradient(penalty, net, x, target)
    torch.manual_seed(1)
    for _ in range(3):
        direction = torch.randn_like(gradient)
        flat = nn.utils.parameters_to_vector(net.parameters()).detach()
        values = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(flat + sign * h * direction, net.parameters())
            values.append(penalty(net, x, target).item())
        nn.utils.vector_to_parameters(flat, net.parameters())
        # truncation h², rounding 1e-16 / h
        assert (values[0] - values[1]) / (2 * h) == pytest.approx((gradient @ direction).item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
@pytest.mark.parametrize("squared", [True, False])
def test_mean_does_not_depend_on_the_batch_size(mode: str, squared: bool) -> None:
    net, (x, target) = smooth_net(), batch()
    penalty = GradientNormPenalty(1.0, mode=mode, squared=squared, step_size=1e-6)
    once = parameter_gradient(penalty, net, x, target)
    twice = parameter_gradient(penalty, net, torch.cat([x, x]), torch.cat([target, target]))
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-7)
    value, double = penalty(net, x, target), penalty(net, torch.cat([x, x]), torch.cat([target, target]))
    torch.testing.assert_close(double, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("output", OUTPUTS)
def test_finite_difference_converges_to_the_exact_form(output: str, squared: bool) -> None:
    net, inputs = small_net(gamma=50.0).double(), batch()  # batch norm couples the examples
    exact = GradientNormPenalty(1.0, output=output, squared=squared)
    reference = parameter_gradient(exact, net, *inputs)
    errors = []
    for step in (1e-2, 1e-3, 1e-4):
        penalty = GradientNormPenalty(1.0, output=output, squared=squared, mode="finite_difference", step_size=step)
        assert penalty(net, *inputs).item() == pytest.approx(exact(net, *inputs).item(), rel=1e-12)
        gradient = parameter_gradient(penalty, net, *inputs)
        errors.append(((gradient - reference).norm() / reference.norm()).item())
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)  # first order in the step
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.3)


def test_finite_difference_in_float32_at_its_default_step() -> None:
    torch.manual_seed(0)
    net = resnet18(10, width=4, low_curvature=True)
    x, target = torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,))
    reference = parameter_gradient(GradientNormPenalty(1.0), copy.deepcopy(net).double(), x.double(), target)
    gradient = parameter_gradient(GradientNormPenalty(1.0, mode="finite_difference"), net, x, target)
    assert (gradient - reference).norm() / reference.norm() < 0.05  # 0.02 measured


def test_finite_difference_survives_vanishing_gradients() -> None:
    """Confident examples: the shift is scaled by the steepest one, and by 1 where all are flat."""
    net, (x, target) = smooth_net(), batch()
    with torch.no_grad():
        net[-1].weight.zero_()
    gradient = parameter_gradient(GradientNormPenalty(1.0, mode="finite_difference"), net, x, target)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    for squared in (True, False):
        gradient = parameter_gradient(GradientNormPenalty(1.0, squared=squared), net, x, target)
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
@pytest.mark.parametrize("squared", [True, False])
def test_nan_is_not_silent(mode: str, squared: bool) -> None:
    net, (x, target) = smooth_net(), batch()
    x[2, 0, 0, 0] = torch.nan
    penalty = GradientNormPenalty(1.0, mode=mode, squared=squared)
    assert penalty(net, x, target).isnan()
    assert parameter_gradient(penalty, net, x, target).isnan().any()


class Dropping(nn.Module):
    """Functional dropout, which no look at the modules would find."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net(gamma=50.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_own_passes_leave_statistics_and_random_state(mode: str) -> None:
    net, (x, target) = Dropping(), examples()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    GradientNormPenalty(1.0, mode=mode)(net, x, target).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not x.requires_grad
    assert x.grad is None


def test_finite_difference_takes_one_dropout_mask() -> None:
    """With another mask at each end the difference would be noise / step."""
    net, (x, target) = Dropping().double(), batch()
    leaf = x.clone().requires_grad_()
    logits = net(leaf)
    torch.manual_seed(5)
    exact = parameter_gradient(GradientNormPenalty(1.0), net, x, target)
    difference = GradientNormPenalty(1.0, mode="finite_difference", step_size=1e-5)
    for known in (None, logits):  # the masks of known logits cannot be repeated, so both take those of seed 5
        torch.manual_seed(5)
        net.zero_grad()
        difference(net, leaf, target, logits=known).backward()
        got = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        reference = exact[exact != 0]
        torch.testing.assert_close(got[exact != 0], reference, rtol=1e-2, atol=1e-3 * reference.abs().max().item())


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_batch_statistics_are_used_in_training(mode: str) -> None:
    net, (x, target) = nn.Sequential(nn.Flatten(), LipschitzBatchNorm1d(36), nn.Linear(36, 3)).double(), batch()
    penalty = GradientNormPenalty(1.0, mode=mode)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), target, reduction="sum"), leaf)
    expected = gradient.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(penalty(net, x, target), expected)
    assert not torch.isclose(penalty(net.eval(), x, target), expected)


@pytest.mark.parametrize("mode", ["exact", "finite_difference"])
def test_known_logits_spare_a_pass(mode: str) -> None:
    net, (x, target) = small_net().double(), batch()
    expected = parameter_gradient(GradientNormPenalty(1.0, mode=mode), net, x, target)
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    leaf = x.clone().requires_grad_()
    value = GradientNormPenalty(1.0, mode=mode)(net, leaf, target, logits=net(leaf))
    assert len(calls) == (1 if mode == "exact" else 2)
    net.zero_grad()
    value.backward()
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(got, expected)


def test_logits_of_another_input_are_refused() -> None:
    net, (x, target) = small_net(), examples()
    with pytest.raises(ValueError, match=r"`x` must require a gradient and `logits` be computed from it"):
        GradientNormPenalty()(net, x, target, logits=net(x))
    with pytest.raises(ValueError, match=r"the logits do not depend on `x`"):
        GradientNormPenalty()(net, x.clone().requires_grad_(), target, logits=net(x))


def test_adapter_and_own_output() -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": 2 * x}

    x, target = torch.ones(3, 2), torch.rand(3)  # targets of a regression
    penalty = GradientNormPenalty(
        1.0, output=lambda logits, target: logits[:, 0] * target, adapter=lambda result: result["logits"]
    )
    torch.testing.assert_close(penalty(Returns(), x, target), 4 * target.square().mean())
    with pytest.raises(TypeError, match=r"must return a tensor of logits, got dict; pass adapter="):
        GradientNormPenalty(output="logit")(Returns(), x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`output` must return one value per example, shape \(3,\), got \(\)"):
        GradientNormPenalty(output=lambda logits, target: logits.sum())(nn.Identity(), x, target)


class Kinked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x.flatten(1)))


@pytest.mark.parametrize(
    ("net", "kink"),
    [
        (Kinked(), "Relu"),
        (nn.Sequential(small_net()[:3], nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)), "MaxPool"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.LeakyReLU(0.1)), "LeakyRelu"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.SELU()), "Elu"),
    ],
)
def test_finite_difference_refuses_kinks(net: nn.Module, kink: str) -> None:
    penalty = GradientNormPenalty(mode="finite_difference")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"needs a smooth network, and \w+ has kinks \({kink}.*Use mode='exact'"):
            penalty(net, *examples())
    GradientNormPenalty()(net, *examples()).backward()


def test_finite_difference_takes_every_smooth_activation() -> None:
    activations = [nn.ELU(), nn.Softsign(), SmoothELU(1.6732632, 1.0507010), SmoothPReLU(), SmoothHardswish()]
    for activation in activations:
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), activation)
        GradientNormPenalty(mode="finite_difference")(net, *examples()).backward()


def test_replaced_modules_are_checked_again() -> None:
    net, penalty = small_net(), GradientNormPenalty(mode="finite_difference")
    penalty(net, *examples())
    net[2] = nn.ReLU()
    with pytest.raises(ValueError, match="has kinks"):
        penalty(net, *examples())


def test_half_precision() -> None:
    net, (x, target) = small_net(), examples()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = GradientNormPenalty(1.0)(net, x, target)
    exact = GradientNormPenalty(1.0)(net, x, target)
    assert value.dtype == torch.float32
    assert not torch.equal(value, exact)  # the network ran in bfloat16
    assert value.item() == pytest.approx(exact.item(), rel=0.05)  # 3 digits through three layers
    difference = GradientNormPenalty(1.0, mode="finite_difference")
    plain = parameter_gradient(difference, net, x, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = x.clone().requires_grad_()
        logits = net(leaf)
        net.zero_grad()
        value = difference(net, leaf, target, logits=logits)
    value.backward()
    got = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(got, plain)
    with pytest.raises(ValueError, match=r"needs float32, got bfloat16, whose rounding drowns"):
        difference(net.bfloat16(), x.bfloat16(), target)


@COMPILER_WARNINGS
def test_compiled_networks() -> None:
    torch._dynamo.reset()
    net, (x, target) = small_net(), examples()
    compiled = torch.compile(net, backend="aot_eager")
    difference = GradientNormPenalty(1.0, mode="finite_difference")
    expected = parameter_gradient(difference, net, x, target)
    torch.testing.assert_close(parameter_gradient(difference, compiled, x, target), expected, rtol=1e-2, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"CompiledFunctionBackward \(torch.compile\) does not allow.*finite_difference"
    ):
        GradientNormPenalty(1.0)(compiled, x, target)
    with pytest.raises(ValueError, match=r"has kinks \(Relu"):
        difference(torch.compile(Kinked(), backend="aot_eager"), x, target)


def test_copies_and_pickles() -> None:
    penalty = GradientNormPenalty(0.3, output="margin", squared=False, schedule=10)
    net, inputs = small_net(), examples()
    value = penalty(net, *inputs, step=4)
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert repr(twin) == repr(penalty)
        assert torch.equal(twin(net, *inputs, step=4), value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1.0}, ValueError, "`weight` must be a finite number >= 0"),
        ({"output": "logits"}, ValueError, "`output` must be one of .*'margin'.*, got 'logits'"),
        ({"mode": "central"}, ValueError, "`mode` must be one of .*'exact'.*, got 'central'"),
        ({"step_size": 0.0}, ValueError, "`step_size` must be a finite number > 0"),
        ({"schedule": 0}, ValueError, "`schedule` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientNormPenalty(**arguments)  # type: ignore[arg-type]


def test_bad_batches_are_refused() -> None:
    net, (x, target), penalty = small_net(), examples(), GradientNormPenalty()
    for inputs, message in (
        ((x,), r"needs tensors `x` and `target`: penalty\(model, x, target\); got \['Tensor'\]"),
        ((x.to(torch.uint8), target), "`x` must be floating point to be differentiated, got torch.uint8"),
        ((x, target.float()), r"`target` must hold class indices, shape \(B,\), got torch.float32 \(16,\)"),
    ):
        with pytest.raises(TypeError, match=message):
            penalty(net, *inputs)
    for inputs, message in (
        ((x[:0], target[:0]), r"`x` must have shape .* and not be empty"),
        ((x, target[:3]), r"`target` must have one entry per example, 16, got shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            penalty(net, *inputs)
