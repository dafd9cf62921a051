"""When spectral norms are refreshed: every n optimizer steps, or as often as they change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._checks import check_int, check_positive

_LEAST, _MOST = 10, 80  # steps between adaptive refreshes


class FixedInterval:
    """Once in each interval of n steps."""

    def __init__(self, length: int) -> None:
        check_int("every_n_steps", length)
        self.length = length
        self._interval: int | None = None  # number of the interval that has been refreshed

    def is_due(self, step: int) -> bool:
        """Whether this step's interval has not been refreshed."""
        return step // self.length != self._interval

    def refreshed(self, step: int, change: Tensor | None) -> None:
        """Remember the refresh."""
        self._interval = step // self.length

    def state(self) -> Any:
        """Everything that decides the next refresh, for a checkpoint."""
        return self._interval

    def load_state(self, state: Any) -> None:
        """Go on in the same interval."""
        self._interval = state


class AdaptiveInterval:
    """Twice as many steps to the next refresh where the norms hardly changed, half where they changed too much.

    The change of the last refresh is read at the earliest step at which the next one can be due. On CUDA it was copied
    to the host long before, so nothing waits.
    """

    def __init__(self, max_change: float) -> None:
        self.max_change = max_change
        self.length = _LEAST
        self._last: int | None = None  # step of the last refresh
        self._change: tuple[Tensor, Any] | None = None  # of the last refresh on the host, and when it will be there

    def is_due(self, step: int) -> bool:
        """Whether enough steps have passed since the last refresh."""
        if self._last is None:
            return True
        if step < self._last + _LEAST:
            return False
        self._read_change()
        return step >= self._last + self.length

    def refreshed(self, step: int, change: Tensor | None) -> None:
        """Remember the refresh and the largest relative change of a norm in it; None starts over."""
        self._last = step
        self._change = None if change is None else _copy_to_host(change)
        if change is None:
            self.length = _LEAST

    def state(self) -> Any:
        """Everything that decides the next refresh, for a checkpoint."""
        self._read_change()
        return {"last": self._last, "length": self.length}

    def load_state(self, state: Any) -> None:
        """Go on towards the same step."""
        self._last, self.length, self._change = state["last"], state["length"], None

    def _read_change(self) -> None:
        if self._change is None:
            return
        value, event = self._change
        if event is not None:
            event.synchronize()
        self._change = None
        if value > self.max_change:
            self.length = max(self.length // 2, _LEAST)
        elif value < self.max_change / 4:
            self.length = min(self.length * 2, _MOST)


def refresh_schedule(every_n_steps: int | str, max_change: float) -> FixedInterval | AdaptiveInterval:
    """Return the schedule that :class:`~lightning_lcnn.PowerIteration` has for its arguments."""
    check_positive("max_change", max_change)
    if every_n_steps == "auto":
        return AdaptiveInterval(max_change)
    if isinstance(every_n_steps, str):
        raise ValueError(f"`every_n_steps` must be an integer or 'auto', got {every_n_steps!r}.")
    return FixedInterval(every_n_steps)


def _copy_to_host(value: Tensor) -> tuple[Tensor, Any]:
    if not value.is_cuda:
        return value, None
    host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
