"""Calls of ATen operations as the rules see them, and what a rule answers.

Rules are looked up by exact overload. Every argument is read by the rule, or it must have its default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._compat import schema_of
from lightning_lcnn.bounds.rules.contractions import Repeated
from lightning_lcnn.bounds.rules.pieces import Piece, Scale, Shape
from lightning_lcnn.recording.nodes import Operation, Program, Ref, WriteAlias, aten, evaluate, write_places

_TYPE_ONLY = (
    "dtype",
    "layout",
    "device",
    "pin_memory",
    "non_blocking",
    "memory_format",
    "half_to_float",
    "copy",
    "implicit",
)
ATTENTION = "attention multiplies activations by activations, which has no finite slope on unbounded inputs"
_ATTENTIONS = ("_scaled_dot_product", "scaled_dot_product_attention", "_native_multi_head_attention")


@dataclass(frozen=True)
class Source:
    """A program with the model whose parameters it reads, in float64 for certificates."""

    program: Program
    model: nn.Module
    double: bool = False

    def depends(self, ref: Ref) -> bool:
        """Whether a value depends on the network's input."""
        return ref.node in self.program.dependent

    def constant(self, ref: Ref) -> Callable[[], Tensor]:
        """A function that computes a value from the parameters as they are then, differentiable."""
        return partial(self.program.value, ref, self.model, {}, self.double)

    def shape(self, ref: Ref) -> Shape:
        """Shape of a value at one example."""
        shape = self.program.nodes[ref.node].shapes[ref.output]
        assert shape is not None
        return shape

    def producer(self, ref: Any, *names: str) -> Call | None:
        """The call that made a value, if it is an operation of one of these names."""
        node = self.program.nodes[ref.node] if isinstance(ref, Ref) and ref.output == 0 else None
        if isinstance(node, Operation) and node.target.overloadpacket.__name__ in names:
            return Call.of(self, ref, node)
        return None

    def linear_part(self, target: Ref, source: Ref, x: Tensor) -> Tensor:
        """An arrangement from ``source`` to ``target`` applied to x: constants between them count as zero."""
        program, values = self.program, {source: x}

        def lookup(ref: Ref) -> Any:
            if ref in values:
                return values[ref]
            if not self.depends(ref):
                return without_constants(program.value(ref, self.model, {}, double=True))
            node = _without_constant(program.nodes[ref.node])
            if isinstance(node, WriteAlias) and hides_its_base(
                node
            ):  # the base may come from outside of the arrangement
                outputs = [
                    lookup(node.value).reshape(-1)[write_places(node.root, node.written) - math.prod(node.root.size)]
                ]
            else:
                outputs = evaluate(node, self.model, None, lookup, double=True)
            values.update({Ref(ref.node, i): value for i, value in enumerate(outputs)})
            return values[ref]

        return lookup(target)


def without_constants(value: Tensor) -> Tensor:
    """On the CPU: zeros for what is added, whole numbers (indices, masks) as they are."""
    value = value.detach().cpu()
    return torch.zeros_like(value) if value.is_floating_point() else value


def _without_constant(node: Any) -> Any:
    """Paddings and fillings with zero in the place of their number, and copies without what they write over."""
    if isinstance(node, Operation) and node.target in (
        aten.detach.default,
        aten._to_copy.default,
    ):  # autograd follows alias
        return Operation(node.place, node.shapes, node.dtypes, aten.alias.default, node.args, ())
    if isinstance(node, Operation) and node.target is aten.copy.default:
        return Operation(node.place, node.shapes, node.dtypes, aten.expand.default, (node.args[1], node.shapes[0]), ())
    if isinstance(node, Operation) and node.target in (aten.constant_pad_nd.default, aten.masked_fill.Scalar):
        return Operation(node.place, node.shapes, node.dtypes, node.target, (*node.args[:2], 0.0), ())
    return node


