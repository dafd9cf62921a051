"""Find the inputs and targets in a batch, and put other inputs in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
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


def replace_batch_input(batch: Any, x: Tensor, old: Tensor | None = None) -> Any:
    """Return a copy of the batch with another input; everything else in it is shared, the batch itself stays.

    Tuples, lists, named tuples, mappings and dataclasses, nested too, keep their type.

    Args:
        batch: What a step gets.
        x: The new input, of any shape.
        old: The tensor in the batch whose place it takes (this very object, the first time it is met); by default the
            one :func:`batch_input` finds.

    Returns:
        A batch of the same type; ``x`` where the batch is the input.

    Raises:
        ValueError: If the batch does not hold ``old``, for instance where ``penalty_inputs`` computes it.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> replace_batch_input([torch.zeros(1, 2), "label"], torch.ones(1, 2))
        [tensor([[1., 1.]]), 'label']
    """
    old = batch_input(batch) if old is None else old
    places = 0

    def replace(item: Tensor) -> Tensor:
        nonlocal places
        places += item is old
        return x if item is old and places == 1 else item

    replaced = apply_to_collection(batch, Tensor, replace)
    if not places:
        raise ValueError(
            f"`old` must be a tensor that the batch holds, got one that this {type(batch).__name__} does not: return "
            "the batch's own tensor from `penalty_inputs(self, batch)`, and transform it in `forward` or in "
            "`on_after_batch_transfer`."
        )
    return replaced


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
