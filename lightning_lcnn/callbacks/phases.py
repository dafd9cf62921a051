"""Names for our work in the tables and traces of profilers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


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
