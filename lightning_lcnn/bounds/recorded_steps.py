"""From a recorded program to the steps that bounds and surrogate are computed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn.bounds.rules import aten_arithmetic, aten_arrangements, aten_layers, aten_pooling
from lightning_lcnn.bounds.rules.aten_activations import elementwise
from lightning_lcnn.bounds.rules.aten_calls import (
    RULES,
    Arranged,
    Call,
    Found,
    Part,
    Source,
    expanded,
    hides_its_base,
    inputs_of,
    why_refused,
    without_constants,
)
from lightning_lcnn.bounds.rules.contractions import Repeated
from lightning_lcnn.bounds.rules.modules import REFUSED, exact_type, has_rule, piece_of, reshape
from lightning_lcnn.bounds.rules.pieces import Activation, Piece, Product, Rearrange, Scale, Shape, Sum, Weight
from lightning_lcnn.bounds.steps import Step, refusal
from lightning_lcnn.recording.nodes import (
    Layer,
    Node,
    Operation,
    Program,
    ReadAlias,
    Ref,
    WriteAlias,
    evaluate,
    references,
)

_RULE_FILES = (aten_arithmetic, aten_arrangements, aten_layers, aten_pooling)  # importing them fills RULES


@dataclass(frozen=True)
class RecordedStep:
    """A step, its output's shape, and the constants that must be finite for its bound to mean anything."""

    step: Step
    shape: Shape
    constants: tuple[Callable[[], Any], ...] = ()


Constants = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class _Answer:
    """What a rule says of a value."""

    inputs: set[Ref]
    found: Found
    constants: Constants
    module: nn.Module | None = None

    def emit(self, builder: _Builder, ref: Ref, where: _Where) -> int:
        return builder.emit(self.found, ref, where, self.constants, self.module)


def build_recorded_steps(model: nn.Module, program: Program, double: bool = False) -> list[RecordedStep]:
    """Look up every operation and layer that the output depends on.

    Args:
        model: what the program was recorded of; its parameters are read anew whenever a step is asked.
        program: its run.
        double: compute constants in float64, for certificates.

    Raises:
        ValueError: for an operation or layer without a bound; names the module, the operation and the way out.
    """
    builder = _Builder(Source(program, model, double))
    builder.build()
    return builder.steps


