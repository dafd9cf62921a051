"""Small LightningModules, data and trainers for the tests of mixin and callbacks, under both import names."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    SpectralConv2d,
    SpectralLinear,
    lcnn_parameter_groups,
)

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

# Lightning's own remarks, each of which the tests provoke on purpose.
FILTERS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),  # in-process data
    pytest.mark.filterwarnings(
        "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated"
    ),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log\\(\\)` but the `self.trainer` reference"),
]

COMPILER_WARNINGS = pytest.mark.filterwarnings(  # inside torch's compiler and exporter
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


def small_net(seed: int = 0, gamma: float = 0.5) -> nn.Sequential:
    """Convolution, batch norm, activation, linear layer; for inputs (B, 1, 6, 6) and 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            SpectralConv2d(1, 4, 3, padding=1, input_size=(6, 6)),
            LipschitzBatchNorm2d(4, gamma=gamma),
            CenteredSoftplus(beta=4.0),
            nn.Flatten(),
            SpectralLinear(4 * 36, 8, gamma=2.0),
            CenteredSoftplus(beta=6.0),
            nn.Linear(8, 3),
        )


def examples(n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs (n, 1, 6, 6) and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def loader(n: int = 16, batch_size: int = 4, seed: int = 0) -> DataLoader[Any]:
    """Unshuffled batches of the examples."""
    return DataLoader(TensorDataset(*examples(n, seed)), batch_size=batch_size)


def trainer(package: str = "lightning.pytorch", **kwargs: Any) -> Any:
    """A quiet trainer on the CPU."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return importlib.import_module(package).Trainer(**(defaults | kwargs))


def lightning_module(package: str = "lightning.pytorch") -> Any:
    """The package's LightningModule class."""
    return importlib.import_module(package).LightningModule


def plain_classifier(package: str = "lightning.pytorch") -> Any:
    """A LightningModule class as users have it, knowing nothing of low curvature."""

    class Classifier(lightning_module(package)):
        learning_rate = 0.1

        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(lcnn_parameter_groups(self), lr=self.learning_rate)

    return Classifier


def probe(hook: str, function: Any) -> Any:
    """A callback of Lightning's that calls ``function(trainer, module)`` in one hook."""
    from lightning.pytorch import Callback

    return type("Probe", (Callback,), {hook: lambda self, trainer, module, *_, **__: function(trainer, module)})()
