"""A recorded run as a functional program: every node makes new values, nothing is written, nothing has two names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
Shape = tuple[int, ...]
# their result depends on strides, which a replay need not have; reshape means the same for values
_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Ref:
    """One output of one node."""

    node: int
    output: int = 0


@dataclass(frozen=True)
class Place:
    """Where in the model an operation was called."""

    path: str  # of the innermost module whose forward was running, "" for the model itself
    line: str = ""  # "file.py:12" in code that is not torch's, where known

    def __str__(self) -> str:
        """For messages."""
        return (f"module '{self.path}'" if self.path else "the model itself") + (f" ({self.line})" if self.line else "")


@dataclass(frozen=True)
class Geometry:
    """Which places of a storage a tensor shows, in which order."""

    size: Shape
    stride: Shape
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Geometry:
        """Geometry of a tensor; strides of dimensions of size 1 mean nothing and are 0."""
        size = tuple(tensor.shape)
        stride = tuple(s if n > 1 else 0 for n, s in zip(size, tensor.stride(), strict=True))
        return Geometry(size, stride, int(tensor.storage_offset()))


@dataclass(frozen=True)
class Node:
    """What all nodes have.

    Args:
        place: where it was called.
        shapes: of its outputs at one example; None for an output that is no tensor.
        dtypes: of its outputs, None likewise.
    """

    place: Place
    shapes: tuple[Shape | None, ...]
    dtypes: tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Input(Node):
    """The network's input."""


@dataclass(frozen=True)
class State(Node):
    """A parameter or buffer, by its path, so that it is read anew by every replay."""

    path: str


@dataclass(frozen=True)
class Captured(Node):
    """A tensor that is neither: from a closure, a global, a list. Held by reference, so a change of it is seen."""

    tensor: Tensor


@dataclass(frozen=True)
class Layer(Node):
    """A module that is called as a whole, by its path."""

    path: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    writes: bool = False  # whether it works in place


@dataclass(frozen=True)
class Operation(Node):
    """An ATen operation in its functional form; ``target`` writes into nothing."""

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """As in ``aten.add.Tensor``."""
        return str(self.target)


@dataclass(frozen=True)
class ReadAlias(Node):
    """Entries of ``base`` as another tensor over the same storage shows them."""

    base: Ref
    root: Geometry  # of the base
    read: Geometry


@dataclass(frozen=True)
class WriteAlias(Node):
    """``base`` after ``value`` was written through another tensor over the same storage."""

    base: Ref
    value: Ref
    root: Geometry
    written: Geometry


def references(node: Node) -> Iterator[Ref]:
    """What a node reads, in order, repeated where repeated."""
    if isinstance(node, Layer | Operation):
        yield from _refs((node.args, tuple(v for _, v in node.kwargs)))
    elif isinstance(node, ReadAlias):
        yield node.base
    elif isinstance(node, WriteAlias):
        yield from (node.base, node.value)


