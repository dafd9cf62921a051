"""One recorded run of a model: who calls what, where each tensor goes, and which operations bend or have kinks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._compat import DispatchMode
from lightning_lcnn.functional.bends import OF_ATEN, OF_CODE

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose outputs are followed
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass
class Usage:
    """What one module did during the run."""

    calls: int = 0
    inputs: list[tuple[int, ...]] = field(default_factory=list)  # shape of the first tensor of every call
    device: torch.device | None = None  # of that tensor
    consumers: list[str] = field(default_factory=list)  # module in which each operation on its output ran
    escapes: bool = False  # its output is, or is part of, the output of the model


@dataclass(frozen=True)
class Kink:
    """An operation that bends, and the line of the caller's source that asked for it."""

    owner: str  # path of the innermost module that was running
    operation: str  # its ATen name
    code: CodeType | None  # function that contains the call, outside torch
    line: int
    on_owner: bool  # whether that function is a method of the owner

    def place(self) -> str:
        """Return file and line."""
        return f"{os.path.basename(self.code.co_filename)}:{self.line}" if self.code else "inside torch"


@dataclass
class Record:
    """The whole run."""

    usage: dict[str, Usage]  # by module path
    kinks: list[Kink] = field(default_factory=list)
    smooth: list[Kink] = field(default_factory=list)  # places of operations that bend without a kink
    read_outside: set[str] = field(default_factory=set)  # modules whose tensors another module read directly
    output: Any = None

    def only_consumer(self, name: str) -> str | None:
        """Return the module that gets all of a module's output, if each is called once and nothing else gets it."""
        usage = self.usage[name]
        consumers = set(usage.consumers)
        if usage.calls != 1 or usage.escapes or len(consumers) != 1:
            return None
        (consumer,) = consumers
        return consumer if self.usage[consumer].calls == 1 else None


class _Recorder(DispatchMode):
    """Sees every ATen operation, also below scripted functions and custom autograd functions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.record = Record({name: Usage() for name in self.modules})
        self.stack: list[str] = []
        self.sources: dict[int, tuple[Tensor, str]] = {}  # kept alive, or the id would be used again
        self.owners: dict[int, set[str]] = {}
        for name, module in self.modules.items():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self.owners.setdefault(id(tensor), set()).add(name)

    def enter(self, name: str, inputs: tuple[Any, ...]) -> None:
        usage = self.record.usage[name]
        usage.calls += 1
        tensor = next(tensors(inputs), None)
        if tensor is not None:
            usage.inputs.append(tuple(tensor.shape))
            usage.device = tensor.device
        self.stack.append(name)

    def leave(self, name: str, output: Any) -> None:
        self.stack.pop()
        if isinstance(output, Tensor) and isinstance(self.modules[name], _LINEAR):
            self.sources[id(output)] = (output, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A dispatch mode, because nothing above ATen sees all: symbolic tracing loses statements that write in place, a
        # function mode sees the outer call alone of what runs in C++, such as scripted functions. An operation that is
        # missed is a kink that nobody reports. Stays as long as conversion must know what truly ran.
        here = self.stack[-1] if self.stack else ""
        for tensor in tensors((args, kwargs)):
            if id(tensor) in self.sources:
                self.record.usage[self.sources[id(tensor)][1]].consumers.append(here)
            owners = self.owners.get(id(tensor))
            if owners is not None and here not in owners:
                self.record.read_outside |= owners
        output = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__.rstrip("_")
        bend = OF_ATEN.get(operation)
        if bend is not None and any(t.is_floating_point() for t in tensors(output)):
            kink, is_part = self._kink(here, operation)
            has_kink = bend.has_kink(*args[1:], **(kwargs or {})) and not is_part
            (self.record.kinks if has_kink else self.record.smooth).append(kink)
        return output

    def _kink(self, owner: str, operation: str) -> tuple[Kink, bool]:
        """Where the operation was asked for, and whether it is a part of a function that is smooth as a whole."""
        frame: Any = inspect.currentframe()
        is_part = False
        while frame is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
            is_part |= frame.f_code in OF_CODE
            frame = frame.f_back
        if frame is None:
            return Kink(owner, operation, None, 0, False), is_part
        arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        receiver = frame.f_locals.get(arguments[0]) if arguments else None
        return Kink(owner, operation, frame.f_code, frame.f_lineno, receiver is self.modules[owner]), is_part


def record_run(model: nn.Module, example_input: Tensor) -> Record:
    """Run the model once in evaluation mode without gradients, and restore its training flags.

    Args:
        model: Any module; the run leaves no hooks in it.
        example_input: One batch.

    Returns:
        What happened.

    Raises:
        ValueError: If the model does not accept the input.
    """
    recorder = _Recorder(model)
    with _evaluation(model), _hooks(recorder), torch.no_grad(), recorder:
        try:
            output = model(example_input)
        except Exception as error:
            raise ValueError(
                f"`example_input` of shape {tuple(example_input.shape)}, {example_input.dtype}, on "
                f"{example_input.device} does not pass through `model` ({type(error).__name__}: {error}). "
                "Pass one batch as the model gets it in training; of a LightningModule without `forward` "
                "convert the network inside it (`self.model = to_low_curvature(self.model, ...)`)."
            ) from error
    for tensor in tensors(output):
        if id(tensor) in recorder.sources:
            recorder.record.usage[recorder.sources[id(tensor)][1]].escapes = True
    recorder.record.output = output
    return recorder.record


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and result objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors([item for item in vars(value).values() if isinstance(item, Tensor | tuple | list | dict)])


def same_values(first: Any, second: Any) -> bool:
    """Whether two outputs hold equal tensors, up to the rounding of a parallel sum."""
    left, right = list(tensors(first)), list(tensors(second))
    return len(left) == len(right) and all(map(_close, left, right))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _hooks(recorder: _Recorder) -> Iterator[None]:
    """Follow the module stack: enter before and leave after the hooks that the modules carry themselves."""
    handles = []
    for name, module in recorder.modules.items():
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: recorder.enter(name, (args, kwargs)),
                prepend=True,
                with_kwargs=True,
            )
        )
        handles.append(module.register_forward_hook(lambda _, args, out, name=name: recorder.leave(name, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
