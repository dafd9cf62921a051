"""PowerIteration: convergence, intervals, resuming, and what it refuses or warns of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn._compat import layer_sync
from lightning_lcnn.callbacks import PenaltyCallback, PowerIteration
from lightning_lcnn.layers import lcnn_parameter_groups, spectral_layers
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty
from tests.lightning_helpers import FILTERS, PACKAGES, loader, plain_classifier, probe, small_net, trainer

pytestmark = FILTERS
Plain = plain_classifier()


class Low(LCNNMixin, Plain):
    """Adam moves the weights enough that stale vectors would show."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(lcnn_parameter_groups(self), lr=0.01)


def true_norms(net: nn.Sequential) -> list[float]:
    """Largest singular values of the dense Jacobians of the two spectral layers, raw weights, float64."""
    conv, linear = spectral_layers(net)
    weight = conv.weight.detach().double()
    identity = torch.eye(36, dtype=torch.float64).view(36, 1, 6, 6)
    dense = F.conv2d(identity, weight, padding=1).flatten(1)
    return [torch.linalg.matrix_norm(m, 2).item() for m in (dense, linear.weight.detach().double())]


def test_norms_are_converged_when_training_starts() -> None:
    net = small_net()
    with torch.no_grad():
        for layer in spectral_layers(net):
            layer.weight.normal_()
    module, found = Plain(), []
    module.net = net
    expected = true_norms(net)
    check = probe("on_train_start", lambda _, m: found.extend(layer.sigma().item() for layer in spectral_layers(m)))
    trainer(callbacks=[check, PowerIteration()]).fit(module, loader(4))
    assert found == pytest.approx(expected, rel=1e-5)


