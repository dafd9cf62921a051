"""From a model and a batch to checked functions of the input, chunk by chunk, with all state preserved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int
from lightning_lcnn._compat import is_batch_norm, is_compiled, uncompiled
from lightning_lcnn.functional.outputs import (
    OUTPUTS,
    Output,
    logit_margin,
    per_example_loss,
    resolve_output,
    runner_up,
    target_logit,
)
from lightning_lcnn.kernels.preserved_state import measuring

Adapter = Callable[[Any], Tensor]
InputFunction = Callable[[Tensor], Tensor]  # (b, …) to (b,), example by example
Result = TypeVar("Result")

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# Above this margin the loss and its derivatives, about exp(-margin), leave the normal numbers of float32.
_UNDERFLOW_MARGIN = 87.0


def measure(
    function_measure: Callable[[InputFunction, Tensor], Result],
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    *,
    output: str | Output,
    adapter: Adapter | None,
    batch_size: int | None,
) -> Result:
    """Apply ``function_measure(f, x)`` to chunks of the batch and join the fields of its results.

    f maps (b, …) to one value per example. The model must treat examples alone: `check_model` refuses it otherwise.
    Works under ``no_grad`` and ``inference_mode``; what the model carried before is there afterwards.
    """
    check_inputs(x, target)
    resolved = resolve_output(output)
    model = unwrap(model)
    check_model(model)
    if batch_size is not None:
        check_int("batch_size", batch_size)
    size = batch_size or len(x)
    with measuring(model, x):
        parts = []
        for chunk, labels in zip(x.detach().split(size), target.detach().split(size), strict=True):
            # clones made here are ordinary tensors even where the caller's are inference tensors
            function = PerExampleFunction(model, labels.clone(), resolved, adapter)
            parts.append(function_measure(function, chunk.clone()))
    return concatenate(parts)


class PerExampleFunction:
    """x -> output(logits(x), target), (b, …) to (b,).

    The first call checks logits and targets, and fixes the margin's rival class: the margin would otherwise jump in
    its gradient where the rival changes, even for a linear model.
    """

    def __init__(
        self, model: Callable[[Tensor], Any], target: Tensor, output: Output, adapter: Adapter | None = None
    ) -> None:
        self.model = model
        self.target = target
        self.output = output
        self.adapter = adapter
        self._checked = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return one value per example."""
        logits = logits_of(self.model, x, self.adapter)
        if not self._checked:
            check_logits(logits, self.target, known_output=self.output in OUTPUTS.values())
            _warn_of_underflow(logits, self.target, self.output)
            if self.output is logit_margin and logits.shape[1] > 1:
                rival = runner_up(logits, self.target)
                self.output = lambda logits, target: target_logit(logits, target) - target_logit(logits, rival)
            self._checked = True
        values = self.output(logits, self.target)
        if not isinstance(values, Tensor) or values.shape != (len(x),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"`output` must return one value per example, shape ({len(x)},), got {got}.")
        return values


def logits_of(model: Callable[[Tensor], Any], x: Tensor, adapter: Adapter | None) -> Tensor:
    """(b, K) logits in at least float32, through the adapter where there is one."""
    result = model(x)
    logits = result if adapter is None else adapter(result)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model{'' if adapter is None else ' with its adapter'} must return a tensor of logits, got "
            f"{type(logits).__name__}; pass adapter=lambda result: … that picks the logits out of it."
        )
    if logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(
            f"logits must have shape (batch, classes) = ({len(x)}, K), got {tuple(logits.shape)}; "
            "pass adapter=… that brings them into this shape."
        )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_inputs(x: Any, target: Any) -> None:
    """Refuse inputs of which no derivative can be taken."""
    if not isinstance(x, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"`x` and `target` must be tensors, got {type(x).__name__} and {type(target).__name__}.")
    if not x.is_floating_point():
        raise TypeError(
            f"`x` must be floating point to be differentiated, got {x.dtype}; convert it, e.g. x.float() / 255, "
            "or measure from the embedding onwards."
        )
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"`x` must have shape (examples, features, …) and not be empty, got {tuple(x.shape)}.")
    if target.ndim == 0 or len(target) != len(x):
        raise ValueError(f"`target` must have one entry per example, {len(x)}, got shape {tuple(target.shape)}.")
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite().flatten(1).all(1)).sum())
        raise ValueError(f"`x` must be finite, got NaN or infinity in {bad} of {len(x)} examples.")


def check_logits(logits: Tensor, target: Tensor, known_output: bool = True) -> None:
    """Refuse logits that are not finite and, for the named outputs, targets that are no class index."""
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits are not finite (NaN or infinity) for this input.")
    if not known_output:
        return
    if target.ndim != 1 or target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"`target` must hold class indices, shape (B,), got {target.dtype} {tuple(target.shape)}.")
    low, high, classes = int(target.min()), int(target.max()), logits.shape[1]
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"`target` must lie in [0, {classes}) for {classes} logits, got {wrong}.")


def unwrap(model: Any) -> Any:
    """Take the module out of torch.compile and DDP, which only speed up or synchronise training."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif is_compiled(model):
            model = uncompiled(model)
        else:
            return model


def check_model(model: Any) -> None:
    """Refuse models that couple examples, draw noise, or cannot be differentiated; the message names the module."""
    if not callable(model):
        raise TypeError(f"`model` must be a module or a callable x -> logits, got {type(model).__name__}.")
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        path = f"{name or 'the model'} ({type(module).__name__})"
        if is_batch_norm(module):
            if module.training or module.running_mean is None:
                raise ValueError(
                    f"{path} normalises with batch statistics, which couples the examples: call model.eval() first, "
                    "and give the layer running statistics."
                )
        elif module.training and _draws_noise(module):
            raise ValueError(f"{path} draws noise in training mode: call model.eval() first.")
        elif type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{path}: FSDP1 flattens its weights and cannot be differentiated twice; use FSDP2 (fully_shard) with "
                "hvp='finite_difference', or measure an unsharded copy."
            )


def _draws_noise(module: nn.Module) -> bool:
    # by name: torchvision and timm are no dependencies
    if type(module).__name__ in ("StochasticDepth", "DropPath"):
        return True
    return isinstance(module, _DROPOUTS) and module.p > 0


def concatenate(parts: list[Any]) -> Any:
    """Join per-example tensors of equal frozen dataclasses; other fields are those of the first."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if is_dataclass(first) and not isinstance(first, type):
        values = {f.name: concatenate([getattr(part, f.name) for part in parts]) for f in fields(first)}
        return type(first)(**values)
    return first


def _warn_of_underflow(logits: Tensor, target: Tensor, output: Output) -> None:
    if output is per_example_loss and logits.dtype == torch.float32 and logits.shape[1] > 1:
        number = int((logit_margin(logits, target) > _UNDERFLOW_MARGIN).sum())
        if number:
            warnings.warn(
                f"the loss of {number} of {len(logits)} examples is so confident (margin above {_UNDERFLOW_MARGIN:g}) "
                "that its derivatives underflow in float32; use output='margin', or model.double() and x.double().",
                stacklevel=2,
            )
