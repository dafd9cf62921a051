"""One training run: the Lightning module, its batches, its history, and resuming."""

from __future__ import annotations

import csv
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from comparison.methods import Method
from comparison.presets import Data, Options, Preset, Split
from lightning_lcnn import CurvatureMonitor, LCNNMixin, lcnn_parameter_groups
from lightning_lcnn.data import shift_and_mirror
from lightning_lcnn.layers import CenteredSoftplus
from lightning_lcnn.models import Normalize
from lightning_lcnn.penalties import Penalty


class DivergedError(RuntimeError):
    """The loss is NaN or infinite."""


class Study(LCNNMixin, L.LightningModule):
    """Cross-entropy, SGD with momentum, one-cycle learning rate; pixels are normalised inside the module."""

    def __init__(self, network: nn.Module, method: Method, options: Options, preset: Preset) -> None:
        super().__init__()
        self.network = nn.Sequential(Normalize(*preset.normalize), network)
        self.method, self.options, self.preset = method, options, preset

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images in [0, 1]."""
        return self.network(x)

    def configure_penalties(self) -> list[Penalty]:
        """Those of the method."""
        return self.method.penalties(self.options)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.trainer.datamodule.epoch_seed)  # augmentation and attacks of a resumed run

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise DivergedError(f"the loss became {loss.item()} in epoch {self.current_epoch}")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        right = (self(images).argmax(1) == labels).float().mean()
        self.log("val_accuracy", right, batch_size=len(labels), prog_bar=True)

    def configure_optimizers(self) -> dict:
        rate = float(self.options.get("learning_rate", self.preset.learning_rate))
        groups = lcnn_parameter_groups(self, weight_decay=self.preset.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """Shuffled batches from tensors that stay on their device; an epoch's order follows from seed and epoch."""

    def __init__(self, split: Split, batch_size: int, augment: bool = False, seed: int | None = None) -> None:
        self.split, self.batch_size, self.augment, self.seed = split, batch_size, augment, seed

    def __len__(self) -> int:
        count = len(self.split.labels)
        return count // self.batch_size if self.seed is not None else math.ceil(count / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.split.labels))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed))
        for rows in order.split(self.batch_size)[: len(self)]:
            batch = self.split[rows.to(self.split.labels.device)]
            images = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
            yield (shift_and_mirror(images, images.shape[-1] // 8) if self.augment else images), batch.labels


class StudyData(L.LightningDataModule):
    """New batches each epoch, so that a resumed run sees what an uninterrupted one sees."""

    def __init__(self, data: Data, preset: Preset, seed: int) -> None:
        super().__init__()
        self.data, self.preset, self.seed = data, preset, seed

    @property
    def epoch_seed(self) -> int:
        """Decides all random numbers of the present epoch."""
        return 1000 * self.seed + (self.trainer.current_epoch if self.trainer is not None else 0)

    def train_dataloader(self) -> Batches:
        """All training images, in the order of this epoch."""
        return Batches(self.data.train, self.preset.batch_size, self.preset.augment, self.epoch_seed)

    def val_dataloader(self) -> Batches:
        """The validation images."""
        return Batches(self.data.validation, 500)


class History(L.Callback):
    """Losses, accuracies and processor time of each epoch, in a CSV file and in the checkpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = seconds()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop the clock: validation is the same for all methods."""
        self._seconds = seconds() - self._start

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the whole file again."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        row = {"epoch": trainer.current_epoch, "seconds_per_step": self._seconds / trainer.num_training_batches}
        self.rows.append({**row, **metrics})
        with self.file.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted({key for row in self.rows for key in row}))
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after them."""
        self.rows = state["rows"]


def seconds() -> float:
    """Processor time, or wall time where a GPU does the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def train(method: Method, options: Options, preset: Preset, data: Data, seed: int, folder: Path) -> dict[str, Any]:
    """One run, resumed where it was interrupted; its record is also in run.json, its network in network.pt."""
    settings = settings_of(method, options, preset, seed)
    file = folder / "run.json"
    if file.exists():
        return check_settings(json.loads(file.read_text()), settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    network = preset.make_network(data.num_classes)
    if method.start is not None:
        started = folder.parent.parent / method.start / folder.name / "network.pt"
        if not started.exists():
            raise ValueError(f"method {method.name} goes on from {method.start}: run that with the same seed first")
        network = torch.load(started, weights_only=False)[1].train()
    module = Study(method.network(network, data.example, options), method, options, preset)
    history = History(folder / "history.csv")
    callbacks = [history, ModelCheckpoint(folder, filename="interrupted"), *method.callbacks(options)]
    if any(isinstance(layer, CenteredSoftplus) for layer in module.modules()):
        callbacks.append(CurvatureMonitor(every_n_epochs=1))
    epochs = max(1, round(preset.epochs * method.epochs))
    trainer = make_trainer(preset, callbacks, max_epochs=epochs, default_root_dir=folder)
    checkpoint = folder / "interrupted.ckpt"
    record: dict[str, Any] = {"settings": settings, "status": "finished"}
    try:
        resumed = checkpoint if checkpoint.exists() else None
        trainer.fit(module, datamodule=StudyData(data, preset, seed), ckpt_path=resumed, weights_only=False)
    except DivergedError as error:
        record["status"] = str(error)
    except SystemExit as error:  # what Lightning makes of Ctrl+C
        raise KeyboardInterrupt from error
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{method.name} needs more memory ({error}); use a smaller --batch-size or --width") from error
    save_network(module, folder / "network.pt")
    record["epochs"] = len(history.rows)
    if history.rows:
        record["seconds_per_step"] = statistics.median(row["seconds_per_step"] for row in history.rows)
        record["validation_accuracy"] = history.rows[-1]["val_accuracy"]
    write(file, record)
    checkpoint.unlink(missing_ok=True)
    return record


def make_trainer(preset: Preset, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """One device, no logger of its own."""
    return L.Trainer(
        precision=preset.precision,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        **options,
    )


def settings_of(method: Method, options: Options, preset: Preset, seed: int) -> dict[str, Any]:
    """Everything that decides what a run learns."""
    measuring = {"stability_radii", "attack_radii", "examples", "attack_examples", "options"}
    shared = {key: value for key, value in asdict(preset).items() if key not in measuring}
    return json.loads(json.dumps({"method": method.name, "seed": seed, "options": options, **shared}))


def check_settings(record: dict[str, Any], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Refuse to mix runs of different settings."""
    different = [key for key in settings if record["settings"].get(key) != settings[key]]
    if different:
        raise ValueError(f"{folder} holds a run of other settings ({', '.join(different)}); use another --output")
    return record


def save_network(module: Study, file: Path) -> None:
    """The network in evaluation mode, normalisation included, as a module."""
    partial = file.with_suffix(".partial")
    torch.save(module.network.cpu().eval(), partial)
    partial.rename(file)


def write(file: Path, record: Any) -> None:
    """JSON, never half written."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1))
    partial.rename(file)
