"""Recording a ``forward`` with torch.fx."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lightning_lcnn.bounds.module_rules import REFUSED, exact_type, has_rule

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


class UntraceableError(ValueError):
    """The model's ``forward`` cannot be recorded, or holds something without a bound."""


class BoundTracer(fx.Tracer):
    """Records ``forward``; modules with a rule and torch's own layers stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one step."""
        if has_rule(m) or exact_type(m) in REFUSED:
            return True
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return False  # a subclass, or another padding mode: what its forward calls has rules
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call, and name the innermost module when that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except UntraceableError:
            raise
        except Exception as error:
            path = self.path_of_module(m)
            raise UntraceableError(_untraceable(path, m, error)) from error


def record(model: nn.Module) -> fx.Graph:
    """The graph of ``model.forward`` in evaluation mode; only the first argument is a tensor of the graph."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    optional = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    with _evaluation_flags(model):
        try:
            return BoundTracer().trace(model, concrete_args=optional)
        except UntraceableError:
            raise
        except Exception as error:
            raise UntraceableError(_untraceable("", model, error)) from error


def _untraceable(path: str, module: nn.Module, error: Exception) -> str:
    reason = str(error).split("\n")[0]
    return (
        f"`model` cannot be traced: {_place(path)} ({type(module).__name__}) failed{_line(error)} with "
        f"{type(error).__name__}: {reason.rstrip('.')}. A forward that branches on tensor values or shapes has no "
        "fixed graph; rewrite the branch, or register a bound for the whole module: "
        f"lightning_lcnn.bounds.register_rule({type(module).__name__}, rule)."
    )


def _line(error: Exception) -> str:
    """Where it happened in code that is neither torch's nor ours."""
    lines = [
        f" at {os.path.basename(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, _OURS))
    ]
    return lines[-1] if lines else ""


def _place(path: str) -> str:
    return f"module '{path}'" if path else "the model itself"


@contextmanager
def _evaluation_flags(model: nn.Module) -> Iterator[None]:
    """Trace as in evaluation; flags are set directly because ``train`` may be overridden."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag
