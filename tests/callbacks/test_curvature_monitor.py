"""CurvatureMonitor: when it logs, what it logs, and who sees it."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.callbacks import CurvatureMonitor, PowerIteration
from lightning_lcnn.layers import CenteredSoftplus, lcnn_parameter_groups
from lightning_lcnn.mixin import LCNNMixin
from tests.lightning_helpers import FILTERS, PACKAGES, loader, plain_classifier, probe, small_net, trainer

pytestmark = FILTERS
Plain = plain_classifier()


class Low(LCNNMixin, Plain):
    """Adam moves the weights enough that stale vectors would show."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(lcnn_parameter_groups(self), lr=0.01)


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
