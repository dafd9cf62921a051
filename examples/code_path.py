"""Which files and functions of the package one training step, one conversion and one fold pass through.

    python examples/code_path.py            # the totals
    python examples/code_path.py --files    # with the files, in the order in which they are entered

Whoever reads one of the three reads these files; tests/test_code_path.py keeps their number down.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import lightning_lcnn
import lightning_lcnn.callbacks.base
from lightning_lcnn import CurvatureMonitor, LCNNMixin, fold, lcnn_parameter_groups, to_low_curvature

PACKAGE = str(Path(lightning_lcnn.__file__).parent)


class CodePath:
    """Files and functions in the order in which they were entered."""

    def __init__(self) -> None:
        self.codes: dict[CodeType, None] = {}

    @property
    def files(self) -> list[str]:
        """Files, relative to the package."""
        return list(dict.fromkeys(str(Path(code.co_filename).relative_to(PACKAGE)) for code in self.codes))

    def __str__(self) -> str:
        return f"{len(self.files)} files, {len(self.codes)} functions"


@contextmanager
def recorded() -> Iterator[CodePath]:
    """Record the package's own functions that the body enters, without comprehensions and modules."""
    path = CodePath()

    def enter(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name[0] + code.co_name[-1] != "<>":
            path.codes[code] = None

    sys.setprofile(enter)
    try:
        yield path
    finally:
        sys.setprofile(None)


def network() -> nn.Sequential:
    """Three layers with weights, batch norms and activations between them."""
    hidden = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


class Classifier(LCNNMixin, LightningModule):
    """What a user writes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = to_low_curvature(network(), torch.randn(2, 1, 8, 8))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD without decay of β and γ."""
        return torch.optim.SGD(lcnn_parameter_groups(self, weight_decay=1e-4), lr=0.01)


class _OneStep(lightning_lcnn.callbacks.base.Callback):
    """Record one step between the others: from the hooks before it, to which it comes first, to those after it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.path: CodePath | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            self._recording = recorded()
            self.path = self._recording.__enter__()
        elif batch_idx == self.step + 1:
            self._recording.__exit__(None, None, None)


def step_path(every_n_steps: int = 1000) -> CodePath:
    """One step with the default penalty and a logging monitor; every so many steps the spectral norms are refreshed."""
    data = torch.utils.data.TensorDataset(torch.randn(24, 1, 8, 8), torch.randint(10, (24,)))
    loader = torch.utils.data.DataLoader(data, 8)
    recorder = _OneStep(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            default_root_dir=folder,
            callbacks=[recorder, CurvatureMonitor(), lightning_lcnn.PowerIteration(every_n_steps)],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Classifier(), loader)
    assert recorder.path is not None
    return recorder.path


def conversion_path() -> CodePath:
    """``to_low_curvature`` of the three layers."""
    net, example = network(), torch.randn(2, 1, 8, 8)
    with recorded() as path:
        to_low_curvature(net, example)
    return path


def fold_path() -> CodePath:
    """``fold`` of the result."""
    net = to_low_curvature(network(), torch.randn(2, 1, 8, 8))
    with recorded() as path:
        fold(net)
    return path


PATHS: dict[str, Callable[[], CodePath]] = {
    "step": step_path,
    "step with a refresh": lambda: step_path(1),
    "conversion": conversion_path,
    "fold": fold_path,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="name the files")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name, record in PATHS.items():
        path = record()
        print(f"{name}: {path}")
        if arguments.files:
            print("".join(f"    {file}\n" for file in path.files), end="")


if __name__ == "__main__":
    main()