def _refs(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _refs(entry)


def substitute(value: Any, function: Callable[[Ref], Any]) -> Any:
    """Replace every :class:`Ref` in a nest of tuples and lists; they come back as lists, which ATen takes."""
    if isinstance(value, Ref):
        return function(value)
    if isinstance(value, tuple | list):
        return [substitute(entry, function) for entry in value]
    return value


def evaluate(node: Node, model: nn.Module, x: Tensor | None, lookup: Callable[[Ref], Any], double: bool) -> Any:
    """Outputs of a node as a list; ``double`` does all floating-point arithmetic in float64."""
    if isinstance(node, Input):
        return [x]
    if isinstance(node, State | Captured):
        tensor = attrgetter(node.path)(model) if isinstance(node, State) else node.tensor
        return [_doubled(tensor) if double else tensor]
    if isinstance(node, ReadAlias):
        return [lookup(node.base).reshape(-1)[read_places(node.root, node.read)]]
    if isinstance(node, WriteAlias):
        both = torch.cat([lookup(ref).reshape(-1) for ref in (node.base, node.value)])
        return [both[write_places(node.root, node.written)]]
    if isinstance(node, Layer):
        return _call_layer(node, model, lookup)
    assert isinstance(node, Operation)
    return outputs_of(_call(node, lookup, double))


def _call(node: Operation, lookup: Callable[[Ref], Any], double: bool) -> Any:
    args, kwargs = substitute(node.args, lookup), {k: substitute(v, lookup) for k, v in node.kwargs}
    if node.target in _VIEWS:
        return args[0].reshape(args[1])
    if double and isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
        kwargs["dtype"] = torch.float64
    result = node.target(*args, **kwargs)
    return _doubled(result) if double and isinstance(result, Tensor) else result


def _call_layer(node: Layer, model: nn.Module, lookup: Callable[[Ref], Any]) -> Any:
    module = model.get_submodule(node.path)
    args, kwargs = substitute(node.args, lookup), {k: substitute(v, lookup) for k, v in node.kwargs}
    if node.writes:
        args = [a.clone() if isinstance(a, Tensor) else a for a in args]
    return outputs_of(type(module).forward(module, *args, **kwargs))  # what its hooks do is recorded beside it


def outputs_of(result: Any) -> list[Any]:
    """One entry for every output, nests flattened."""
    if isinstance(result, tuple | list):
        return [output for entry in result for output in outputs_of(entry)]
    return [result]


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@lru_cache(maxsize=256)
def _places(geometry: Geometry) -> Tensor:
    """Place in the storage of every entry."""
    places = torch.tensor(geometry.offset)
    for size, stride in zip(geometry.size, geometry.stride, strict=True):
        places = places[..., None] + torch.arange(size) * stride
    return places


def covers(root: Geometry, other: Geometry) -> bool:
    """Whether every place of ``other`` is one of ``root``'s."""
    return bool(torch.isin(_places(other), _places(root)).all())


@lru_cache(maxsize=256)
def read_places(root: Geometry, read: Geometry) -> Tensor:
    """For every entry of an alias its position among the entries of the root."""
    return _positions(root)[_places(read)]


@lru_cache(maxsize=256)
def write_places(root: Geometry, written: Geometry) -> Tensor:
    """For every entry of the root where its new value stands in (old entries, written entries)."""
    count = torch.Size(root.size).numel()
    result = torch.arange(count)
    positions = read_places(root, written).reshape(-1)
    result[positions] = count + torch.arange(positions.numel())
    return result.view(root.size)


def _positions(root: Geometry) -> Tensor:
    places = _places(root).reshape(-1)
    positions = torch.full((int(places.max()) + 1 if places.numel() else 0,), -1)
    positions[places] = torch.arange(places.numel())
    return positions


@dataclass(frozen=True)
class Program:
    """What a model did with one example, in order.

    Args:
        nodes: the first is the :class:`Input`; a node reads earlier ones only.
        output: the value that the model returned.
        dependent: numbers of the nodes that depend on the network's input.
        needed: numbers of the nodes that the output depends on, in order.
        state_written: where the model writes into a parameter, buffer or captured tensor, with its name.
    """

    nodes: tuple[Node, ...]
    output: Ref
    dependent: frozenset[int]
    needed: tuple[int, ...]
    state_written: tuple[tuple[str, Place], ...] = ()

    def run(self, model: nn.Module, x: Tensor, double: bool = False) -> Tensor:
        """Replay on one example, shape (1, …), with the parameters as they are now."""
        values: dict[int, list[Any]] = {}
        last = {ref.node: i for i in self.needed for ref in references(self.nodes[i])}
        for i in self.needed:
            node = self.nodes[i]
            values[i] = evaluate(node, model, x, lambda ref: values[ref.node][ref.output], double)
            for used in {ref.node for ref in references(node)}:
                if last[used] == i and used != self.output.node:
                    del values[used]
        return values[self.output.node][self.output.output]

    def value(self, ref: Ref, model: nn.Module, known: dict[Ref, Tensor], double: bool = False) -> Any:
        """Value of a reference when those of ``known`` are given; differentiable in parameters and in ``known``."""
        values: dict[int, list[Any]] = {}

        def lookup(wanted: Ref) -> Any:
            if wanted in known:
                return known[wanted]
            if wanted.node not in values:
                values[wanted.node] = evaluate(self.nodes[wanted.node], model, None, lookup, double)
            return values[wanted.node][wanted.output]

        return lookup(ref)
