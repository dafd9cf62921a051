"""Time per training step of each method, all in turn."""

from __future__ import annotations

import statistics
from typing import Any

import lightning as L

from comparison.methods import METHODS
from comparison.presets import Data, Preset
from comparison.training import Study, StudyData, make_trainer, seconds

ROUNDS, STEPS, SKIPPED = 3, 14, 3  # the first steps allocate and trace


class StepTimer(L.Callback):
    """Time of every training step, attack, penalties and optimizer included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Start the clock."""
        self._start = seconds()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Stop it."""
        self.seconds.append(seconds() - self._start)


def time_methods(preset: Preset, names: list[str], data: Data) -> dict[str, float]:
    """Median time per step over that of the first method; processor time, or wall time on a GPU."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            times[name] += one_round(preset, name, data)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {name: value / medians[names[0]] for name, value in medians.items()}


def one_round(preset: Preset, name: str, data: Data) -> list[float]:
    """Seconds of a few steps from a new network."""
    method, options, timer = METHODS[name], METHODS[name].chosen(preset), StepTimer()
    network = method.network(preset.make_network(data.num_classes), data.example, options)
    module = Study(network, method, options, preset)
    trainer = make_trainer(
        preset,
        [timer, *method.callbacks(options)],
        max_steps=STEPS,
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=StudyData(data, preset, seed=0))
    return timer.seconds[SKIPPED:]
