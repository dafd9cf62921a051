"""Adaptive interval of PowerIteration: how it grows and shrinks, in training, and across an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.callbacks.power_iteration import AdaptiveInterval
from lightning_lcnn.layers import SpectralLinear, lcnn_parameter_groups
from lightning_lcnn.layers.upkeep import spectral_norms
from lightning_lcnn.mixin import LCNNMixin
from tests.lightning_helpers import FILTERS, loader, plain_classifier, trainer

pytestmark = FILTERS
Plain = plain_classifier()


def refreshes(changes: list[float], steps: int) -> list[int]:
    """Steps at which a schedule refreshes when the refreshes find these changes."""
    schedule, found = AdaptiveInterval(max_change=0.02), []
    schedule.refreshed(0, None)
    for step in range(1, steps):
        if schedule.is_due(step):
            schedule.refreshed(step, torch.tensor(changes[min(len(found), len(changes) - 1)]))
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([0.001], [10, 30, 70, 150, 230, 310]),  # doubles up to 80
        ([0.01], [10, 20, 30, 40]),  # between a quarter of the limit and the limit: stays
        ([0.5], [10, 20, 30, 40]),  # never below 10
        ([0.001, 0.001, 0.5], [10, 30, 70, 90, 100]),  # 40, then 20, then 10
        ([float("nan")], [10, 20, 30]),
    ],
)
def test_interval_follows_the_change(changes: list[float], expected: list[int]) -> None:
    assert refreshes(changes, expected[-1] + 1) == expected


def test_state_goes_on_to_the_same_step() -> None:
    first, second = AdaptiveInterval(0.02), AdaptiveInterval(0.02)
    first.refreshed(100, torch.tensor(1e-4))
    second.load_state(first.state())
    due = [next(s for s in range(101, 200) if schedule.is_due(s)) for schedule in (first, second)]
    assert due == [120, 120]


def test_norms_of_a_network() -> None:
    net = nn.Sequential(SpectralLinear(3, 4), nn.ReLU(), SpectralLinear(4, 2))
    expected = [torch.linalg.matrix_norm(layer.weight.double(), 2).item() for layer in (net[0], net[2])]
    assert spectral_norms(net).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="has no spectral layer"):
        spectral_norms(nn.ReLU())


def run(rate: float, monkeypatch: pytest.MonkeyPatch, epochs: int = 1, path: Path | None = None) -> tuple[Any, list]:
    """Train for 64 steps an epoch; return the trainer and the steps of the refreshes."""
    from lightning_lcnn.callbacks import power_iteration

    class Low(LCNNMixin, Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(lcnn_parameter_groups(self), lr=rate)

    steps: list[int] = []
    runner = trainer(callbacks=[PowerIteration(every_n_steps="auto")], max_epochs=epochs)
    update = power_iteration.update_spectral_norm

    def counted(module: nn.Module, num_iterations: int) -> Tensor:
        steps.append(runner.global_step)
        return update(module, num_iterations)

    with monkeypatch.context() as patch:
        patch.setattr(power_iteration, "update_spectral_norm", counted)
        torch.manual_seed(0)
        module = Low()
        runner.fit(module, loader(256), ckpt_path=path)
    runner.trained = module
    return runner, steps


def test_training_refreshes_as_often_as_the_norms_change(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(1e-6, monkeypatch)[1] == [10, 30]
    assert run(0.5, monkeypatch)[1] == [10, 20, 30, 40, 50, 60]


def test_resumed_training_refreshes_at_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    straight, expected = run(0.02, monkeypatch, epochs=2)
    half, before = run(0.02, monkeypatch)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, after = run(0.02, monkeypatch, epochs=2, path=tmp_path / "half.ckpt")
    assert before + after == expected
    assert len({b - a for a, b in zip([0, *expected], expected, strict=False)}) > 1  # the interval did change
    for a, b in zip(straight.trained.state_dict().values(), resumed.trained.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`every_n_steps` must be an integer or 'auto', got 'often'"):
        PowerIteration(every_n_steps="often")
    with pytest.raises(ValueError, match="`max_change` must be a finite number > 0, got 0"):
        PowerIteration(every_n_steps="auto", max_change=0)
