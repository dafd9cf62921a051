"""Penalties on input gradients in training: one forward pass, and the same step as in a loop written by hand."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.callbacks import PenaltyCallback, PowerIteration
from lightning_lcnn.layers import lcnn_parameter_groups
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurePenalty, CurvaturePenalty, GradientNormPenalty, Penalty
from tests.lightning_helpers import (
    COMPILER_WARNINGS,
    FILTERS,
    PACKAGES,
    examples,
    lightning_module,
    loader,
    plain_classifier,
    small_net,
    trainer,
)

pytestmark = FILTERS
Plain = plain_classifier()
PENALTIES = {
    "exact": GradientNormPenalty(0.3),
    "difference": GradientNormPenalty(0.3, mode="finite_difference"),
    "cure": CurePenalty(0.5),
}


class Gradients(LCNNMixin, Plain):
    """The penalty that the tests need most."""

    penalty: Penalty = PENALTIES["exact"]

    def configure_penalties(self) -> list[Penalty]:
        return [self.penalty]


def by_hand(penalty: Penalty, batches: int, accumulate: int = 1) -> dict[str, Tensor]:
    """State after SGD in a plain loop, the penalty with a forward pass of its own."""
    net = small_net()
    optimizer = torch.optim.SGD(lcnn_parameter_groups(net), lr=Plain.learning_rate)
    for i, (x, y) in enumerate(loader(4 * batches)):
        ((penalty(net, x, y) + F.cross_entropy(net(x), y)) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net.state_dict()


def assert_equal_states(net: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in net.state_dict().items():  # running statistics and their counts, too
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def count_calls(net: nn.Module) -> list[int]:
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("door", ["mixin", "callback"])
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", PENALTIES)
def test_steps_equal_a_loop_by_hand(kind: str, package: str, door: str) -> None:
    base, penalty = plain_classifier(package), PENALTIES[kind]
    if door == "mixin":

        class WithMixin(LCNNMixin, base):
            def configure_penalties(self) -> list[Penalty]:
                return [penalty]

        module, callbacks = WithMixin(), []
    else:
        module, callbacks = base(), [PenaltyCallback(penalty), PowerIteration()]
    calls = count_calls(module.net)
    runner = trainer(package, callbacks=callbacks)
    runner.fit(module, loader(8))
    assert len(calls) == (2 if kind == "exact" else 4)  # for two steps
    assert_equal_states(module.net, by_hand(penalty, 2))
    assert f"lcnn/{penalty.name}_penalty" in runner.callback_metrics
    assert not module.net._forward_hooks.keys() - {next(iter(module.net._forward_hooks))}
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_running_statistics_are_those_of_a_step_without_penalty() -> None:
    states = []
    for penalty in (None, *PENALTIES.values()):
        module = Gradients() if penalty else Plain()
        module.penalty = penalty
        module.train().training_step(examples(), 0)
        states.append(module.net[1].state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_accumulation() -> None:
    module = Gradients()
    trainer(accumulate_grad_batches=2).fit(module, loader(16))
    assert_equal_states(module.net, by_hand(module.penalty, 4, accumulate=2))


@pytest.mark.parametrize("kind", PENALTIES)
def test_mixed_precision(kind: str) -> None:
    module = Gradients()
    module.penalty = PENALTIES[kind]
    runner = trainer(precision="bf16-mixed", accumulate_grad_batches=2)
    runner.fit(module, loader(16))
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in module.parameters())
    expected = by_hand(module.penalty, 4, accumulate=2)
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0.03, atol=0.01)  # bfloat16 in the network
    assert runner.callback_metrics[f"lcnn/{module.penalty.name}"].dtype == torch.float32


Named = namedtuple("Named", ["image", "label"])


@pytest.mark.parametrize("form", [list, lambda b: Named(*b), lambda b: dict(zip(("image", "label"), b, strict=True))])
def test_batch_is_not_touched(form: Any) -> None:
    class Reads(Gradients):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert type(batch) is self.form
            x, y = batch.values() if isinstance(batch, dict) else batch
            assert x is self.x
            assert not x.requires_grad
            return F.cross_entropy(self.net(x), y)

    batch = form(examples(4))
    module = Reads()
    module.form = type(batch)
    module.x = batch["image"] if isinstance(batch, dict) else batch[0]
    copy = module.x.clone()
    expected = Gradients().training_step(examples(4), 0)
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    assert torch.equal(module.x, copy)
    assert not module.x.requires_grad


class NoForward(LCNNMixin, lightning_module()):
    """As many write them, without a curvature layer in sight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self.net(batch[0]), batch[1])

    def configure_penalties(self) -> list[Penalty]:
        return [GradientNormPenalty(0.3)]


def test_module_without_forward() -> None:
    module, (x, y) = NoForward(), examples(4)
    expected = F.cross_entropy(module.net(x), y) + GradientNormPenalty(0.3)(module.net, x, y)
    calls = count_calls(module.net)
    torch.testing.assert_close(module.training_step((x, y), 0), expected)
    assert len(calls) == 1


