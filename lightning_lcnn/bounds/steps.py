"""From a recorded graph to a list of steps: every call is looked up in the rules."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_lcnn.bounds.rules.calls import Call, Constant, Signal, unknown_size
from lightning_lcnn.bounds.rules.functions import rule_of, why_refused
from lightning_lcnn.bounds.rules.modules import REFUSED, has_rule, piece_of
from lightning_lcnn.bounds.rules.pieces import Piece, Rearrange, Shape
from lightning_lcnn.kernels.modes import whole

_SIZES = ("size", "dim", "numel", "ndimension", "new_zeros", "new_ones", torch.zeros_like)
_SIZE_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")
_LIKE = ("expand_as", "view_as", "reshape_as", "type_as")
_SPLITS = (torch.chunk, torch.split, torch.unbind, torch.tensor_split, "chunk", "split", "unbind", "tensor_split")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@dataclass(frozen=True)
class Step:
    """One piece of the network and where its input comes from."""

    name: str  # module path, with the function's name where a forward calls a function
    kind: str  # class of the module or name of the function
    piece: Piece
    inputs: tuple[int, ...]  # steps that it reads; the network's input is step 0
    node: str = ""  # name of the fx node
    module: nn.Module | None = None
    where: str = ""  # the place in words, for messages

    def refusal(self, reason: str) -> str:
        """Message for a step that turns out to have no bound."""
        return refusal(self.where or f"'{self.name}' ({self.kind})", type(self.module), reason)


def build_steps(model: nn.Module, graph: fx.Graph) -> list[Step]:
    """Look up every call that the output depends on.

    Raises:
        ValueError: for a call without a bound, an in-place change of a value that is used again, or a model that
            does not take and return one tensor.
    """
    modules = dict(model.named_modules())
    _check_in_place(graph, modules)
    return _Builder(model, modules).build(_needed(graph))


def _needed(graph: fx.Graph) -> list[fx.Node]:
    """Placeholders and the nodes that the output depends on, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or any(user in needed for user in node.users):
            needed.add(node)
    return [node for node in graph.nodes if node in needed]


