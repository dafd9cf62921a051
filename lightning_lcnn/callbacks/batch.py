"""Find the inputs and targets in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_INPUT_KEYS = ("x", "input", "inputs", "image", "images", "pixel_values")
_TARGET_KEYS = ("y", "target", "targets", "label", "labels")


def batch_input(batch: Any) -> Tensor:
    """Return the input tensor of a batch: itself, its first item, or the value under a usual key."""
    found = batch
    if isinstance(batch, Mapping):
        found = _first(batch, _INPUT_KEYS)
    elif isinstance(batch, Sequence) and batch:
        found = batch[0]
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim > 0:
        return found
    raise ValueError(_message("a floating-point input tensor", batch, _INPUT_KEYS, 0))


def batch_input_and_target(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the input and target tensors of a batch: its first two items, or the values under usual keys."""
    found = None
    if isinstance(batch, Mapping):
        found = _first(batch, _TARGET_KEYS)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        found = batch[1]
    if isinstance(found, Tensor):
        return batch_input(batch), found
    raise ValueError(_message("a target tensor", batch, _TARGET_KEYS, 1))


def _first(batch: Mapping[Any, Any], keys: Sequence[str]) -> Any:
    return next((batch[key] for key in keys if key in batch), None)


def _message(what: str, batch: Any, keys: Sequence[str], position: int) -> str:
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        kind += f" with keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence):
        kind += f" of {[type(item).__name__ for item in batch]}"
    return (
        f"`batch` must hold {what}: as item {position} of a tuple or list, or under one of the keys {list(keys)}; got "
        f"{kind}. Override `penalty_inputs(self, batch)` to return (x, target) from your batch."
    )
