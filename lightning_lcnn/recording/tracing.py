"""Recording a ``forward`` with torch.fx, and the shapes in it."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep


class UntraceableError(ValueError):
    """The model's ``forward`` cannot be recorded, or holds something without a bound."""


class _Tracer(fx.Tracer):
    """Records ``forward``; modules that are known and torch's own layers stay whole."""

    def __init__(self, is_known: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.is_known = is_known

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is one step."""
        if self.is_known(m):
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


def record(model: nn.Module, is_known: Callable[[nn.Module], bool]) -> fx.Graph:
    """The graph of ``model.forward`` in evaluation mode; only the first argument is a tensor of the graph.

    Args:
        model: Any module.
        is_known: Whether a module shall stay whole, as one call.

    Returns:
        The graph.

    Raises:
        UntraceableError: When ``forward`` cannot be followed, with the module's path and the line.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    optional = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    with _evaluation_flags(model):
        try:
            return _Tracer(is_known).trace(model, concrete_args=optional)
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


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it returned."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.shapes[n.name] = tuple(result.shape)
        return result


def run_graph(model: nn.Module, graph: fx.Graph, x: Tensor) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
    """Output of a recorded graph, and the shape of every floating-point tensor in it by the name of its node."""
    recorder = _ShapeRecorder(model, graph)
    return recorder.run(x), recorder.shapes
