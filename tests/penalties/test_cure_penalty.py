"""CURE's penalty against per-example gradients of torch.func and the closed form of a quadratic."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_lcnn.functional.penalty_formulas import cure_direction
from lightning_lcnn.penalties import CurePenalty
from tests.lightning_helpers import examples, small_net
from tests.penalties.test_gradient_norm_penalty import OUTPUTS, Dropping, batch, parameter_gradient, smooth_net


@pytest.mark.parametrize("output", ["loss", "margin"])
def test_penalty_equals_per_example_gradients(output: str) -> None:
    net, (x, target), h = smooth_net(), batch(), 0.8
    with torch.no_grad():
        rivals = net(x).scatter(1, target[:, None], -torch.inf).argmax(1)

    def value(parameters: dict[str, Tensor], x: Tensor, target: Tensor, rival: Tensor) -> Tensor:
        logits = functional_call(net, parameters, (x[None],))
        if output == "margin":  # the rival class is that of the unshifted input
            return logits[0].gather(0, target[None])[0] - logits[0].gather(0, rival[None])[0]
        return OUTPUTS[output](logits, target[None])[0]

    gradients = vmap(grad(value, 1), (None, 0, 0, 0))

    def expected(parameters: dict[str, Tensor]) -> Tensor:
        at_x = gradients(parameters, x, target, rivals)
        sign = at_x.detach().sign()
        z = sign / sign.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        change = gradients(parameters, x + h * z, target, rivals) - at_x
        return 2.0 * change.flatten(1).square().sum(1).mean()

    by_func, reference = torch.func.grad_and_value(expected)(dict(net.named_parameters()))
    penalty = CurePenalty(2.0, step_size=h, output=output)
    torch.testing.assert_close(penalty(net, x, target), reference, rtol=1e-9, atol=1e-12)
    gradient = torch.cat([g.flatten() for g in by_func.values()])
    torch.testing.assert_close(parameter_gradient(penalty, net, x, target), gradient, rtol=1e-8, atol=1e-12)


def test_quadratic_has_a_closed_form() -> None:
    """The gradient of xᵀAx/2 changes by h·A·z."""
    torch.manual_seed(0)
    a = torch.randn(3, 3).double()
    a, x = a + a.T, torch.randn(5, 3).double()
    penalty = CurePenalty(1.0, step_size=0.7, output=lambda z, target: ((z @ a) * z).sum(1) / 2)
    z = (x @ a).sign() / 3**0.5
    expected = (0.7 * z @ a).square().sum(1).mean()
    torch.testing.assert_close(penalty(nn.Identity(), x, torch.zeros(5)), expected)


def test_direction() -> None:
    gradient = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [torch.nan, 1.0, 1.0, 1.0]])
    direction = cure_direction(gradient)
    torch.testing.assert_close(direction[:2], torch.tensor([[0.5**0.5, -(0.5**0.5), 0.0, 0.0], [0.0] * 4]))
    assert direction[2].isnan().any()


def test_mean_does_not_depend_on_the_batch_size() -> None:
    net, (x, target), penalty = smooth_net(), batch(), CurePenalty(1.0)
    once, twice = penalty(net, x, target), penalty(net, torch.cat([x, x]), torch.cat([target, target]))
    torch.testing.assert_close(twice, once, rtol=1e-12, atol=0)


def test_both_passes_take_one_dropout_mask_and_leave_no_trace() -> None:
    net, (x, target) = Dropping().double(), batch()
    leaf = x.clone().requires_grad_()
    logits = net(leaf)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    own = CurePenalty(1.0)(net, x, target)
    assert torch.equal(torch.get_rng_state(), state)
    known = CurePenalty(1.0)(net, leaf, target, logits=logits)
    torch.testing.assert_close(known, own, rtol=1e-9, atol=0)  # whose mask cannot be repeated
    assert CurePenalty(1.0, step_size=1e-9)(net, x, target) < 1e-9  # two masks would differ at step 0, too
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_known_logits_spare_a_pass() -> None:
    net, (x, target) = small_net().double(), batch()
    expected = CurePenalty(1.0)(net, x, target)
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(CurePenalty(1.0)(net, leaf, target, logits=net(leaf)), expected)
    assert len(calls) == 2


def test_kinks_are_allowed_and_nan_is_not_silent() -> None:
    net, (x, target) = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)), examples()
    assert CurePenalty(1.0)(net, x, target) > 0
    x[0] = torch.nan
    assert CurePenalty(1.0)(net, x, target).isnan()


def test_copies_pickles_and_bad_arguments() -> None:
    penalty, net, inputs = CurePenalty(0.3, step_size=0.5, schedule=10), small_net(), examples()
    value = penalty(net, *inputs, step=4)
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert repr(twin) == repr(penalty)
        assert torch.equal(twin(net, *inputs, step=4), value)
    with pytest.raises(ValueError, match="`step_size` must be a finite number > 0"):
        CurePenalty(step_size=-1.0)
    with pytest.raises(ValueError, match="the logits do not depend on `x`"):
        penalty(lambda x: torch.zeros(len(x), 3), *inputs, step=0)
