"""The mixin in whole runs: schedules, logging, callbacks, mixed precision, compilation, command line."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.layers import lcnn_parameter_groups
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty, Penalty
from tests.by_hand import WEIGHT, Low, Module, Plain, assert_equal_to_hand, fit, steps_by_hand
from tests.lightning_helpers import (
    COMPILER_WARNINGS,
    FILTERS,
    PACKAGES,
    examples,
    loader,
    plain_classifier,
    small_net,
    trainer,
)

pytestmark = FILTERS


def test_schedule_follows_the_optimizer_steps() -> None:
    seen = []

    def factor(step: int) -> float:
        seen.append(step)
        return 1.0

    class Scheduled(Low):
        def configure_penalties(self) -> list[Penalty]:
            return [CurvaturePenalty(weight=WEIGHT, schedule=factor)]

    fit(Scheduled(), batches=6, accumulate_grad_batches=2)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_parts_are_logged_on_logging_steps() -> None:
    runner = trainer()
    runner.fit(Low(), loader(4))
    logged = runner.callback_metrics
    expected = CurvaturePenalty(weight=WEIGHT).evaluate(small_net())[1]
    for key, value in expected.items():
        torch.testing.assert_close(logged[f"lcnn/{key}"], value)
    runner = trainer(log_every_n_steps=50)
    runner.fit(Low(), loader(4))
    assert not [key for key in runner.callback_metrics if key.startswith("lcnn")]


@pytest.mark.parametrize("where", ["training_step", "on_train_batch_end"])
def test_parts_are_logged_under_manual_optimisation_where_they_are_of_the_step(where: str) -> None:
    class Manual(Low):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            if where == "training_step":
                self.curvature_penalty()

        def on_train_batch_end(self, *_: Any) -> None:
            if where == "on_train_batch_end":
                self.curvature_penalty()

    runner = trainer()
    runner.fit(Manual(), loader(4))
    assert ("lcnn/curvature" in runner.callback_metrics) == (where == "training_step")


class Outputs(Penalty):
    """A penalty on the outputs at the batch."""

    name, needs_batch = "outputs", True

    def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        x, _ = inputs
        return {"outputs": model(x).square().mean()}


class WithOutputs(Low):
    def configure_penalties(self) -> list[Penalty]:
        return [CurvaturePenalty(weight=WEIGHT), Outputs(weight=2.0)]

    def loss(self, batch: Any) -> Tensor:
        x, y = batch.values() if isinstance(batch, dict) else batch
        return F.cross_entropy(self.net(x), y)


def test_penalties_that_need_the_batch() -> None:
    batch = examples(4)
    module = WithOutputs()
    twin = copy.deepcopy(module)  # batch norm counts the forwards
    loss = twin.loss(batch)
    expected = loss + CurvaturePenalty(weight=WEIGHT)(twin) + 2 * twin(batch[0]).square().mean()
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    as_dict = {"image": batch[0], "label": batch[1]}
    torch.testing.assert_close(WithOutputs().training_step(as_dict, 0), expected)


def test_batch_without_an_input_tensor_is_refused() -> None:
    x, y = examples(4)
    for batch in ({"foo": x, "bar": y}, {"x": "text", "y": y}, [x], x, (y, y), "text", None):
        with pytest.raises(ValueError, match=r"`batch` must hold .*Override `penalty_inputs"):
            WithOutputs().curvature_penalty(batch)

    class Own(WithOutputs):
        def penalty_inputs(self, batch: Any) -> tuple[Tensor, Tensor]:
            return batch["foo"], batch["bar"]

    assert Own().training_step({"foo": x, "bar": y}, 0).ndim == 0


def test_configure_penalties_is_checked() -> None:
    class Wrong(Low):
        def configure_penalties(self) -> Any:
            return CurvaturePenalty()

    with pytest.raises(TypeError, match=r"`configure_penalties` must return a list of penalties.*got CurvaturePenalty"):
        Wrong().training_step(examples(4), 0)

    class Nothing(Low):
        def configure_penalties(self) -> list[Penalty]:
            return []

    assert_equal_to_hand(fit(Nothing()), steps_by_hand(1, penalties=0))


def test_power_iteration_is_attached_unless_there_is_one() -> None:
    runner = trainer()
    runner.fit(Low(), loader(4))
    (first,) = [c for c in runner.callbacks if isinstance(c, PowerIteration)]
    runner.fit_loop.max_epochs = 2
    runner.fit(Low(), loader(4))
    assert [c for c in runner.callbacks if isinstance(c, PowerIteration)] == [first]
    own = PowerIteration(every_n_steps=3)
    runner = trainer(callbacks=[own])
    runner.fit(Low(), loader(4))
    assert [c for c in runner.callbacks if isinstance(c, PowerIteration)] == [own]


@pytest.mark.parametrize("as_list", [True, False])
def test_users_configure_callbacks_need_not_call_super(as_list: bool) -> None:
    from lightning.pytorch.callbacks import Timer

    class WithTimer(Low):
        def configure_callbacks(self) -> Any:
            return [Timer()] if as_list else Timer()

    runner = trainer()
    runner.fit(WithTimer(), loader(4))
    assert {Timer, PowerIteration} <= {type(c) for c in runner.callbacks}

    class Own(Low):
        def configure_callbacks(self) -> Any:
            return [PowerIteration(every_n_steps=2)]

    runner = trainer()
    runner.fit(Own(), loader(4))
    (callback,) = [c for c in runner.callbacks if isinstance(c, PowerIteration)]
    assert callback.every_n_steps == 2


def test_module_without_forward_is_traced_through_its_network() -> None:
    class NoForward(LCNNMixin, Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()
            self.criterion = nn.CrossEntropyLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_penalties(self) -> list[Penalty]:
            return [CurvaturePenalty(weight=WEIGHT)]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(lcnn_parameter_groups(self), lr=Plain.learning_rate)

    assert_equal_to_hand(fit(NoForward()), steps_by_hand(1))


@pytest.mark.parametrize("package", PACKAGES)
def test_mixed_precision_accumulation_dict_and_adamw(package: str) -> None:
    """What the issue asks for, on one process; the penalty itself must not lose digits to bfloat16."""

    class Stranger(LCNNMixin, plain_classifier(package)):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return {"loss": loss}

        def configure_penalties(self) -> list[Penalty]:
            return [CurvaturePenalty(weight=WEIGHT)]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(lcnn_parameter_groups(self, weight_decay=0.05), lr=0.01)

    runner = trainer(package, precision="bf16-mixed", accumulate_grad_batches=2, max_epochs=4)
    module = Stranger()
    before = small_net()
    runner.fit(module, loader(16))
    assert runner.global_step == 8
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert all(p.dtype == torch.float32 for p in module.parameters())
    penalty = CurvaturePenalty(weight=1.0)
    assert penalty(module.net).item() < penalty(before).item()


def test_copies_pickles_and_saved_models() -> None:
    module, batch = Low(), examples(4)
    expected = module.training_step(batch, 0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin.training_step(batch, 0), expected)


@COMPILER_WARNINGS
@pytest.mark.parametrize("where", ["module", "step"])
def test_compiled(where: str) -> None:
    torch._dynamo.reset()

    class Compiled(Low):
        if where == "step":

            @torch.compile(backend="eager")
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return self.loss(batch)

    module = Compiled()
    net = fit(torch.compile(module, backend="eager") if where == "module" else module, batches=2)
    assert_equal_to_hand(net, steps_by_hand(2), tolerance=1e-4)  # the compiled softplus is composed of other operations


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.filterwarnings("ignore:(?s).*JsonargparseDeprecationWarning")  # Lightning 2.6 with jsonargparse 4.53
@pytest.mark.filterwarnings("ignore:(?s).*deprecated")
@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_cli(package: str, tmp_path: Any) -> None:
    cli = pytest.importorskip(f"{package}.cli")
    import importlib

    class FromCLI(LCNNMixin, plain_classifier(package)):
        def __init__(self, weight: float = 1.0) -> None:
            super().__init__()
            self.weight = weight

        def configure_penalties(self) -> list[Penalty]:
            return [CurvaturePenalty(weight=self.weight)]

        def train_dataloader(self) -> Any:
            return loader(4)

    options = ["max_epochs=1", "accelerator=cpu", "logger=false", f"default_root_dir={tmp_path}"]
    options += ["enable_checkpointing=false", "enable_progress_bar=false", "enable_model_summary=false"]
    options += ["callbacks=lightning_lcnn.callbacks.PowerIteration", "callbacks.every_n_steps=5"]
    arguments = ["fit", "--seed_everything=false", f"--model.weight={WEIGHT}"]
    arguments += [f"--trainer.{option}" for option in options]
    run = cli.LightningCLI(FromCLI, trainer_class=importlib.import_module(package).Trainer, args=arguments)
    assert_equal_to_hand(run.model.net, steps_by_hand(1))
    (callback,) = [c for c in run.trainer.callbacks if isinstance(c, PowerIteration)]
    assert callback.every_n_steps == 5
