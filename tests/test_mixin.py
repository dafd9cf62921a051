"""The mixin adds the penalties exactly once, and nowhere else; its oracle is a loop written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty, Penalty
from tests.by_hand import WEIGHT, Low, Module, Plain, assert_equal_to_hand, fit, steps_by_hand
from tests.lightning_helpers import (
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


@pytest.mark.parametrize("package", PACKAGES)
def test_gradient_is_that_of_loss_plus_penalty(package: str) -> None:
    class Low(LCNNMixin, plain_classifier(package)):
        def configure_penalties(self) -> list[Penalty]:
            return [CurvaturePenalty(weight=WEIGHT)]

    assert_equal_to_hand(fit(Low(), package=package), steps_by_hand(1))


def test_gradient_differs_without_the_mixin() -> None:
    net = fit(Plain())
    assert_equal_to_hand(net, steps_by_hand(1, penalties=0))
    assert not torch.allclose(net[2].log_beta, steps_by_hand(1)["2.log_beta"], rtol=1e-4)


class ReturnsDict(Low):
    """Keeps its dict, to see whether it was changed."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.returned = {"loss": self.loss(batch), "extra": 7}
        self.own_loss = self.returned["loss"].item()
        return self.returned


def test_returned_dict_is_copied() -> None:
    module = ReturnsDict()
    assert_equal_to_hand(fit(module), steps_by_hand(1))
    assert module.returned["loss"].item() == module.own_loss
    output = ReturnsDict().training_step(examples(4), 0)
    assert set(output) == {"loss", "extra"}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_none_skips_the_step() -> None:
    class Skips(Low):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    assert_equal_to_hand(fit(Skips()), dict(small_net().named_parameters()), tolerance=0)


class OwnStep(Low):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class Grandchild(OwnStep):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class InheritsWrapped(Grandchild):
    pass


class Extra:
    """A cooperative class without Lightning or the mixin."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)  # type: ignore[misc]


class ExtraInFront(Extra, Low):
    pass


class ExtraBehind(LCNNMixin, Extra, Plain):
    def configure_penalties(self) -> list[Penalty]:
        return [CurvaturePenalty(weight=WEIGHT)]


class BatchOnly(Low):
    def training_step(self, batch: Any) -> Any:  # Lightning passes what the signature asks for
        return self.loss(batch)


@pytest.mark.parametrize("module_class", [OwnStep, Grandchild, InheritsWrapped, ExtraInFront, ExtraBehind, BatchOnly])
def test_inheritance_adds_the_penalty_once(module_class: Any) -> None:
    assert_equal_to_hand(fit(module_class()), steps_by_hand(1))


def test_accumulation_adds_the_penalty_once_per_optimizer_step() -> None:
    assert_equal_to_hand(fit(Low(), batches=4, accumulate_grad_batches=2), steps_by_hand(4, accumulate=2))


def test_manual_optimisation_adds_nothing_by_itself() -> None:
    class Manual(Low):
        add = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss + self.curvature_penalty() if self.add else loss)
            optimizer.step()
            return loss

    assert_equal_to_hand(fit(Manual()), steps_by_hand(1, penalties=0))
    module = Manual()
    module.add = True
    assert_equal_to_hand(fit(module), steps_by_hand(1))


def test_validation_through_training_step_adds_nothing() -> None:
    class Validates(Low):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))
            self.log("own_loss", self.loss(batch))

    module, validator = Validates(), trainer()
    (metrics,) = validator.validate(module, loader(4), verbose=False)
    assert metrics["val_loss"] == metrics["own_loss"]


def test_own_loop_without_a_trainer() -> None:
    module, batch = Low(), examples(4)
    difference = module.training_step(batch, 0) - Plain().training_step(batch, 0)
    torch.testing.assert_close(difference, module.curvature_penalty(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(module.training_step(batch, 0), module.loss(batch))


def test_failed_step_does_not_leave_its_flag() -> None:
    module = Low()
    with pytest.raises(TypeError):
        module.training_step(None, 0)
    assert module.training_step(examples(4), 0) > module.loss(examples(4))


@pytest.mark.parametrize("package", PACKAGES)
def test_wrong_base_order_is_refused(package: str) -> None:
    with pytest.raises(TypeError, match=r"LCNNMixin must come before the Lightning class in the bases of Wrong"):

        class Wrong(lightning_module(package), LCNNMixin):
            pass

    with pytest.raises(TypeError, match=r"write class Late\(LCNNMixin, ...\)"):

        class Late(plain_classifier(package), LCNNMixin):
            pass


def test_lightnings_default_step_is_not_wrapped() -> None:
    class Empty(LCNNMixin, Module):
        pass

    assert Empty.training_step is Module.training_step
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Boring(LCNNMixin, BoringModel):  # a base of Lightning's own that does define a step
        pass

    assert Boring.training_step is not BoringModel.training_step
