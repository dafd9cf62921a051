"""Power iteration, curvature monitor and the penalty callback, in trainers of both packages."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.callbacks import CurvatureMonitor, PenaltyCallback, PowerIteration
from lightning_lcnn.layers import CenteredSoftplus, lcnn_parameter_groups, spectral_layers
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty
from tests.lightning_helpers import FILTERS, PACKAGES, loader, plain_classifier, small_net, trainer

pytestmark = FILTERS
Plain = plain_classifier()


class Low(LCNNMixin, Plain):
    """Adam moves the weights enough that stale vectors would show."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(lcnn_parameter_groups(self), lr=0.01)


def probe(hook: str, function: Any) -> Any:
    """A callback of Lightning's that calls ``function(trainer, module)`` in one hook."""
    from lightning.pytorch import Callback

    return type("Probe", (Callback,), {hook: lambda self, trainer, module, *_, **__: function(trainer, module)})()


# --- contract of every callback


@pytest.mark.parametrize(
    "callback", [PowerIteration(every_n_steps=2), CurvatureMonitor(), PenaltyCallback()], ids=lambda c: type(c).__name__
)
def test_copies_and_pickles_work(callback: Any) -> None:
    companions = [] if isinstance(callback, PowerIteration) else [PowerIteration()]
    for twin in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        trainer(callbacks=[twin, *companions]).fit(Plain(), loader(4))
        copy.deepcopy(twin)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("callback_class", [PowerIteration, CurvatureMonitor, PenaltyCallback])
def test_both_packages_take_a_bare_callback(callback_class: Any, package: str) -> None:
    assert issubclass(callback_class, importlib.import_module(package).Callback)
    runner = trainer(package, callbacks=callback_class())
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


# --- power iteration


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


# --- penalty callback


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


# --- curvature monitor


def recorder(package: str = "lightning.pytorch") -> Any:
    """A logger that keeps what it is given."""
    base = importlib.import_module(f"{package}.loggers.logger").DummyLogger
    logger = base()
    logger.records = []  # (step, metrics)
    logger.log_metrics = lambda metrics, step=None: logger.records.append((step, dict(metrics)))
    return logger


def monitored(logger: Any) -> list[int]:
    return [step for step, metrics in logger.records if any(key.startswith("lcnn_beta/") for key in metrics)]


@pytest.mark.parametrize(
    ("arguments", "log_every", "expected"),
    [
        ({}, 3, [2, 4, 5, 8, 9]),  # logging steps of 2 epochs of 5 steps, and the epochs' ends
        ({}, 50, [4, 9]),
        ({"every_n_steps": 4}, 1, [3, 7]),
        ({"every_n_epochs": 2}, 1, [9]),
    ],
)
def test_monitor_logs_when_asked(arguments: dict[str, int], log_every: int, expected: list[int]) -> None:
    logger = recorder()
    runner = trainer(
        logger=logger, callbacks=[CurvatureMonitor(**arguments)], log_every_n_steps=log_every, max_epochs=2
    )
    runner.fit(Low(), loader(20))
    assert monitored(logger) == expected


def test_monitor_logs_each_optimizer_step_once_under_accumulation() -> None:
    logger = recorder()
    trainer(logger=logger, callbacks=[CurvatureMonitor()], accumulate_grad_batches=2).fit(Low(), loader(16))
    assert monitored(logger) == [0, 1]


def test_monitored_values() -> None:
    logger = recorder()
    module = Low()
    trainer(logger=logger, callbacks=[CurvatureMonitor()]).fit(module, loader(4))
    (values,) = [metrics for _, metrics in logger.records if "lcnn/log_ratio" in metrics]
    net = module.net.eval()
    conv, norm, first, _, linear, second, head = net
    assert values["lcnn_beta/net.2"] == pytest.approx(first.beta.item())
    assert values["lcnn_beta/net.5"] == pytest.approx(second.beta.item())
    assert values["lcnn_gamma/net.1"] == pytest.approx(norm.gamma.item())
    assert values["lcnn_slope/net.1"] == pytest.approx(norm.slope().item())
    assert values["lcnn_slope/net.4"] == pytest.approx(linear.gamma.item())
    assert values["lcnn_sigma/net.0"] == pytest.approx(conv.sigma().item())
    # plain multiplication along the chain
    slopes = [norm.slope().item(), linear.gamma.item(), values["lcnn_slope/net.6"]]
    parts = [first.beta.item() / 4 * slopes[0], second.beta.item() / 4 * slopes[0] * slopes[1]]
    assert slopes[2] >= torch.linalg.matrix_norm(head.weight, 2).item()
    assert values["lcnn/log_ratio"] == pytest.approx(math.log(sum(parts)), abs=1e-5)
    assert values["lcnn/log_slope"] == pytest.approx(math.log(math.prod(slopes)), abs=1e-5)
    assert values["lcnn/log_curvature"] == pytest.approx(values["lcnn/log_ratio"] + values["lcnn/log_slope"], abs=1e-5)
    assert values["lcnn_share/net.2"] == pytest.approx(parts[0] / sum(parts), rel=1e-4)
    assert values["lcnn_share/net.2"] + values["lcnn_share/net.5"] == pytest.approx(1.0)


@pytest.mark.parametrize("package", PACKAGES)
def test_curves_arrive_in_tensorboard(package: str, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = importlib.import_module(f"{package}.loggers")

    class Low(LCNNMixin, plain_classifier(package)):
        pass

    both = [loggers.TensorBoardLogger(tmp_path), loggers.CSVLogger(tmp_path / "csv")]
    trainer(package, logger=both, callbacks=[CurvatureMonitor()]).fit(Low(), loader(16))
    both[0].finalize("success")
    read = events.EventAccumulator(both[0].log_dir)
    read.Reload()
    tags = set(read.Tags()["scalars"])
    assert {
        "lcnn_beta/net.2",
        "lcnn_share/net.5",
        "lcnn_slope/net.1",
        "lcnn/log_ratio",
        "lcnn/curvature_penalty",
    } <= tags
    assert [event.step for event in read.Scalars("lcnn_beta/net.2")] == [0, 1, 2, 3]
    assert "lcnn_sigma/net.0" in Path(both[1].log_dir, "metrics.csv").read_text()


@pytest.mark.parametrize("validate", [False, True])
def test_totals_reach_checkpoints_and_early_stopping(validate: bool, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    class Validates(Low):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    best = ModelCheckpoint(tmp_path, monitor="lcnn/log_ratio", save_top_k=1)
    stop = EarlyStopping("lcnn/log_ratio", mode="max", patience=1, min_delta=100.0, strict=True)
    runner = trainer(
        callbacks=[CurvatureMonitor(), best, stop], enable_checkpointing=True, max_epochs=6, num_sanity_val_steps=1
    )
    runner.fit((Validates if validate else Low)(), loader(8), *([loader(4)] if validate else []))
    assert best.best_model_score is not None
    assert math.isfinite(best.best_model_score)
    assert runner.current_epoch == 2  # nothing rises by 100


def test_certified_totals() -> None:
    class Validates(Low):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    module = Validates()
    runner = trainer(callbacks=[CurvatureMonitor(certified=True)])
    runner.fit(module, loader(8), loader(4))
    bound = network_bound(module.net.eval(), torch.zeros(1, 1, 6, 6))
    assert runner.callback_metrics["lcnn/certified_slope"].item() == pytest.approx(bound.slope)
    assert runner.callback_metrics["lcnn/certified_curvature"].item() == pytest.approx(bound.curvature)
    runner.validate(module, loader(4), verbose=False)  # under inference mode
    assert "lcnn/certified_curvature" in runner.callback_metrics


def test_untraceable_networks_are_monitored_by_layer() -> None:
    class Branches(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() < 1e9 else x

    logger = recorder()
    with pytest.warns(UserWarning, match="CurvatureMonitor logs no totals and no curvature shares") as caught:
        trainer(logger=logger, callbacks=[CurvatureMonitor(), PowerIteration()]).fit(Branches(), loader(16))
    assert len([w for w in caught if "CurvatureMonitor" in str(w.message)]) == 1
    assert monitored(logger) == [0, 1, 2, 3]
    assert not any("lcnn/log_ratio" in metrics for _, metrics in logger.records)


def test_steps_without_logging_cost_less_than_a_millisecond() -> None:
    """Measured: 3 microseconds, for any number of layers; the limit leaves room for a busy machine."""
    monitor, costs = CurvatureMonitor(), []

    def timed(runner: Any, module: Any) -> None:
        start = time.perf_counter()
        for _ in range(100):
            CurvatureMonitor.on_train_batch_end(monitor, runner, module, None, None, 0)
        costs.append((time.perf_counter() - start) / 100)

    module = Low()
    module.net = nn.Sequential(small_net(), *(CenteredSoftplus() for _ in range(100)))
    checks = [monitor, probe("on_train_batch_end", timed)]
    trainer(logger=recorder(), callbacks=checks, log_every_n_steps=50).fit(module, loader(16))
    assert sorted(costs)[len(costs) // 2] < 1e-3
