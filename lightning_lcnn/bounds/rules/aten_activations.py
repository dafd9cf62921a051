"""Elementwise functions: one rule for all that the list of what bends knows by an ATen name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning_lcnn.bounds.rules.aten_calls import Call, Found, Part
from lightning_lcnn.bounds.rules.pieces import Activation
from lightning_lcnn.functional.bends import OF_ATEN
from lightning_lcnn.functional.curves import Curve


def elementwise(call: Call) -> Found | None:
    """The activation that an operation is; None for what the list does not know as a function of one number.

    The parameters of a curve are the arguments of the operation, by name, and are read anew each time.
    """
    bend = OF_ATEN.get(call.name)
    curve = None if bend is None else bend.run or bend.curve
    if bend is None or curve is None:
        return None
    if bend.jumps:
        raise ValueError("it jumps, so it has no slope")
    names = [name for name in inspect.signature(curve).parameters if name in call.arguments]
    if not call.is_signal("self") or any(call.is_signal(name) for name in names):
        raise ValueError("an argument other than its input depends on the network's input")
    values = {name: call.constant(name) for name in names}
    return Part(Activation(partial(_at, curve, values)), (call.get("self"),))


def _at(curve: Callable[..., Curve], values: dict[str, Callable[[], Any]]) -> Curve:
    return curve(**{name: value() for name, value in values.items()})
