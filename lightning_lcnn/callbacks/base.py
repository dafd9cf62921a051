"""What the callbacks and the mixin share: the class, checks, names for profilers, and a step with penalties."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lcnn._compat import logs_now
from lightning_lcnn.penalties import Penalty
from lightning_lcnn.penalties.curvature import defines_forward, network_of, trained_children
from lightning_lcnn.recording.forward_capture import ForwardCapture

TOTALS = ("lcnn/log_ratio", "lcnn/log_slope", "lcnn/log_curvature")  # what a CurvatureMonitor logs of the network
Inputs = Callable[[], tuple[Tensor, Tensor]]


# Two packages, one and the same Lightning under two names, whose classes know nothing of each other. A bare callback in
# Trainer(callbacks=...) and LightningCLI are checked against the class. May go when pytorch_lightning is not supported
# any more.
def _installed_callback_classes() -> tuple[type, ...]:
    """Import the Callback class of each installed package; the second one adds 0.07 s to the import of the first."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ImportError:
            continue
    return tuple(found)


if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:

    class Callback(*_installed_callback_classes()):
        """Callback of both packages: a bare callback in ``Trainer(callbacks=…)`` and LightningCLI check the class."""


@contextmanager
def phase(trainer: Any, name: str) -> Iterator[None]:
    """Measure the body as ``[lightning_lcnn]<name>`` in the trainer's profiler, if any, and in torch's.

    Without a profiler it costs a few microseconds.

    Example:
        >>> with phase(None, "penalty"):
        ...     pass
    """
    label = f"[lightning_lcnn]{name}"
    with torch.profiler.record_function(label), nullcontext() if trainer is None else trainer.profiler.profile(label):
        yield


def trainer_of(module: Any) -> Any:
    """The trainer that runs a module, None in an own loop; Fabric's stand-in for one is none."""
    try:
        trainer = module.trainer
    except (AttributeError, RuntimeError):  # no LightningModule, or not attached
        return None
    return trainer if hasattr(trainer, "training") else None


def is_training(module: Any) -> bool:
    """Whether this is training and not validation, with or without a trainer."""
    trainer = trainer_of(module)
    return (trainer is None or trainer.training) and torch.is_grad_enabled()


def trains(module: Any) -> bool:
    """Whether a step of this LightningModule is one of automatic optimisation, not of validation."""
    return is_training(module) and getattr(module, "automatic_optimization", True)


def add_to_output(output: Any, penalty: Callable[[], Tensor]) -> Any:
    """Add the penalty to a loss tensor or to ``output["loss"]`` of a copy; anything else is Lightning's to judge."""
    if isinstance(output, Tensor):
        return output + penalty()
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + penalty()}
    return output


def penalised_step(module: Any, penalties: Sequence[Penalty], step: Callable[[], Any], inputs: Inputs) -> Any:
    """Output of the user's step with the penalties added, which differentiate the forward pass that the step made."""
    capture = _start_capture(module, penalties)
    try:
        output = step()
    finally:
        if capture is not None:
            capture.stop()
    return add_to_output(output, lambda: sum_penalties(module, penalties, inputs, capture, logs=True))


@torch.compiler.disable
def _start_capture(module: Any, penalties: Sequence[Penalty]) -> ForwardCapture | None:
    if not any(penalty.uses_logits for penalty in penalties):
        return None
    network = network_of(module, compiled=True)
    # a step may call self.net(x) though ``forward`` does the same: the only child with parameters is watched as well
    children = trained_children(network) if network is module else []
    capture = ForwardCapture([network, *(children if len(children) == 1 else [])])
    capture.start()
    return capture


@torch.compiler.disable
def sum_penalties(
    module: Any, penalties: Sequence[Penalty], inputs: Inputs, capture: ForwardCapture | None = None, logs: bool = False
) -> Tensor:
    """Sum of the weighted penalties; ``logs`` sends their parts to the logger, on its logging steps.

    Not compiled: the graph of the bound is a few hundred 0-d operations, which would be traced again for every network.
    """
    trainer = trainer_of(module)
    step = None if trainer is None else trainer.global_step
    total = torch.zeros(())
    parts: dict[str, Tensor] = {}
    with phase(trainer, "penalty"):
        for penalty in penalties:
            value, its_parts = _evaluate(penalty, module, inputs, step, capture)
            total = value + total.to(value.device)
            parts.update({_numbered(key, parts): part for key, part in its_parts.items()})
    if logs and trainer is not None and logs_now(trainer):
        _log(trainer, module, {f"lcnn/{key}": part for key, part in parts.items()})
    return total


def _log(trainer: Any, module: Any, parts: Mapping[str, Tensor]) -> None:
    """All parts but those that a monitor logs for the same step, after it: a curve would have two points there."""
    monitored = any(getattr(callback, "logs_totals", False) for callback in trainer.callbacks)
    for key, part in parts.items():
        if not (monitored and key in TOTALS):
            module.log(key, part)


def _evaluate(
    penalty: Penalty, module: Any, inputs: Inputs, step: int | None, capture: ForwardCapture | None
) -> tuple[Tensor, dict[str, Tensor]]:
    if not penalty.needs_batch:
        return penalty.evaluate(module, step=step)
    x, target = inputs()
    if capture is None or not penalty.uses_logits:
        return penalty.evaluate(module, x, target, step=step)
    forward = capture.last(len(target))
    if forward is not None:
        return penalty.evaluate(forward.network, forward.x, target, step=step, logits=forward.logits)
    if not defines_forward(module):
        raise ValueError(
            f"{type(penalty).__name__} differentiates the forward pass of `training_step`, and {type(module).__name__} "
            f"made none for {len(target)} examples that could be watched: call the network as self.net(x), not "
            "self.net.forward(x), or define `forward(self, x)`, which the penalty then calls itself."
        )
    return penalty.evaluate(module, x, target, step=step)


def _numbered(key: str, taken: Mapping[str, Any]) -> str:
    """The key, with the first free number from 2 on where another penalty has it."""
    number, name = 1, key
    while name in taken:
        number += 1
        name = f"{key}_{number}"
    return name


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


def check_strategy(strategy: Any) -> None:
    """Raise for FSDP1 and DeepSpeed ZeRO-3, which leave a rank without the weights that σ and G are made of."""
    names = {base.__name__ for base in type(strategy).__mro__}
    sharding = "FSDP1" if "FSDPStrategy" in names else None
    if "DeepSpeedStrategy" in names and strategy.zero_stage_3:
        sharding = "DeepSpeed ZeRO stage 3"
    if sharding is not None:
        raise ValueError(
            f"`strategy` {type(strategy).__name__} ({sharding}) splits and flattens the weights, of which spectral "
            "norms, slopes and penalties need the whole. Use strategy='ddp', FSDP2 (ModelParallelStrategy), or "
            "DeepSpeed stage 1 or 2."
        )
