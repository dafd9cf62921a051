"""What all measuring metrics share: limits, safe states, and no confusion between configurations."""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_lcnn._checks import check_int

_BOOKKEEPING = ("_update_count", "_to_sync", "_should_unsync", "_enable_grad", "compute_on_cpu", "_is_synced", "_cache")


class MeasuringMetric(Metric):
    """Metric over a model and a batch: ``update(model, x, target)``. The model is never stored.

    Counts are int64 and sums float32 whatever precision the module around it is cast to (``set_dtype(torch.float64)``
    makes the sums float64). An exception in ``update`` or ``forward`` leaves the accumulated state as it was.

    Args:
        max_examples: examples to measure per epoch and process; later ones are skipped. All by default.
        kwargs: of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    num_examples: Tensor

    def __init__(self, max_examples: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_examples is not None:
            check_int("max_examples", max_examples)
        self.max_examples = max_examples
        self._dtype = torch.float64 if self._dtype == torch.float64 else torch.float32
        self._examples_before = 0
        self._add_counter("num_examples")
        # MetricCollection merges metrics whose states have equal names and values; this name is no other metric's
        self._marker = f"configuration_{uuid.uuid4().hex}"
        self._add_counter(self._marker)

    def update(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> None:
        """Measure a batch.

        Args:
            model: module in evaluation mode, or any callable, that maps (B, …) to logits (B, K).
            x: (B, …), floating point.
            target: (B,) class indices.
        """
        if self.max_examples is not None:
            seen = max(self._examples_before, int(self.num_examples))
            remaining = max(self.max_examples - seen, 0)
            x, target = x[:remaining], target[:remaining]
        if len(x):
            self._accumulate(model, x, target)
            self.num_examples = self.num_examples + len(x)

    @abstractmethod
    def _accumulate(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> None:
        """Measure first, then replace the states; never change a state in place."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Measure a batch, return its value, and add it to the epoch's."""
        states = self._copy_state_dict()
        bookkeeping = {name: getattr(self, name) for name in _BOOKKEEPING}
        self._examples_before = int(self.num_examples)  # forward resets the state before it updates
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            for name, value in (states | bookkeeping).items():
                setattr(self, name, value)
            raise
        finally:
            self._examples_before = 0

    def persistent(self, mode: bool = False) -> None:
        """Choose whether the states enter the ``state_dict``; the configuration marker never does."""
        super().persistent(mode)
        self._persistent[self._marker] = False

    def _add_counter(self, name: str, shape: tuple[int, ...] = ()) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_float(self, name: str, shape: tuple[int, ...] = (), dist_reduce_fx: str = "sum") -> None:
        self.add_state(name, torch.zeros(shape, dtype=self._dtype), dist_reduce_fx=dist_reduce_fx)

    def _as_state(self, values: Tensor) -> Tensor:
        """Bring measured values to the states' device and precision."""
        return values.detach().to(self.num_examples.device, self._dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> MeasuringMetric:
        """Move the states with the module, without the cast to bfloat16 or half that would ruin sums and counts."""
        dtype = self._dtype
        super()._apply(fn, exclude_state=tuple(self._defaults))
        self._dtype = torch.float64 if self._dtype_convert and self._dtype == torch.float64 else dtype
        self._computed = None

        def move(state: Any) -> Any:
            if not isinstance(state, Tensor):
                return [move(entry) for entry in state]
            return state.to(fn(state).device, self._dtype if state.is_floating_point() else state.dtype)

        for name in self._defaults:
            self._defaults[name] = move(self._defaults[name])
            setattr(self, name, move(getattr(self, name)))
        return self