class _Builder:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.steps: list[RecordedStep] = []
        self._of: dict[Ref, int] = {}  # step that computes a value
        self._origin: dict[Ref, Ref] = {}  # value whose entries an arrangement places
        self._names: Counter[str] = Counter()

    def build(self) -> None:
        program = self.source.program
        shape = canonical(program.nodes[0].shapes[0] or ())
        self.steps.append(RecordedStep(Step("input", "input", Rearrange(), (), ""), shape))
        self._of[Ref(0)] = 0
        for ref, answer in self._answers():
            where = _Where.of(program.nodes[ref.node], self.source.model)
            with _refusing(where):
                self._of[ref] = answer.emit(self, ref, where)
        last = self._of[program.output]
        self.steps.append(RecordedStep(Step("output", "output", Rearrange(), (last,), ""), self.steps[last].shape))
        self.steps = _read(self.steps)

    def _answers(self) -> list[tuple[Ref, _Answer]]:
        """What the rules say of every value that is read, in order; found backwards, for a rule may span several nodes.

        The first of several refusals is raised.
        """
        wanted, answers = {self.source.program.output}, []
        refusal: ValueError | None = None
        while wanted:
            ref = max(wanted, key=lambda r: (r.node, r.output))
            wanted.remove(ref)
            if ref.node == 0:
                continue
            node = self.source.program.nodes[ref.node]
            try:
                with _refusing(_Where.of(node, self.source.model)):
                    _check_type(node.dtypes[ref.output])
                    answers.append((ref, self._answer(ref, node)))
                wanted |= answers[-1][1].inputs
            except ValueError as error:
                refusal = error
                wanted |= {r for r in references(node) if self.source.depends(r)}
        if refusal is not None:
            raise refusal
        return answers[::-1]

    def _answer(self, ref: Ref, node: Node) -> _Answer:
        if isinstance(node, Layer):
            return self._layer(ref, node)
        found, constants = self._found(ref, node)
        return _Answer(inputs_of(found), found, tuple(constants))

    def _layer(self, ref: Ref, node: Layer) -> _Answer:
        module = self.source.model.get_submodule(node.path)
        if not has_rule(module):
            raise ValueError(REFUSED.get(exact_type(module), "no rule is known for this class"))
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Ref) or ref.output:
            raise ValueError("its rule holds for a call with one tensor alone")
        piece = piece_of(module)
        if self.source.shape(node.args[0])[0] != 1 and not _for_any_rank(piece):
            piece = Repeated(piece)
        return _Answer({node.args[0]}, Part(piece, (node.args[0],)), (partial(_state, module),), module)

    def _found(self, ref: Ref, node: Node) -> tuple[Found, list[Callable[[], Any]]]:
        if isinstance(node, ReadAlias):
            return Arranged((node.base,), copies=True), []
        if isinstance(node, WriteAlias):
            read = [r for r in (node.base, node.value) if self.source.depends(r)]
            kept = [node.value] if hides_its_base(node) and self.source.depends(node.value) else read
            return Arranged(tuple(kept), copies=True), []
        assert isinstance(node, Operation)
        call = Call.of(self.source, ref, node)
        rule = RULES.get(node.target)
        found = elementwise(call) if rule is None else rule(call)
        if found is None:
            raise ValueError(why_refused(call))
        if ref.output and not isinstance(found, Arranged):
            raise ValueError(f"output {ref.output} of it has no rule, only its first")
        call.check_all_read()
        return found, call.constants()

    def emit(self, found: Found, ref: Ref, where: _Where, constants: Constants, module: nn.Module | None = None) -> int:
        """Append the steps of a rule's answer."""
        if isinstance(found, Arranged):
            return self._arrange(found, ref, where, constants)
        inner = replace(where, kind=f"{where.kind} (part)")
        inputs = [self._of[i] if isinstance(i, Ref) else self.emit(i, ref, inner, constants) for i in found.inputs]
        shape = self.source.shape(ref) if found.shape is None else found.shape
        target = (1, *shape) if found.leading else canonical(shape)
        if (
            isinstance(found.piece, Rearrange)
            and found.piece.function is reshape
            and self.steps[inputs[0]].shape == target
        ):
            return inputs[0]
        if isinstance(found.piece, Sum | Product | Scale):
            inputs = [self._expand(i, shape, where) for i in inputs]
        return self._append(found.piece, inputs, shape, where, constants, module, found.leading)

    def _expand(self, i: int, shape: Shape, where: _Where) -> int:
        """Broadcast a step's output, so that the operands of a sum have one shape."""
        if self.steps[i].shape == canonical(shape):
            return i
        return self._append(Rearrange(expanded), [i], shape, replace(where, kind="expand"), [])

    def _arrange(self, found: Arranged, ref: Ref, where: _Where, constants: Constants) -> int:
        origins = {self._origin.get(i, i) for i in found.inputs}
        shape = self.source.shape(ref)
        if found.copies and len(origins) == 1:
            (self._origin[ref],) = origins
        if len(set(found.inputs)) == 1 or len(origins) == 1:
            (start,) = set(found.inputs) if len(set(found.inputs)) == 1 else origins
            piece = Rearrange(Replay(self.source, ref, start), found.nominal)
            return self._append(piece, [self._of[start]], shape, where, constants)
        if found.otherwise is not None:
            return self.emit(found.otherwise, ref, where, constants)
        parts = [
            self._append(Rearrange(Replay(self._alone(i, found), ref, i)), [self._of[i]], shape, where, constants)
            for i in found.inputs
        ]
        return self._append(Sum((1.0,) * len(parts)), parts, shape, where, [])

    def _alone(self, kept: Ref, found: Arranged) -> _Alone:
        others = frozenset(found.inputs) - {kept}
        return _Alone(self.source.program, self.source.model, self.source.double, others)

    def _append(
        self,
        piece: Piece,
        inputs: list[int],
        shape: Shape,
        where: _Where,
        constants: Constants,
        module: nn.Module | None = None,
        leading: bool = False,
    ) -> int:
        self._names[where.name] += 1
        count = self._names[where.name] - 1
        name = f"{where.name}_{count}" if count and module is None else where.name
        step = Step(name, where.kind, piece, tuple(inputs), "", module, where.words)
        self.steps.append(RecordedStep(step, (1, *shape) if leading else canonical(shape), tuple(constants)))
        return len(self.steps) - 1


