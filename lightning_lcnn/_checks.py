"""Argument checks whose messages name the argument, what was expected and what came."""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number, or a tensor of finite numbers, above zero."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or not bool((torch.isfinite(value) & (value > 0)).all()):
            raise ValueError(f"`{name}` must hold finite numbers > 0, got {value}.")
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number > 0, got {value!r} of type {type(value).__name__}.")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}.")


def check_non_negative(name: str, value: Any) -> None:
    """Raise unless ``value`` is a finite number of at least zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`{name}` must be a number >= 0, got {value!r} of type {type(value).__name__}.")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}.")


def check_int(name: str, value: Any, minimum: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {sorted(choices)}, got {value!r}.")


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed here and is not installed: pip install 'lightning-lcnn[{extra}]'."
        ) from error