def test_network_that_is_never_called() -> None:
    class Around(NoForward):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.criterion(self.net.forward(batch[0]), batch[1])

    with pytest.raises(ValueError, match=r"Around made none for 4 examples that could be watched: call the network as"):
        Around().training_step(examples(4), 0)

    class Declared(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.testing.assert_close(Declared().training_step(examples(4), 0), NoForward().training_step(examples(4), 0))


def test_penalty_is_taken_where_the_network_is_called() -> None:
    """After what the step does to the batch, with whatever else the network gets, in the last call for the batch."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net(gamma=50.0).double()

        def forward(self, x: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
            x.mul_(factor).add_(shift)  # in place, on what must not be the user's tensor
            return self.net(x)

    class Prepares(Gradients):
        def __init__(self) -> None:
            super().__init__()
            self.net = Scaled()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            with torch.no_grad():
                self.net(x.clone())
            self.net(torch.zeros_like(x))
            x = ((x - 0.5) / 2).detach()
            logits = self.net(x, 3.0, shift=0.1)
            self.net(x[:2])
            assert torch.equal(x, (batch[0] - 0.5) / 2)
            return F.cross_entropy(logits, y)

    x, y = examples(4)
    x = x.double()
    for penalty in PENALTIES.values():
        module, reference = Prepares(), Scaled()
        module.penalty = penalty
        seen = (x - 0.5) / 2
        loss = F.cross_entropy(reference(seen.clone(), 3.0, shift=0.1), y)
        # not for `reference` itself, which takes one argument more
        expected = penalty(lambda z, reference=reference: reference(z, 3.0, shift=0.1), seen, y)
        total = module.training_step((x, y), 0)
        torch.testing.assert_close(total, loss + expected)
        total.backward()
        (loss + expected).backward()
        for mine, other in zip(module.net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_inputs_that_are_learned_stay_in_the_graph() -> None:
    class Embeds(Gradients):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0] * self.gain), batch[1])

    module, twin, (x, y) = Embeds(), Embeds(), examples(4)
    module.training_step((x, y), 0).backward()
    point = x * twin.gain
    losses = F.cross_entropy(twin.net(point), y, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), point, create_graph=True)
    (losses.mean() + 0.3 * gradient.flatten(1).square().sum(1).mean()).backward()
    torch.testing.assert_close(module.gain.grad, twin.gain.grad)


def test_dropout_masks_of_the_step_are_used() -> None:
    class Drops(Gradients):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Dropout(0.5), *small_net())

    module, batch = Drops().train(), examples(4)
    torch.manual_seed(3)
    total = module.training_step(batch, 0)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    point = batch[0].clone().requires_grad_()
    losses = F.cross_entropy(module.net(point), batch[1], reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), point)
    torch.testing.assert_close(total, losses.mean() + 0.3 * gradient.flatten(1).square().sum(1).mean())
    assert torch.equal(torch.get_rng_state(), state)  # no other draws than without a penalty


def test_equal_names_are_numbered() -> None:
    class Two(Plain):
        pass

    penalties = [
        GradientNormPenalty(0.1),
        GradientNormPenalty(0.2, output="margin"),
        CurvaturePenalty(0.1),
        CurvaturePenalty(0.3, mode="sum_log"),
    ]
    runner = trainer(callbacks=[PenaltyCallback(penalties), PowerIteration()])
    runner.fit(Two(), loader(4))
    logged, (x, y) = runner.callback_metrics, examples(4)
    for key, penalty in zip(["gradient_norm", "gradient_norm_2", "curvature", "curvature_2"], penalties, strict=True):
        inputs = (x, y) if penalty.needs_batch else ()
        value, parts = penalty.evaluate(small_net(), *inputs)
        torch.testing.assert_close(logged[f"lcnn/{key}"], parts[penalty.name])
        stem = key.removesuffix("_2")
        torch.testing.assert_close(logged[f"lcnn/{stem}_penalty{'_2' if key.endswith('_2') else ''}"], value.detach())


@COMPILER_WARNINGS
@pytest.mark.parametrize("where", ["module", "network"])
def test_compiled(where: str) -> None:
    torch._dynamo.reset()

    def fit(kind: str) -> Any:
        module = Gradients()
        module.penalty = PENALTIES[kind]
        if where == "network":
            module.net = torch.compile(module.net, backend="aot_eager")
        runner = trainer()
        runner.fit(torch.compile(module, backend="aot_eager") if where == "module" else module, loader(8))
        return getattr(module.net, "_orig_mod", module.net)

    expected = by_hand(PENALTIES["difference"], 2)
    for name, value in fit("difference").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(torch.compile\) does not allow: do not compile the network, or use"):
        fit("exact")


def test_manual_optimisation_takes_own_passes() -> None:
    class Manual(Gradients):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) + self.curvature_penalty(batch))
            optimizer.step()

    module = Manual()
    trainer().fit(module, loader(8))
    assert_equal_states(module.net, by_hand(module.penalty, 2))


def test_failed_step_leaves_no_hooks() -> None:
    class Fails(Gradients):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net(batch[0])
            raise RuntimeError("stop")

    module = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        module.training_step(examples(4), 0)
    for part in (module, module.net):
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
