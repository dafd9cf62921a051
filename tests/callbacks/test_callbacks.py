"""What all callbacks have in common, and the penalty callback, in trainers of both packages."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch

from lightning_lcnn.callbacks import AdversarialTraining, CurvatureMonitor, PenaltyCallback, PowerIteration
from lightning_lcnn.layers import lcnn_parameter_groups
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty
from tests.lightning_helpers import FILTERS, PACKAGES, loader, plain_classifier, trainer

pytestmark = FILTERS
Plain = plain_classifier()


class Low(LCNNMixin, Plain):
    """Adam moves the weights enough that stale vectors would show."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(lcnn_parameter_groups(self), lr=0.01)


@pytest.mark.parametrize(
    "callback",
    [AdversarialTraining(0.1, bounds=None), PowerIteration(every_n_steps=2), CurvatureMonitor(), PenaltyCallback()],
    ids=lambda c: type(c).__name__,
)
def test_copies_and_pickles_work(callback: Any) -> None:
    companions = [] if isinstance(callback, PowerIteration) else [PowerIteration()]
    for twin in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        trainer(callbacks=[twin, *companions]).fit(Plain(), loader(4))
        copy.deepcopy(twin)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("callback_class", "arguments"),
    [(AdversarialTraining, (0.1,)), (PowerIteration, ()), (CurvatureMonitor, ()), (PenaltyCallback, ())],
)
def test_both_packages_take_a_bare_callback(callback_class: Any, arguments: Any, package: str) -> None:
    assert issubclass(callback_class, importlib.import_module(package).Callback)
    runner = trainer(package, callbacks=callback_class(*arguments))
    assert any(isinstance(callback, callback_class) for callback in runner.callbacks)


@pytest.mark.parametrize(
    ("callback_class", "arguments", "message"),
    [
        (PowerIteration, {"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        (PowerIteration, {"num_iterations": 0}, "`num_iterations` must be at least 1"),
        (PowerIteration, {"tolerance": 0.0}, "`tolerance` must be a finite number > 0"),
        (CurvatureMonitor, {"every_n_steps": 0}, "`every_n_steps` must be at least 1"),
        (CurvatureMonitor, {"every_n_epochs": 0}, "`every_n_epochs` must be at least 1"),
        (CurvatureMonitor, {"every_n_steps": 1, "every_n_epochs": 1}, "exclude each other, got 1 and 1"),
    ],
)
def test_bad_arguments_are_refused(callback_class: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        callback_class(**arguments)


def test_penalty_callback_refuses_other_things() -> None:
    with pytest.raises(TypeError, match="must return a list of penalties"):
        PenaltyCallback([1.0])  # type: ignore[list-item]


@pytest.mark.parametrize("package", PACKAGES)
def test_penalty_callback_equals_the_mixin_and_is_undone(package: str) -> None:
    base = plain_classifier(package)

    class WithMixin(LCNNMixin, base):
        def configure_penalties(self) -> list[Any]:
            return [CurvaturePenalty(weight=0.3)]

    by_mixin, by_callback = WithMixin(), base()
    trainer(package).fit(by_mixin, loader(16))
    callbacks = [PenaltyCallback(CurvaturePenalty(weight=0.3)), PowerIteration()]
    runner = trainer(package, callbacks=callbacks)
    runner.fit(by_callback, loader(16))
    for name, value in by_mixin.state_dict().items():
        assert torch.equal(value, by_callback.state_dict()[name]), name
    assert "training_step" not in vars(by_callback)
    assert "lcnn/curvature_penalty" in runner.callback_metrics


def test_penalty_callback_is_undone_after_an_error() -> None:
    class Fails(Plain):
        def training_step(self, batch: Any) -> Any:
            raise RuntimeError("stop")

    module = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(callbacks=[PenaltyCallback(), PowerIteration()]).fit(module, loader(4))
    assert "training_step" not in vars(module)


def test_penalty_callback_gives_back_an_own_step() -> None:
    module = Plain()
    own = module.training_step
    module.training_step = own
    trainer(callbacks=[PenaltyCallback(), PowerIteration()]).fit(module, loader(4))
    assert vars(module)["training_step"] is own


def test_penalty_callback_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="Low has LCNNMixin, which adds the penalties already"):
        trainer(callbacks=[PenaltyCallback()]).fit(Low(), loader(4))
    module = Plain()
    module.automatic_optimization = False
    with pytest.raises(TypeError, match="no loss to add to in Classifier, which optimises manually"):
        trainer(callbacks=[PenaltyCallback()]).fit(module, loader(4))


def test_penalty_callback_asks_for_power_iteration() -> None:
    with pytest.warns(UserWarning, match=r"nothing refreshes their norms: pass PowerIteration\(\)"):
        trainer(callbacks=[PenaltyCallback()]).fit(Plain(), loader(4))
