"""What arrives in TensorBoard, CSV, W&B and MLflow, and what all other loggers are given."""

from __future__ import annotations

import csv
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_lcnn.callbacks import AdversarialTraining, CurvatureMonitor
from lightning_lcnn.callbacks.curvature_monitor import add_histograms, logger_keys
from lightning_lcnn.layers import CenteredSoftplus, SpectralLinear
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty
from tests.lightning_helpers import FILTERS, PACKAGES, loader, plain_classifier, trainer

pytestmark = FILTERS


def low(package: str = "lightning.pytorch", net: nn.Module | None = None) -> Any:
    class Low(LCNNMixin, plain_classifier(package)):
        """A loss that is logged under a key of the user's."""

        def __init__(self) -> None:
            super().__init__()
            if net is not None:
                self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.log("train/loss", loss)
            return loss

    return Low()


LAYERS = {
    "lcnn_beta/net.2",
    "lcnn_beta/net.5",
    "lcnn_gamma/net.1",
    "lcnn_gamma/net.4",
    "lcnn_sigma/net.0",
    "lcnn_sigma/net.4",
    "lcnn_slope/net.1",
    "lcnn_slope/net.4",
    "lcnn_slope/net.6",
    "lcnn_share/net.2",
    "lcnn_share/net.5",
}
TOTALS = {"lcnn/log_ratio", "lcnn/log_slope", "lcnn/log_curvature", "lcnn/curvature_penalty", "lcnn/spectral_residual"}


# --- any logger


def strict_logger(package: str) -> Any:
    """Refuses what any of the usual loggers refuses or drops; keeps the rest."""
    base = importlib.import_module(f"{package}.loggers.logger").DummyLogger
    logger = base()
    logger.seen = {}
    logger.last_step = -1

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        assert step >= logger.last_step  # W&B drops what comes late
        logger.last_step = step
        for key, value in metrics.items():
            assert re.fullmatch(r"[A-Za-z0-9_\-./ ]+", key), key  # MLflow
            assert posixpath.normpath(key) == key, key  # MLflow, whose keys are paths
            assert type(value) in (float, int), (key, value)  # CSV writes what str() gives
            logger.seen.setdefault(key, []).append(step)

    logger.log_metrics = log_metrics
    return logger


@pytest.mark.parametrize("package", PACKAGES)
def test_every_logger_gets_the_same_through_log_metrics(package: str) -> None:
    loggers = [strict_logger(package), strict_logger(package)]
    trainer(package, logger=loggers, callbacks=[CurvatureMonitor()], max_epochs=2).fit(low(package), loader(8))
    assert loggers[0].seen == loggers[1].seen
    assert loggers[0].seen.keys() >= LAYERS | TOTALS | {"train/loss"}
    assert all(loggers[0].seen[key] == [0, 1, 2, 3] for key in LAYERS | TOTALS | {"train/loss"})


class StrangeNames(nn.Module):
    """Names that ModuleDict and add_module allow."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {"a/b": SpectralLinear(36, 4), "β[0]": CenteredSoftplus(), "β(0)": CenteredSoftplus()}
        )
        self.add_module("head #1", nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x.flatten(1))
        return self.get_submodule("head #1")(x)


def test_layer_names_become_keys_that_all_loggers_take() -> None:
    logger = strict_logger("lightning.pytorch")
    trainer(logger=logger, callbacks=[CurvatureMonitor()]).fit(low(net=StrangeNames()), loader(8))
    assert logger.seen.keys() >= {
        "lcnn_sigma/net.parts.a_b",
        "lcnn_beta/net.parts.__0_",
        "lcnn_beta/net.parts.__0__2",
        "lcnn_slope/net.head__1",
        "lcnn_share/net.parts.__0__2",
    }


def test_totals_of_an_untraceable_network_are_those_of_the_penalty() -> None:
    class Branches(type(low())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() < 1e9 else x

        def configure_penalties(self) -> list[Any]:
            return [CurvaturePenalty(submodule="net")]

    logger = strict_logger("lightning.pytorch")
    with pytest.warns(UserWarning, match="CurvatureMonitor logs no totals"):
        trainer(logger=logger, callbacks=[CurvatureMonitor()]).fit(Branches(), loader(12))
    assert logger.seen["lcnn/log_slope"] == [1, 2]  # from the step on that follows the first log


def test_keys() -> None:
    numbers = {"lcnn_beta/": 1.0, "lcnn_beta/a.b-c_1": 2.0, "lcnn_beta/x/y": 3.0, "lcnn_beta/x:y": 4.0, "lcnn/a": 5.0}
    assert logger_keys(numbers) == {
        "lcnn_beta/network": 1.0,
        "lcnn_beta/a.b-c_1": 2.0,
        "lcnn_beta/x_y": 3.0,
        "lcnn_beta/x_y_2": 4.0,
        "lcnn/a": 5.0,
    }


# --- TensorBoard


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("prefix", ["", "mine"])
def test_tensorboard_groups_the_layers(package: str, prefix: str, tmp_path: Path) -> None:
    """Read back: scalars, histograms, and a layout whose charts together show each layer's scalars exactly once."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    logger = importlib.import_module(f"{package}.loggers").TensorBoardLogger(tmp_path, prefix=prefix)
    trainer(package, logger=logger, callbacks=[CurvatureMonitor()]).fit(low(package), loader(12))
    logger.finalize("success")
    read = events.EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "histograms": 0})
    read.Reload()
    start = f"{prefix}-" if prefix else ""
    scalars = read.Tags()["scalars"]
    assert {start + key for key in LAYERS | TOTALS} <= set(scalars)
    assert [event.step for event in read.Scalars(f"{start}lcnn_beta/net.2")] == [0, 1, 2]

    for name, number in (("lcnn/beta", 2), ("lcnn/gamma", 2)):
        histograms = read.Histograms(name)
        assert [event.step for event in histograms] == [0, 1, 2]
        assert {event.histogram_value.num for event in histograms} == {number}
    betas = [read.Scalars(f"{start}lcnn_beta/net.{i}")[-1].value for i in (2, 5)]
    assert read.Histograms("lcnn/beta")[-1].histogram_value.sum == pytest.approx(sum(betas), rel=1e-5)

    (event,) = read.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "low curvature"
    shown = {
        chart.title: {tag for tag in scalars for pattern in chart.multiline.tag if re.match(pattern, tag)}
        for chart in category.chart
    }
    assert shown["beta"] == {start + "lcnn_beta/net.2", start + "lcnn_beta/net.5"}
    assert shown["network"] == {start + f"lcnn/log_{name}" for name in ("ratio", "slope", "curvature")}
    layers = sorted(tag for title, tags in shown.items() if title != "network" for tag in tags)
    assert layers == sorted(start + key for key in LAYERS | {"lcnn_slope/net.0"})


def test_histograms_leave_out_what_they_cannot_count() -> None:
    class Writer:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def add_custom_scalars(self, layout: Any) -> None: ...

        def add_histogram(self, *call: Any) -> None:
            self.calls.append(call)

    logger = type("Logger", (), {"experiment": Writer()})()
    add_histograms(
        [logger, object()], {"lcnn_beta/a": 2.0, "lcnn_beta/b": float("nan"), "lcnn_gamma/a": float("inf")}, 3
    )
    ((name, values, step),) = logger.experiment.calls
    assert (name, values.tolist(), step) == ("lcnn/beta", [2.0], 3)


# --- CSV, W&B, MLflow


@pytest.mark.parametrize("package", PACKAGES)
def test_csv_has_a_column_per_layer(package: str, tmp_path: Path) -> None:
    logger = importlib.import_module(f"{package}.loggers").CSVLogger(tmp_path)
    trainer(package, logger=logger, callbacks=[CurvatureMonitor()]).fit(low(package), loader(12))
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= LAYERS | TOTALS
    values = [(int(row["step"]), float(row["lcnn_beta/net.2"])) for row in rows if row["lcnn_beta/net.2"]]
    assert [step for step, _ in values] == [0, 1, 2]
    assert 3 < values[-1][1] < 5


@pytest.mark.filterwarnings("default")  # of W&B's own dependencies
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    module = low()
    trainer(logger=logger, callbacks=[CurvatureMonitor()]).fit(module, loader(8))
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary.keys() >= LAYERS | TOTALS
    assert summary["lcnn_beta/net.2"] == pytest.approx(module.net[2].beta.item())
    assert summary["trainer/global_step"] == 1


@pytest.mark.filterwarnings("default")  # of MLflow's own dependencies
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_local_store(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    if store == "sqlite":
        pytest.importorskip("sqlalchemy")  # not in mlflow-skinny
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    uri = f"file:{tmp_path}/runs" if store == "file" else f"sqlite:///{tmp_path}/runs.db"
    logger = MLFlowLogger(tracking_uri=uri)
    module = low(net=StrangeNames())
    trainer(logger=logger, callbacks=[CurvatureMonitor()]).fit(module, loader(8))
    assert logger.experiment.get_run(logger.run_id).data.metrics.keys() >= TOTALS | {"lcnn_sigma/net.parts.a_b"}
    history = logger.experiment.get_metric_history(logger.run_id, "lcnn_beta/net.parts.__0_")
    assert [metric.step for metric in history] == [0, 1]
    assert history[-1].value == pytest.approx(module.net.parts["β[0]"].beta.item())


def test_the_radius_schedule_is_logged() -> None:
    logger = strict_logger("lightning.pytorch")
    callback = AdversarialTraining(0.1, bounds=None, schedule=2)
    trainer(logger=logger, callbacks=[callback]).fit(low(), loader(8))
    assert logger.seen["adversarial/radius"] == [0, 1]