@contextmanager
def _refusing(where: _Where) -> Iterator[None]:
    """Name the place in a rule's refusal."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("`model`"):
            raise
        reason = f"{error} ({where.line})" if where.line else str(error)
        raise ValueError(refusal(where.words, where.module_type, reason)) from error


def _read(steps: list[RecordedStep]) -> list[RecordedStep]:
    """Steps that the last one depends on: arrangements that were joined to one leave their parts behind."""
    wanted = {0, len(steps) - 1}
    for i in range(len(steps) - 1, -1, -1):
        if i in wanted:
            wanted.update(steps[i].step.inputs)
    order = {old: new for new, old in enumerate(sorted(wanted))}
    kept = [steps[i] for i in order]
    return [replace(r, step=replace(r.step, inputs=tuple(order[i] for i in r.step.inputs))) for r in kept]


@dataclass(frozen=True)
class _Alone(Source):
    """Replays one node with these of its inputs zero."""

    zeros: frozenset[Ref] = frozenset()

    def linear_part(self, target: Ref, source: Ref, x: Tensor) -> Tensor:
        program = self.program
        node = program.nodes[target.node]
        given = {ref: torch.zeros(self.shape(ref), dtype=torch.float64) for ref in self.zeros} | {source: x}

        def lookup(ref: Ref) -> Any:
            if ref in given:
                return given[ref]
            return without_constants(program.value(ref, self.model, {}, double=True))

        return evaluate(node, self.model, None, lookup, True)[target.output]


@dataclass(frozen=True)
class _Where:
    """Name, kind and place of a node, in words."""

    name: str
    kind: str
    words: str
    module_type: type = NoneType
    line: str = ""  # "file.py:12", where known

    @staticmethod
    def of(node: Node, model: nn.Module) -> _Where:
        if isinstance(node, Layer):
            kind = type(model.get_submodule(node.path))
            return _Where(node.path, kind.__name__, f"module '{node.path}' ({kind.__name__})", kind)
        kind_name = node.target.overloadpacket.__name__ if isinstance(node, Operation) else type(node).__name__
        path = node.place.path
        words = f"`{kind_name}` in the forward of " + (f"module '{path}'" if path else "the model")
        return _Where(f"{path}.{kind_name}" if path else kind_name, kind_name, words, line=node.place.line)


def _for_any_rank(piece: Piece) -> bool:
    return isinstance(piece, Activation) or (isinstance(piece, Weight) and piece.geometry is None)


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _check_type(dtype: torch.dtype | None) -> None:
    if dtype is None or not dtype.is_floating_point:
        raise ValueError("its output is no floating-point tensor")


def canonical(shape: Shape) -> Shape:
    """The shape with a leading 1 for the batch, which bounds count on; a number is a vector of length 1."""
    shape = shape if shape[:1] == (1,) else (1, *shape)
    return shape if len(shape) > 1 else (1, 1)


@dataclass(frozen=True)
class Replay:
    """The arrangement of entries between two values of a program, as ``Rearrange`` calls it."""

    source: Source
    target: Ref
    origin: Ref

    def __call__(self, x: Tensor, output_shape: Shape) -> Tensor:
        """Map x of shape (H, …) to (H, …)."""

        def one(v: Tensor) -> Tensor:
            value = self.source.linear_part(self.target, self.origin, v.reshape(self.source.shape(self.origin)))
            return value.reshape(output_shape[1:])

        return one(x[0])[None] if len(x) == 1 else torch.vmap(one)(x)
