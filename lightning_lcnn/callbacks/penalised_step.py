"""What the mixin and the penalty callback share: when penalties apply, their sum, and where it is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.penalties import Penalty


def trains(module: Any) -> bool:
    """Whether a step of this LightningModule is one of automatic optimisation, not of validation."""
    trainer = getattr(module, "_trainer", None)
    in_training = trainer is None or trainer.training
    return in_training and torch.is_grad_enabled() and getattr(module, "automatic_optimization", True)


def add_to_output(output: Any, penalty: Callable[[], Tensor]) -> Any:
    """Add the penalty to a loss tensor or to ``output["loss"]`` of a copy; anything else is Lightning's to judge."""
    if isinstance(output, Tensor):
        return output + penalty()
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + penalty()}
    return output


@torch.compiler.disable
def sum_penalties(module: Any, penalties: Sequence[Penalty], inputs: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of the weighted penalties; their parts go to the logger on its logging steps.

    Not compiled: the graph of the bound is a few hundred 0-d operations, which would be traced again for every network.
    """
    trainer = getattr(module, "_trainer", None)
    step = None if trainer is None else trainer.global_step
    total = torch.zeros(())
    parts: dict[str, Tensor] = {}
    for penalty in penalties:
        value, its_parts = penalty.evaluate(module, *(inputs() if penalty.needs_batch else ()), step=step)
        total = value + total.to(value.device)
        parts.update(its_parts)
    if trainer is not None and module._current_fx_name == "training_step" and _logs_now(trainer):
        for key, part in parts.items():
            module.log(f"lcnn/{key}", part)
    return total


def _logs_now(trainer: Any) -> bool:
    return trainer._logger_connector.should_update_logs


def as_penalties(penalties: Any) -> list[Penalty]:
    """Check what ``configure_penalties`` returned."""
    if not isinstance(penalties, list | tuple) or not all(isinstance(p, Penalty) for p in penalties):
        raise TypeError(
            "`configure_penalties` must return a list of penalties such as [CurvaturePenalty(weight=1e-2)], got "
            f"{penalties!r}."
        )
    return list(penalties)


def is_lightning_default(item: Any) -> bool:
    """Whether this is LightningModule, or a method as LightningModule defines it, under either import name."""
    package, owner = item.__module__.split(".")[0], item.__qualname__.split(".")[0]
    return package in ("lightning", "pytorch_lightning") and owner == "LightningModule"