def test_warning_where_convergence_fails() -> None:
    with pytest.warns(UserWarning, match="raise `max_iterations` or `tolerance` of PowerIteration"):
        trainer(callbacks=[PowerIteration(tolerance=1e-12, max_iterations=1)]).fit(Plain(), loader(4))


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [3, 6]), (2, [3])])
def test_refreshes_once_per_interval_of_optimizer_steps(
    accumulate: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_lcnn.callbacks import power_iteration

    steps: list[int] = []
    runner = trainer(callbacks=[PowerIteration(every_n_steps=3)], accumulate_grad_batches=accumulate)
    update = power_iteration.update_spectral_norm

    def counted(module: nn.Module, num_iterations: int) -> Tensor:
        steps.append(runner.global_step)
        return update(module, num_iterations)

    monkeypatch.setattr(power_iteration, "update_spectral_norm", counted)
    runner.fit(Plain(), loader(32))
    assert steps == expected


def test_residual_is_logged_on_logging_steps() -> None:
    callback = PowerIteration()
    runner = trainer(callbacks=[callback], log_every_n_steps=1)
    runner.fit(Plain(), loader(4))
    assert runner.callback_metrics["lcnn/spectral_residual"] == callback.residual
    runner = trainer(callbacks=[PowerIteration()], log_every_n_steps=10)
    runner.fit(Plain(), loader(4))
    assert "lcnn/spectral_residual" not in runner.callback_metrics


@pytest.mark.parametrize("package", PACKAGES)
def test_resumed_training_is_equal_to_the_last_bit(package: str, tmp_path: Path) -> None:
    """Checkpoint after step 5 of 10, in the middle of an interval of 3."""

    class Low(LCNNMixin, plain_classifier(package)):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(lcnn_parameter_groups(self, weight_decay=0.01), lr=0.02)

        def configure_penalties(self) -> list[Any]:
            return [CurvaturePenalty(weight=0.1, schedule=7)]

    def run(epochs: int, **kwargs: Any) -> tuple[Any, Any]:
        module = Low()
        callbacks = [PowerIteration(every_n_steps=3)]
        runner = trainer(
            package, max_epochs=epochs, callbacks=callbacks, precision="bf16-mixed", accumulate_grad_batches=2
        )
        runner.fit(module, loader(40), **kwargs)
        return runner, module

    _, straight = run(2)
    runner, first = run(1)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    _, second = run(2, ckpt_path=tmp_path / "one.ckpt")
    states = [m.state_dict() for m in (straight, second, first)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert not torch.equal(states[0]["net.0.right_vector"], states[2]["net.0.right_vector"])


def test_resume_without_the_callbacks_state_converges_again(tmp_path: Path) -> None:
    runner = trainer()
    runner.fit(Plain(), loader(4))
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    callback = PowerIteration()
    trainer(callbacks=[callback], max_epochs=2).fit(Plain(), loader(4), ckpt_path=tmp_path / "plain.ckpt")
    assert float(callback.residual) <= callback.tolerance


def test_second_fit_goes_on_and_a_new_trainer_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lcnn.callbacks import power_iteration

    resets = []
    reset = power_iteration.reset_spectral_norm
    monkeypatch.setattr(power_iteration, "reset_spectral_norm", lambda *a: resets.append(1) or reset(*a))
    callback, module = PowerIteration(), Plain()
    runner = trainer(callbacks=[callback])
    runner.fit(module, loader(4))
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader(4))
    assert len(resets) == 1
    trainer(callbacks=[callback]).fit(Plain(), loader(4))
    assert len(resets) == 2


def test_network_without_spectral_layers_is_left_alone() -> None:
    module = Plain()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    callback = PowerIteration()
    trainer(callbacks=[callback]).fit(module, loader(4))
    assert callback.residual is None


class Strategy:
    """Stands for a strategy that needs hardware this test run has not."""

    zero_stage_3 = True


@pytest.mark.parametrize(
    ("name", "message"), [("FSDPStrategy", "FSDP1"), ("DeepSpeedStrategy", "DeepSpeed ZeRO stage 3")]
)
@pytest.mark.parametrize("callback", [PowerIteration(), PenaltyCallback()], ids=lambda c: type(c).__name__)
def test_sharding_strategies_are_refused(callback: Any, name: str, message: str) -> None:
    runner = type("Trainer", (), {"strategy": type(name, (Strategy,), {})(), "callbacks": [PowerIteration()]})()
    with pytest.raises(ValueError, match=rf"`strategy` {name} \({message}\).*Use strategy='ddp'"):
        callback.setup(runner, Plain(), "fit")


def test_deepspeed_stage_2_is_taken() -> None:
    strategy = type("DeepSpeedStrategy", (Strategy,), {"zero_stage_3": False})()
    PowerIteration().setup(type("Trainer", (), {"strategy": strategy})(), Plain(), "fit")


@pytest.mark.parametrize("package", PACKAGES)
def test_lightnings_flag_synchronises_batch_norms_and_keeps_gamma(package: str) -> None:
    runner = trainer(package, strategy="ddp", sync_batchnorm=True)
    lightnings, module, callback = layer_sync(runner.strategy), Plain(), PowerIteration()
    with pytest.raises(TypeError, match=r"would be replaced .* pass PowerIteration\(\) to the trainer"):
        lightnings.apply(small_net())
    callback.setup(runner, module, "fit")
    module.net.append(nn.BatchNorm1d(3))
    assert layer_sync(runner.strategy).apply(module) is module
    assert module.net[1].synchronized
    assert type(module.net[7]) is nn.SyncBatchNorm
    layer_sync(runner.strategy).revert(module)
    assert not module.net[1].synchronized
    assert type(module.net[7]) is not nn.SyncBatchNorm
    callback.teardown(runner, module, "fit")
    assert layer_sync(runner.strategy) is lightnings


def test_warning_where_the_optimizer_decays_beta_and_gamma() -> None:
    class Decays(Low):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), weight_decay=0.01)

    with pytest.warns(UserWarning, match=r"decays net.1.log_gamma, .* and 1 more, .*`lcnn_parameter_groups\(self"):
        trainer().fit(Decays(), loader(4))


def test_warning_where_no_optimizer_has_beta() -> None:
    class Lacks(Low):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for n, p in self.named_parameters() if "log_beta" not in n], lr=0.1)

    with pytest.warns(UserWarning, match="No optimizer has net.2.log_beta, net.5.log_beta, so they keep"):
        trainer().fit(Lacks(), loader(4))