class _Builder:
    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.model = model
        self.modules = modules
        self.values: dict[fx.Node, Any] = {}  # Signal, Constant, _Split, or a default argument
        self.steps: list[Step] = []

    def build(self, nodes: list[fx.Node]) -> list[Step]:
        for node in nodes:
            if node.op == "output":
                self._finish(node)
            else:
                self.values[node] = self._value(node)
        return self.steps

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "get_attr":
            return Constant(partial(_read, str(node.target)), (self.model,))
        args = _replace(node.args, self.values)
        kwargs = {name: _replace(value, self.values) for name, value in node.kwargs.items()}
        if node.op == "call_module":
            return self._module(node, Call(str(node.target), args, kwargs))
        target: Any = node.target
        return self._function(node, Call(target, args, kwargs))

    def _input(self, node: fx.Node) -> Any:
        if not self.steps:
            self.steps.append(Step("input", "input", Rearrange(), (), node.name))
            return Signal(0)
        if node.args:
            return node.args[0]
        raise ValueError(
            f"`model.forward` must take one tensor, got a second argument `{node.target}` without default. "
            "Wrap the model in a module whose forward takes the input alone."
        )

    def _module(self, node: fx.Node, call: Call) -> Any:
        module = self.modules[str(node.target)]
        if not call.signals:
            return Constant(module, call.args, tuple(call.kwargs.items()))
        if not has_rule(module):
            raise ValueError(self._refusal(node, REFUSED.get(type(module), "no rule is known for this class")))
        if len(call.signals) != 1:
            raise ValueError(self._refusal(node, f"it takes {len(call.signals)} tensors of the network, expected one"))
        return self._append(node, partial(piece_of, module), call.signals, module)

    def _function(self, node: fx.Node, call: Call) -> Any:
        if call.function is operator.getitem and isinstance(call.args[0], _Split) and isinstance(call.args[1], int):
            split = call.args[0].call
            piece = Rearrange(partial(_take, split, call.args[1]))
            return self._append(node, lambda: piece, split.signals)
        if _holds_split((call.args, tuple(call.kwargs.values()))):
            raise ValueError(self._refusal(node, "it takes all parts of a split at once; take them by their index"))
        if not call.signals:
            return _constant(call)
        if call.function in _SIZES or (call.function is getattr and call.args[1] in _SIZE_ATTRIBUTES):
            return Constant(unknown_size)
        if call.function in _SPLITS:
            return _Split(call)
        if call.function in _LIKE:  # the second tensor gives its shape or type only
            call = Call(call.function, call.args[:1], {})
        rule = rule_of(call)
        if rule is None:
            raise ValueError(self._refusal(node, why_refused(call)))
        return self._append(node, partial(rule, call), call.signals)

    def _append(
        self, node: fx.Node, make: Callable[[], Piece], inputs: list[int], module: nn.Module | None = None
    ) -> Signal:
        try:
            piece = make()
        except ValueError as error:
            raise ValueError(self._refusal(node, str(error))) from error
        kind = _function_name(node) if module is None else type(module).__name__
        self.steps.append(Step(self._name(node), kind, piece, tuple(inputs), node.name, module, self._where(node)))
        return Signal(len(self.steps) - 1)

    def _finish(self, node: fx.Node) -> None:
        result: Any = node.args[0]
        signal = self.values.get(result) if isinstance(result, fx.Node) else None
        if not isinstance(signal, Signal):
            raise ValueError(
                f"`model.forward` must return one tensor that depends on its input, got {result}. "
                "Wrap the model in a module whose forward returns the logits alone."
            )
        self.steps.append(Step("output", "output", Rearrange(), (signal.step,), result.name))

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        path = _enclosing_module(node)
        return f"{path}.{node.name}" if path else node.name

    def _where(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"module '{node.target}' ({type(self.modules[str(node.target)]).__name__})"
        path = _enclosing_module(node)
        return f"`{_function_name(node)}` in the forward of " + (f"module '{path}'" if path else "the model")

    def _refusal(self, node: fx.Node, reason: str) -> str:
        module = self.modules[str(node.target)] if node.op == "call_module" else None
        return refusal(self._where(node), type(module), reason)


def refusal(where: str, module_type: type, reason: str) -> str:
    """Message for a place without a bound."""
    way = "Register a bound of your own: lightning_lcnn.bounds.register_rule({}, rule)."
    if module_type is type(None):
        way = "Move it into a module of your own and " + way[0].lower() + way[1:].format("Module")
    return f"`model` has no bound at {where}: {reason}. {way.format(module_type.__name__)}"


@dataclass(frozen=True)
class _Split:
    """A call that returns a tuple of tensors, of which elements are taken later."""

    call: Call


def _holds_split(value: Any) -> bool:
    return isinstance(value, _Split) or (isinstance(value, tuple) and any(map(_holds_split, value)))


def _take(split: Call, index: int, x: Tensor, output_shape: Shape) -> Tensor:
    return split.replay(x, output_shape)[index]


def _constant(call: Call) -> Constant:
    if isinstance(call.function, str):
        return Constant(_call_method, (call.function, *call.args), tuple(call.kwargs.items()))
    return Constant(call.function, call.args, tuple(call.kwargs.items()))


def _read(name: str, model: nn.Module) -> Any:
    return whole(operator.attrgetter(name)(model))


def _call_method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def _replace(argument: Any, values: dict[fx.Node, Any]) -> Any:
    """Arguments of a node with nodes replaced by values; lists become tuples."""
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, tuple | list):
        return tuple(_replace(a, values) for a in argument)
    if isinstance(argument, slice):
        return slice(*(_replace(a, values) for a in (argument.start, argument.stop, argument.step)))
    return argument


def _function_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _enclosing_module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack)) if stack else ""


def _check_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Refuse in-place changes of a value that is read again, which the graph does not show."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = _changed(node, modules)
        if not isinstance(changed, fx.Node):
            continue
        later = [user for user in changed.users if position[user] > position[node]]
        if later or not node.users:
            raise ValueError(
                f"`model` changes '{changed.name}' in place at '{node.name}' and reads it again afterwards; "
                "use the out-of-place form (inplace=False)."
            )


def _changed(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """The node that a call writes into; None where it writes into nothing."""
    if "out" in node.kwargs:
        return node.kwargs["out"]
    if not _is_in_place(node, modules):
        return None
    return node.args[0] if node.args else node.kwargs.get("input")


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return _names_overwriting(str(node.target)) and node.target != "requires_grad_"
    if node.op != "call_function":
        return False
    # torch.relu_ and the like, but not operator.and_
    by_name = _names_overwriting(_function_name(node)) and getattr(node.target, "__module__", "") != "_operator"
    return by_name or node.target in _IN_PLACE or bool(node.kwargs.get("inplace", False))


def _names_overwriting(name: str) -> bool:
    return name.endswith("_") and not name.startswith("__")
