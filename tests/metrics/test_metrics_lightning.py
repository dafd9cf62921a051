"""Metrics in Lightning: validation inside fit (no_grad), standalone validate and test (inference mode), bf16, DDP."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from lightning_lcnn.functional import normalized_curvature
from lightning_lcnn.metrics import AdversarialAccuracy, GradientStability, NormalizedCurvature

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(20, 6, generator=generator), torch.randint(0, 4, (20,), generator=generator))


def classifier(package: str) -> nn.Module:
    library = importlib.import_module(package)

    class Classifier(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Softplus(), nn.Linear(12, 4))
            self.metrics = MetricCollection(
                {
                    "curvature": NormalizedCurvature(),
                    "stability": GradientStability(0.1, max_examples=8),
                    "robust": AdversarialAccuracy(0.2),
                    "fragile": AdversarialAccuracy(0.4),
                }
            )
            self.loss_curvature = NormalizedCurvature("loss")
            self.quantiles = NormalizedCurvature(reduction=["median", 0.9])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch, index):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.metrics.update(self, *batch)
            self.log_dict(self.metrics, on_epoch=True)
            self.loss_curvature(self.net, *batch)
            self.log("loss_curvature", self.loss_curvature, on_step=False, on_epoch=True)
            self.quantiles.update(self, *batch)

        def on_validation_epoch_end(self):
            self.log_dict(self.quantiles.compute())  # a dictionary is logged by its entries
            self.quantiles.reset()

        test_step = validation_step
        on_test_epoch_end = on_validation_epoch_end

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Classifier()


def trainer(package: str, folder, **arguments):
    library = importlib.import_module(package)
    return library.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **arguments,
    )


@pytest.fixture(autouse=True)
def lightning_warnings():
    """Lightning's advice on workers and steps; and torch's notices inside Lightning itself."""
    with warnings.catch_warnings():
        for message in (".*does not have many workers.*", ".*number of training batches.*", ".*LeafSpec.*"):
            warnings.filterwarnings("ignore", message=message)
        yield


@pytest.mark.parametrize("package", PACKAGES)
def test_in_fit_and_in_standalone_validation_and_test(package, tmp_path):
    model = classifier(package)
    runner = trainer(package, tmp_path)
    loader = DataLoader(data(), batch_size=8)
    runner.fit(model, loader, loader)
    in_fit = dict(runner.callback_metrics)
    expected = normalized_curvature(model.eval(), *data().tensors).values
    torch.testing.assert_close(in_fit["curvature"], expected.mean())
    torch.testing.assert_close(in_fit["q0.9"], expected.quantile(0.9))
    assert in_fit["robust"] >= in_fit["fragile"]
    assert all(p.requires_grad for p in model.parameters())
    for stage in (runner.validate, runner.test):
        (alone,) = stage(model, loader, verbose=False)
        assert alone.keys() == in_fit.keys()
        for name, value in alone.items():
            assert value == pytest.approx(in_fit[name].item(), rel=1e-5), name
    runner.fit_loop.max_epochs = 2
    runner.fit(model.train(), loader, loader)  # states filled in inference mode do not get in the way of training


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision, tmp_path):
    model = classifier(PACKAGES[0])
    runner = trainer(PACKAGES[0], tmp_path, precision=precision)
    loader = DataLoader(data(), batch_size=8)
    runner.fit(model, loader, loader)
    in_fit = dict(runner.callback_metrics)
    exact = normalized_curvature(model.float().eval(), *data().tensors).values.mean()
    # mixed precision is switched off while measuring; bfloat16 weights and activations keep 8 bits
    tolerance = 1e-5 if precision == "bf16-mixed" else 0.1
    torch.testing.assert_close(in_fit["curvature"].float(), exact, rtol=tolerance, atol=0)
    assert model.loss_curvature.num_examples.dtype == torch.int64
    assert model.loss_curvature.value_sum.dtype == torch.float32