@dataclass
class Call:
    """An operation with its arguments by name."""

    source: Source
    ref: Ref
    node: Operation
    arguments: dict[str, Any]
    defaults: dict[str, Any]
    read: set[str] = field(default_factory=set)

    @staticmethod
    def of(source: Source, ref: Ref, node: Operation) -> Call:
        """Bind the arguments by the operation's schema."""
        schema = schema_of(node.target).arguments
        given = dict(zip([a.name for a in schema], node.args, strict=False)) | dict(node.kwargs)
        defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        return Call(source, ref, node, defaults | given, defaults)

    @property
    def name(self) -> str:
        """Name without the overload, as in ``add``."""
        return self.node.target.overloadpacket.__name__

    @property
    def shape(self) -> Shape:
        """Of the output that is asked for."""
        return self.source.shape(self.ref)

    def get(self, name: str) -> Any:
        """An argument: number, string, :class:`Ref`, or None; counts as read."""
        self.read.add(name)
        return self.arguments.get(name)

    def numbers(self, name: str) -> tuple[Any, ...]:
        """An argument that is a list of numbers."""
        value = self.get(name)
        return tuple(value) if isinstance(value, tuple | list) else (value,)

    def is_signal(self, name: str) -> bool:
        """Whether an argument depends on the network's input."""
        return any(self.source.depends(ref) for ref in _refs(self.arguments.get(name)))

    def signals(self) -> list[Ref]:
        """Arguments that depend on the network's input, in order."""
        return [ref for value in self.arguments.values() for ref in _refs(value) if self.source.depends(ref)]

    def constants(self) -> list[Any]:
        """Tensors and numbers that do not, as functions that compute them."""
        refs = [ref for value in self.arguments.values() for ref in _refs(value) if not self.source.depends(ref)]
        numbers = [partial(float, v) for v in self.arguments.values() if isinstance(v, float)]
        return [self.source.constant(ref) for ref in refs] + numbers

    def constant(self, name: str) -> Callable[[], Any]:
        """A function that computes an argument; raises where that depends on the network's input."""
        value = self.get(name)
        if not isinstance(value, Ref):
            return partial(itself, value)
        if self.source.depends(value):
            raise ValueError(f"its `{name}` depends on the network's input")
        return self.source.constant(value)

    def check_all_read(self) -> None:
        """No argument without a meaning for the rule may differ from its default."""
        for name, value in self.arguments.items():
            unread = name not in self.read and name not in _TYPE_ONLY
            if unread and (name not in self.defaults or value != self.defaults[name]):
                raise ValueError(f"its argument {name}={value} is not read by the rule; leave it at its default")


def itself(value: Any) -> Any:
    """The identity."""
    return value


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _refs(entry)


def hides_its_base(node: WriteAlias) -> bool:
    """Whether nothing is left of what was written over."""
    return math.prod(node.written.size) == math.prod(node.root.size)


@dataclass(frozen=True)
class Part:
    """A piece and the values or parts that it reads."""

    piece: Piece
    inputs: tuple[Ref | Part, ...]
    shape: Shape | None = None  # of the output; None: that of the operation
    leading: bool = False  # a batch dimension of 1 goes before ``shape`` even where it begins with 1


@dataclass(frozen=True)
class Arranged:
    """An arrangement of entries: coefficients 0 and 1, or others in [0, 1]; replayed to find its norm."""

    inputs: tuple[Ref, ...]
    copies: bool = False  # entries are only placed, so arrangements of one value that are joined are one arrangement
    nominal: float = 0.0
    otherwise: Part | None = None  # what it is where the inputs are not arrangements of one value


Found = Part | Arranged


def inputs_of(found: Found) -> set[Ref]:
    """Values that the steps of a rule's answer read."""
    inner = [{entry} if isinstance(entry, Ref) else inputs_of(entry) for entry in found.inputs]
    return set().union(*inner)


Rule = Callable[[Call], Found]
RULES: dict[object, Rule] = {}


def register(names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of these overloads, as in ``"neg add.Tensor"``; others of the same operation have none.

    Names that this version of torch does not have are left out.
    """
    found = [name.partition(".")[::2] for name in names.split()]
    packets = [(getattr(aten, name, None), overload or "default") for name, overload in found]

    def add(rule: Rule) -> Rule:
        RULES.update({getattr(p, overload): rule for p, overload in packets if hasattr(p, overload)})
        return rule

    return add


def check_dims(call: Call, dims: tuple[int, ...]) -> None:
    """Refuse a reduction over the batch."""
    shape = call.source.shape(call.get("self"))
    if not dims or (shape[0] == 1 and any(d % len(shape) == 0 for d in dims)):
        raise ValueError(
            f"a {call.name} over dimension 0 couples the examples of a batch; pass the other dimensions as `dim`"
        )


def axes_of(call: Call) -> int:
    """Number of spatial axes, from the name."""
    return int(next(character for character in call.name if character.isdigit()))


def over_first(call: Call, piece: Piece, name: str) -> Piece:
    """Where the first dimension is not the batch's 1 but stands for several inputs, the piece acts on each."""
    return piece if call.source.shape(call.get(name))[0] == 1 else Repeated(piece)


def scaled(ref: Ref | Part, factor: Any) -> Ref | Part:
    """A value times a number."""
    return ref if factor == 1 else Part(Scale(partial(float, factor)), (ref,))


def expanded(x: Tensor, output_shape: Shape) -> Tensor:
    """Every example in the output's shape, its dimensions aligned to the right."""
    missing = len(output_shape) - x.dim()
    shape = x.shape[1:] if missing <= 0 else (*[1] * missing, *x.shape[1:])
    while len(shape) >= len(output_shape):
        shape = shape[1:]  # a leading 1
    return x.reshape(len(x), *shape).expand(len(x), *output_shape[1:])


def why_refused(call: Call) -> str:
    """Why an operation without a rule has none."""
    return ATTENTION if call.name.startswith(_ATTENTIONS) else "no rule is known for this operation"
