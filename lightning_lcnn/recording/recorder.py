"""The recorder: a dispatch mode that writes down every ATen operation as a node and follows storages, not names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._compat import DispatchMode, depends_on_values, fake_mode, schema_of, storage_address
from lightning_lcnn.recording.nodes import (
    Captured,
    Geometry,
    Input,
    Layer,
    Node,
    Operation,
    Place,
    ReadAlias,
    Ref,
    State,
    WriteAlias,
    aten,
    covers,
    outputs_of,
    references,
)
from lightning_lcnn.recording.wholes import is_intact, is_intact_between_hooks

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
# ask about types and sizes only, whatever the values
_ABOUT_SHAPES = (aten.is_same_size.default, aten._has_compatible_shallow_copy_type.default)
# make a tensor in the shape of another; position of the value that fills it, or the value
_SHAPED_LIKE: dict[Any, int | float] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.empty_like.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.new_empty.default: 0.0,
    aten.new_empty_strided.default: 0.0,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
}
_READ_BY_STORAGE = (aten.as_strided.default, aten.alias.default)
_WAY_OUT = "or register a bound for the whole module: lightning_lcnn.bounds.register_rule(Class, rule)"


class NotRecordedError(ValueError):
    """The model does something that no functional program can stand for; the message names place and operation."""


@dataclass
class _Storage:
    """What is known of a storage at this moment of the run."""

    root: Geometry
    dtype: torch.dtype
    base: Ref  # value of the root now
    owner: str  # "" for a value of the run, "input", or the name of state
    known: dict[tuple[Geometry, torch.dtype], Ref] = field(default_factory=dict)


class Recorder(DispatchMode):
    """Records what runs under it.

    Tensors that depend on the network's input are fake: they have a shape and no values, so nothing can branch on
    them unseen, and recording costs no arithmetic. Constants are real.

    Args:
        model: the model that will run; its tensors are known by their path.
        keeps: which modules stay whole where nothing was added to them.
    """

    def __init__(self, model: nn.Module, keeps: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.dependent: set[int] = set()
        self.state_written: list[tuple[str, Place]] = []
        self.failed: Place | None = None
        self._keeps = keeps
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = [""]
        self._storages: dict[int, _Storage] = {}
        self._alive: list[Tensor] = []  # addresses of storages must not be used twice
        self._state = dict(_named_tensors(model))
        self._fakes = fake_mode()
        self._written_inside: list[Tensor] | None = None  # while a whole module runs

    def input(self, example: Tensor) -> Tensor:
        """A fake copy of the example, known as the network's input."""
        fake = self._fakes.from_tensor(example.detach().clone(), static_shapes=True)
        ref = self._append(Input(Place(""), (tuple(fake.shape),), (fake.dtype,)))
        self.dependent.add(ref.node)
        self._adopt(fake, ref, "input")
        return fake

    # ---- modules

    def call_module(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Answer a call of a module: as one node where it may stay whole, else by running its forward."""
        if self._written_inside is not None:  # parts of a whole module, whose tensors nobody follows
            return original(module, *args, **kwargs)
        path = self._paths.get(id(module))
        tensors = [t for t in outputs_of((*args, *kwargs.values())) if isinstance(t, Tensor)]
        reads_input = any(self.ref(t).node in self.dependent for t in tensors)
        whole = path is not None and reads_input
        if whole and path is not None and self._keeps(module) and is_intact_between_hooks(module):
            call = self._call_whole if is_intact(module) else self._call_between_hooks
            return call(original, module, path, args, kwargs)
        self._stack.append(f"{self._stack[-1]}.({type(module).__name__})" if path is None else path)
        try:
            return original(module, *args, **kwargs)
        except Exception:
            self.failed = self.failed or self.place()
            raise
        finally:
            self._stack.pop()

    def _call_between_hooks(
        self, original: Callable[..., Any], module: nn.Module, path: str, args: Any, kwargs: Any
    ) -> Any:
        """The layer as one node, and what its hooks do before and after it as operations.

        For the length of the call ``forward`` on the instance is ours, which torch calls between the hooks. Where a
        hook has set an attribute, as those that compute a weight do, the layer's operations are recorded instead.
        """
        before = _attributes(module)

        def forward(*inner: Any, **given: Any) -> Any:
            del module.__dict__["forward"]
            if _attributes(module) != before:
                return type(module).forward(module, *inner, **given)
            return self._call_whole(type(module).forward, module, path, inner, given)

        module.__dict__["forward"] = forward
        self._stack.append(path)
        try:
            return original(module, *args, **kwargs)
        finally:
            module.__dict__.pop("forward", None)
            self._stack.pop()

    def _call_whole(self, original: Callable[..., Any], module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        self._stack.append(path)
        self._written_inside = []
        place = Place(path)
        try:
            recorded = self._recorded(tuple(args)), tuple((k, self._recorded(v)) for k, v in kwargs.items())
            result = original(module, *args, **kwargs)
            written = [t for t in self._written_inside if not self._is_state(t)]
        except Exception:
            self.failed = self.failed or place
            raise
        finally:
            self._written_inside = None
            self._stack.pop()
        outputs = outputs_of(result)
        changed = _in_place_by_name(module, args, outputs) if not written else None
        node = Layer(place, *_described(outputs), path, *recorded, bool(written) or changed is not None)
        self._finish(node, outputs, self._in_place(place, outputs, written))
        if changed is not None:
            self._write(changed, Ref(len(self.nodes) - 1), place)
        return result

    def _in_place(self, place: Place, outputs: list[Any], written: list[Tensor]) -> list[Tensor | None]:
        """For each output whether a whole module wrote it into its input: then the output itself."""
        addresses = {_address(t) for t in written}
        found: list[Tensor | None] = [
            t if isinstance(t, Tensor) and _address(t) in addresses else None for t in outputs
        ]
        if len(addresses) != sum(t is not None for t in found):
            raise NotRecordedError(f"`model` cannot be recorded: {place} writes into a tensor that it does not return.")
        return found

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = list(_written(func, args, kwargs)) if schema_of(func).is_mutable else []
        if self._written_inside is not None:
            self._written_inside += [t for t in written if _address(t) in self._storages]
            return func(*args, **kwargs)
        if func.namespace == "prim" or func in _ABOUT_SHAPES:
            return func(*args, **kwargs)
        return self._record(func, args, kwargs, written)

    def _record(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        place = self.place()
        if func is aten.index.Tensor:
            args = (args[0], self._without_masks(args[1]))
        if func is aten.rrelu_with_noise.default and not kwargs.get("training", len(args) > 4 and args[4]):
            written = []  # the schema says that noise is written; in evaluation it is not
        recorded = self._recorded(tuple(args)), tuple((k, self._recorded(v)) for k, v in kwargs.items())
        depends = any(ref.node in self.dependent for ref in _refs_of(recorded))
        moved = torch.Tag.inplace_view in func.tags  # changes what a name shows, not values
        result = self._execute(func, args, kwargs, [] if moved else written, depends, place)
        outputs = outputs_of(result)
        if func in _READ_BY_STORAGE:
            return result
        if depends and any(not isinstance(output, Tensor) for output in outputs if output is not None):
            raise NotRecordedError(branches(func, place))
        target, recorded = (func, recorded) if not written else functional(func, *recorded, place)
        if func in _SHAPED_LIKE and isinstance(result, Tensor):  # what it was shaped like does not enter
            fill = _SHAPED_LIKE[func]
            value = recorded[0][fill] if isinstance(fill, int) else fill
            target, recorded = aten.full.default, ((tuple(result.shape), value), (("dtype", result.dtype),))
        targets: list[Any] = written if written and not moved else [None] * len(outputs)
        self._finish(Operation(place, *_described(outputs), target, *recorded), outputs, targets)
        return result

    def _without_masks(self, indices: Any) -> list[Any]:
        """Indices with constant masks replaced by the places that they choose, so that sizes are known."""
        found: list[Any] = []
        for index in indices:
            mask = (
                isinstance(index, Tensor) and index.dtype == torch.bool and self.ref(index).node not in self.dependent
            )
            if mask and not self._is_fake(index):
                with self:
                    found += aten.unbind.int(aten.nonzero.default(index), 1)
            else:
                found.append(index)
        return found

    def _execute(self, func: Any, args: Any, kwargs: Any, written: list[Tensor], depends: bool, place: Place) -> Any:
        """Run an operation, unless it would write into what is not ours or put fake values into real memory."""
        kept = [t for t in written if self._is_state(t) or (depends and not self._is_fake(t))]
        if not kept:
            try:
                return func(*args, **kwargs)
            except Exception as error:
                if not depends_on_values(error):
                    raise
                raise NotRecordedError(branches(func, place)) from error
        if len(written) > 1 or func.overloadpacket in (aten.resize_, aten.set_):
            raise NotRecordedError(
                f"`model` cannot be recorded: `{func}` in {place} writes into several tensors at once."
            )
        return written[0]

    def _finish(self, node: Node, outputs: list[Any], targets: list[Tensor | None]) -> None:
        """Append a node and connect its outputs with tensors, or with what they were written into."""
        number = self._append(node).node
        if any(ref.node in self.dependent for ref in references(node)):
            self.dependent.add(number)
        for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
            if target is not None:
                self._write(target, Ref(number, i), node.place)
            elif isinstance(output, Tensor):
                self._adopt(output, Ref(number, i), "")

    def _append(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(len(self.nodes) - 1)

    def place(self) -> Place:
        """Where the model is now."""
        return Place(self._stack[-1], _line())

    # ---- storages

    def _recorded(self, value: Any) -> Any:
        """Arguments with tensors replaced by references."""
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, tuple | list):
            return tuple(self._recorded(entry) for entry in value)
        return value

    def ref(self, tensor: Tensor) -> Ref:
        """The value that a tensor shows now, whatever name it was changed through."""
        storage = self._storages.get(_address(tensor))
        if storage is None:
            return self._source(tensor)
        key = Geometry.of(tensor), tensor.dtype
        if key not in storage.known:
            if storage.dtype != tensor.dtype or not covers(storage.root, key[0]):
                raise NotRecordedError(
                    f"`model` cannot be recorded: {self.place()} reads memory that was made as "
                    f"{storage.dtype} of shape {storage.root.size} in another type or beyond its end; clone the tensor "
                    "first."
                )
            node = ReadAlias(self.place(), (key[0].size,), (tensor.dtype,), storage.base, storage.root, key[0])
            storage.known[key] = self._derived(node)
            self._alive.append(tensor)
        return storage.known[key]

    def _derived(self, node: ReadAlias | WriteAlias) -> Ref:
        ref = self._append(node)
        if any(r.node in self.dependent for r in references(node)):
            self.dependent.add(ref.node)
        return ref

    def _source(self, tensor: Tensor) -> Ref:
        """A tensor that the run did not make: state by its path, anything else as it is."""
        if self._is_fake(tensor):
            raise NotRecordedError(
                f"`model` cannot be recorded: {self.place()} reads a tensor that a whole layer kept."
            )
        path, owner = self._state.get(_address(tensor), ("", None))
        described = _described([tensor])
        if owner is not None and Geometry.of(owner) == Geometry.of(tensor) and owner.dtype == tensor.dtype:
            ref = self._append(State(Place(""), *described, path))
        else:
            ref = self._append(Captured(self.place(), *described, tensor))
        self._adopt(tensor, ref, path or "a tensor that is no parameter or buffer")
        return ref

    def _adopt(self, tensor: Tensor, ref: Ref, owner: str) -> None:
        """Note that a tensor shows this value."""
        key, address = (Geometry.of(tensor), tensor.dtype), _address(tensor)
        if address not in self._storages:
            self._storages[address] = _Storage(key[0], tensor.dtype, ref, owner)
        self._storages[address].known[key] = ref
        self._alive.append(tensor)

    def _write(self, tensor: Tensor, ref: Ref, place: Place) -> None:
        """Note that a value was written into the storage that a tensor shows."""
        self.ref(tensor)  # what was there: makes state known
        storage, key = self._storages[_address(tensor)], (Geometry.of(tensor), tensor.dtype)
        if storage.owner not in ("", "input"):  # entry points pass a copy of their input
            self.state_written.append((storage.owner, place))
        if key[0] != storage.root:
            node = WriteAlias(place, (storage.root.size,), (storage.dtype,), storage.base, ref, storage.root, key[0])
            storage.base = self._derived(node)
        else:
            storage.base = ref
        storage.known = {(storage.root, storage.dtype): storage.base, key: ref}

    def _is_state(self, tensor: Tensor) -> bool:
        storage = self._storages.get(_address(tensor))
        if storage is None:  # not seen before: neither made by the run nor its input
            return True
        return storage.owner not in ("", "input")

    def _is_fake(self, tensor: Tensor) -> bool:
        return self._fakes.is_our_fake(tensor)


def _in_place_by_name(module: nn.Module, args: Any, outputs: list[Any]) -> Tensor | None:
    """The input that a layer with ``inplace=True`` overwrites on real tensors: our kernels do not run on fake ones."""
    x = args[0] if args else None
    if not (getattr(module, "inplace", False) and isinstance(x, Tensor) and len(outputs) == 1):
        return None
    new = _address(outputs[0]) != _address(x) and (outputs[0].shape, outputs[0].dtype) == (x.shape, x.dtype)
    return x if new else None


def _described(outputs: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    shapes = tuple(tuple(t.shape) if isinstance(t, Tensor) else None for t in outputs)
    return shapes, tuple(t.dtype if isinstance(t, Tensor) else None for t in outputs)


def _address(tensor: Tensor) -> int:
    try:
        return storage_address(tensor)
    except (NotImplementedError, RuntimeError) as error:
        raise NotRecordedError(f"`model` cannot be recorded: it holds a tensor of layout {tensor.layout}.") from error


def _named_tensors(model: nn.Module) -> Iterator[tuple[int, tuple[str, Tensor]]]:
    """Address, path and tensor of all state, attributes that are plain tensors included; parameters last, they win."""
    for path, module in model.named_modules():
        plain = [(name, value) for name, value in module.__dict__.items() if isinstance(value, Tensor)]
        for name, tensor in (*plain, *module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
            yield _address(tensor), (f"{path}.{name}" if path else name, tensor)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Tensors that an operation writes into, by its schema."""
    for i, argument in enumerate(schema_of(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (t for t in outputs_of(value) if isinstance(t, Tensor))


def _refs_of(recorded: Any) -> Iterator[Ref]:
    if isinstance(recorded, Ref):
        yield recorded
    elif isinstance(recorded, tuple):
        for entry in recorded:
            yield from _refs_of(entry)


def functional(func: Any, args: Any, kwargs: Any, place: Place) -> tuple[Any, tuple[Any, Any]]:
    """The operation that computes what an in-place or ``out=`` operation writes, and its arguments."""
    kept = {a.name for a in schema_of(func).arguments if not (a.is_out)}
    kwargs = tuple((k, v) for k, v in kwargs if k in kept)
    name = schema_of(func).name.split("::")[1]
    packet = getattr(torch.ops.aten, name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name, None)
    wanted = [a.name for a in schema_of(func).arguments if a.name in kept]
    for overload in () if packet is None or func.namespace != "aten" else packet.overloads():
        candidate = getattr(packet, overload)
        same = [a.name for a in schema_of(candidate).arguments] == wanted and _types(candidate) == _types(func, kept)
        if same and not schema_of(candidate).is_mutable:
            return candidate, (args, kwargs)
    raise NotRecordedError(
        f"`model` cannot be recorded: `{func}` in {place} writes in place and has no form that does not; "
        f"use one that has, {_WAY_OUT}."
    )


def _types(func: Any, kept: set[str] | None = None) -> list[str]:
    return [str(a.type) for a in schema_of(func).arguments if kept is None or a.name in kept]


def branches(func: Any, place: Place) -> str:
    """Message for an operation that turns values of the network into Python numbers or into sizes."""
    return (
        f"`model` cannot be recorded: `{func}` in {place} branches on values that depend on the network's input, "
        f"so there is no fixed program. Compute both sides and choose with torch.where, {_WAY_OUT}."
    )


def _line() -> str:
    """The innermost line of code that is neither torch's nor ours."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE, "<")):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _attributes(module: nn.Module) -> dict[str, int]:
    """Which objects the module holds, by name; parameters and buffers included, hooks not."""
    own = {name: id(value) for name, value in module.__dict__.items() if not isinstance(value, dict)}
    return own | {name: id(value) for name, value in (*module._parameters.items(), *module._buffers.items())}
