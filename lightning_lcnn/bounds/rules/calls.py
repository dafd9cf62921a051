"""Calls of functions in a recorded ``forward``, with what depends on the network's input told from what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_lcnn.bounds.rules.pieces import Shape


@dataclass(frozen=True)
class Signal:
    """Stands for a tensor that depends on the network's input: the output of a step."""

    step: int


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the network's input; read anew each time, because parameters are trained."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    def value(self) -> Any:
        """Evaluate with the parameters as they are now."""
        return self.function(*evaluate(self.args), **{k: evaluate(v) for k, v in self.kwargs})


def evaluate(value: Any) -> Any:
    """Replace every :class:`Constant` in a nest of tuples and lists by its value."""
    if isinstance(value, Constant):
        return value.value()
    if isinstance(value, tuple | list):
        return type(value)(evaluate(v) for v in value)
    if isinstance(value, slice):
        return slice(evaluate(value.start), evaluate(value.stop), evaluate(value.step))
    return value


def unknown_size() -> Any:
    """What a :class:`Constant` that was computed from an activation's shape evaluates to."""
    raise ValueError("it needs a number computed from the input's shape")


@dataclass(frozen=True)
class Call:
    """A call of a function or method with at least one :class:`Signal` among its arguments."""

    function: Callable[..., Any] | str  # a string names a method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the function or method."""
        return self.function if isinstance(self.function, str) else self.function.__name__

    @property
    def signals(self) -> list[int]:
        """Steps that the call reads, in order, repeated where repeated."""
        return _signals((self.args, tuple(self.kwargs.values())))

    def bind(self, *names: str, **defaults: Any) -> dict[str, Any]:
        """Arguments after the first by name, constants evaluated."""
        given = dict(zip(names, self.args[1:], strict=False)) | self.kwargs
        return defaults | {k: evaluate(v) for k, v in given.items() if k in names or k in defaults}

    def lazily(self, position: int, name: str) -> Callable[[], Any]:
        """A function that reads an argument anew each time, because parameters are trained; None if there is none."""
        return partial(evaluate, self.args[position] if len(self.args) > position else self.kwargs.get(name))

    def replay(self, x: Tensor, output_shape: Shape) -> Tensor:
        """Run the call on another tensor in the place of its only signal."""
        args = _fill(self.args, x)
        kwargs = {k: _fill(v, x) for k, v in self.kwargs.items()}
        return (
            getattr(args[0], self.function)(*args[1:], **kwargs)
            if isinstance(self.function, str)
            else self.function(*args, **kwargs)
        )


def _signals(value: Any) -> list[int]:
    if isinstance(value, Signal):
        return [value.step]
    if isinstance(value, tuple | list):
        return [step for v in value for step in _signals(v)]
    return []


def _fill(value: Any, x: Tensor) -> Any:
    if isinstance(value, Signal):
        return x
    if isinstance(value, tuple | list):
        return type(value)(_fill(v, x) for v in value)
    return evaluate(value)
