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
from lightning_lcnn._compat import (
    bookkeeping_of,
    default_states,
    forget_result,
    is_within_set_dtype,
    keep_out_of_state_dict,
    set_state_dtype,
)


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
        set_state_dtype(self, torch.float64 if self.dtype == torch.float64 else torch.float32)
        self._examples_before = 0
        self._add_counter("num_examples")
        self._add_identity()

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
        # tensors are replaced, never changed in place, but `reset` empties lists
        states = {name: state if isinstance(state, Tensor) else [*state] for name, state in self.metric_state.items()}
        before = states | bookkeeping_of(self)
        self._examples_before = int(self.num_examples)  # forward resets the state before it updates
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            raise
        finally:
            self._examples_before = 0

    def persistent(self, mode: bool = False) -> None:
        """Choose whether the states enter the ``state_dict``; the identity never does, which is not to be loaded."""
        super().persistent(mode)
        keep_out_of_state_dict(self, "identity")

    def _add_identity(self) -> None:
        """Add a state that no other metric has, so that a ``MetricCollection`` never lets two of them share states.

        After the first batch it does so where names and values of all states are equal, as those of two attacks are
        that both failed; from then on it would update only the first and report its result for both. Nothing can be
        compared in place of this: attacks, outputs and adapters are functions. The identity is 16 random bytes, not a
        number counted up, which an unpickled metric of another process might have too. Copies keep it, for they are
        configured alike.
        """
        self.add_state("identity", torch.tensor(list(uuid.uuid4().bytes)), dist_reduce_fx="max")

    def _add_counter(self, name: str, shape: tuple[int, ...] = ()) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _add_float(self, name: str, shape: tuple[int, ...] = (), dist_reduce_fx: str = "sum") -> None:
        self.add_state(name, torch.zeros(shape, dtype=self.dtype), dist_reduce_fx=dist_reduce_fx)

    def _as_state(self, values: Tensor) -> Tensor:
        """Bring measured values to the states' device and precision."""
        return values.detach().to(self.num_examples.device, self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> MeasuringMetric:
        """Move the states with the module, without the cast to bfloat16 or half that would ruin sums and counts."""
        dtype, defaults = self.dtype, default_states(self)
        super()._apply(fn, exclude_state=tuple(defaults))
        wants_double = is_within_set_dtype(self) and self.dtype == torch.float64
        set_state_dtype(self, torch.float64 if wants_double else dtype)
        forget_result(self)

        def move(state: Any) -> Any:
            if not isinstance(state, Tensor):
                return [move(entry) for entry in state]
            return state.to(fn(state).device, self.dtype if state.is_floating_point() else state.dtype)

        for name in defaults:
            defaults[name] = move(defaults[name])
            setattr(self, name, move(getattr(self, name)))
        return self
