"""Fits on two processes, run as a script by test_distributed.py; every rank writes what it ended with.

Arguments: strategy, package, folder for the results, and names of the scenarios below.
"""

from __future__ import annotations

import atexit
import copy
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_lcnn.callbacks import CurvatureMonitor, PenaltyCallback, PowerIteration
from lightning_lcnn.callbacks.base import Callback
from lightning_lcnn.kernels.modes import whole
from lightning_lcnn.layers import (
    CenteredSoftplus,
    SpectralConv2d,
    SpectralLinear,
    convert_sync_batchnorm,
    lcnn_parameter_groups,
)
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty, Penalty
from tests.lightning_helpers import examples, loader, plain_classifier, small_net, trainer

PACKAGE = os.environ.get("LCNN_TEST_PACKAGE", "lightning.pytorch")
Plain = plain_classifier(PACKAGE)


def net_without_batch_norm() -> nn.Sequential:
    """Nothing in it couples the examples of a batch."""
    net = small_net()
    net[1] = nn.Identity()
    return net


class Sharded(Plain):
    """Rank r sees every second example from r on, so that both together see what one process would."""

    def train_dataloader(self) -> Any:
        x, y = examples(24)
        shard = slice(self.trainer.global_rank, None, self.trainer.world_size)
        return DataLoader(TensorDataset(x[shard], y[shard]), batch_size=4 // self.trainer.world_size)


class Low(LCNNMixin, Sharded):
    """SGD, so that the weights show the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net_without_batch_norm()

    def configure_penalties(self) -> list[Penalty]:
        return [CurvaturePenalty(weight=0.3)]


class ByCallback(Sharded):
    """The same without the mixin."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net_without_batch_norm()


class Stranger(LCNNMixin, Plain):
    """Dict, AdamW, batch norm; weights that differ between the ranks until DDP levels them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net(seed=int(os.environ.get("LOCAL_RANK", 0)), gamma=50.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lcnn_parameter_groups(self, weight_decay=0.05), lr=0.02)


class Synchronised(Low):
    """Batch norm over both ranks, and an optimizer with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # one group: ModelParallelStrategy assigns the states in a full checkpoint by the order in the model
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


class ModelParallel(Synchronised):
    """The same with every weight in shards; the activations stay with the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        self.net = convert_sync_batchnorm(small_net())
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net[0], self.net[4], self.net):
            fully_shard(part, mesh=mesh)


class Standard(Plain):
    """The usual layers, for the count of collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
        )


class Converted(LCNNMixin, Plain):
    """The same with our layers; the first convolution does not know its input size yet."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            SpectralConv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            CenteredSoftplus(),
            nn.Flatten(),
            SpectralLinear(144, 3),
        )


def leave() -> None:
    """Destroy the process group; gloo's threads may abort a process that exits without, also one that was spawned."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Save(Callback):
    """Write the state of this rank when the fit ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        atexit.register(leave)
        state = {name: whole(value).clone() for name, value in pl_module.state_dict().items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result = {"state": state, "step": trainer.global_step, "metrics": metrics}
        torch.save(result, f"{self.path}-{trainer.global_rank}.pt")


class Count(Callback):
    """Count the collectives of four steps, once DDP has settled its buckets, and the size of what it broadcasts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profile.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.profile.__exit__(None, None, None)
            names = [event.name for event in self.profile.events() if event.name.startswith("c10d::")]
            buffers = sum(buffer.numel() for buffer in trainer.model.modules_buffers)
            torch.save({"collectives": names, "buffers": buffers}, f"{self.path}-{trainer.global_rank}.pt")


def run(module: Any, name: str, callbacks: list[Any], **kwargs: Any) -> Any:
    fit = {key: kwargs.pop(key) for key in ("ckpt_path", "train_dataloaders", "val_dataloaders") if key in kwargs}
    options = {"max_epochs": 1, "strategy": STRATEGY} | kwargs
    runner = trainer(PACKAGE, devices=2, callbacks=[Save(OUT / name), *callbacks], **options)
    runner.fit(module, **fit)
    return runner


def mixin() -> None:
    run(Low(), "mixin", [PowerIteration(every_n_steps=2)], use_distributed_sampler=False)


def callback() -> None:
    callbacks = [PowerIteration(every_n_steps=2), PenaltyCallback(CurvaturePenalty(weight=0.3))]
    run(ByCallback(), "callback", callbacks, use_distributed_sampler=False)


def collectives() -> None:
    run(Standard(), "standard", [Count(OUT / "standard-count")], train_dataloaders=loader(24, batch_size=2))
    callbacks = [PowerIteration(every_n_steps=2), CurvatureMonitor(), Count(OUT / "converted-count")]
    run(Converted(), "converted", callbacks, train_dataloaders=loader(24, batch_size=2))


def stranger() -> None:
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
    callbacks = [CurvatureMonitor(), PowerIteration(every_n_steps=4)]
    data = {"train_dataloaders": loader(24, batch_size=2), "val_dataloaders": loader(8)}
    run(Stranger(), "straight", copy.deepcopy(callbacks), max_epochs=2, **options, **data)
    runner = run(Stranger(), "half", copy.deepcopy(callbacks), **options, **data)
    runner.save_checkpoint(OUT / "half.ckpt")
    run(Stranger(), "resumed", copy.deepcopy(callbacks), max_epochs=2, ckpt_path=OUT / "half.ckpt", **options, **data)


def watched() -> list[Any]:
    return [PowerIteration(every_n_steps=2), CurvatureMonitor(certified=True)]


def resume() -> None:
    """One epoch on two processes, for one to go on with; a second epoch after one that a single process did."""
    options = {"sync_batchnorm": True, "use_distributed_sampler": False, "val_dataloaders": loader(8)}
    run(Synchronised(), "two-half", watched(), **options).save_checkpoint(OUT / "two.ckpt")
    run(Synchronised(), "one-two", watched(), max_epochs=2, ckpt_path=OUT / "one.ckpt", **options)


def model_parallel() -> None:
    """The same in shards."""
    strategy = importlib.import_module(f"{PACKAGE}.strategies").ModelParallelStrategy
    data = {"use_distributed_sampler": False, "val_dataloaders": loader(8)}

    def shards() -> Any:
        return strategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)

    run(ModelParallel(), "shards-half", watched(), strategy=shards(), **data).save_checkpoint(OUT / "shards.ckpt")
    for name in ("shards", "one"):
        options = {"max_epochs": 2, "ckpt_path": OUT / f"{name}.ckpt", **data}
        run(ModelParallel(), f"{name}-shards", watched(), strategy=shards(), **options)


SCENARIOS = {f.__name__: f for f in (mixin, callback, collectives, stranger, resume, model_parallel)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    STRATEGY, OUT = sys.argv[1], Path(sys.argv[2])
    for scenario in sys.argv[3:]:
        SCENARIOS[scenario]()
