"""Run a model and leave it, its buffers, its attributes and its flags as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def evaluation_copy(model: nn.Module, double: bool = False) -> Iterator[None]:
    """In evaluation mode, on copies of the buffers; with ``double`` on float64 copies of all tensors.

    The model itself runs, not a deep copy: hooks and replaced forwards hold references to the very modules, which a
    copy would leave to run with other tensors. Everything is put back, attributes that ``forward`` sets included.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]  # hold no dicts
    before = [(dict(m.__dict__), {name: dict(m.__dict__[name]) for name in _REGISTRIES}) for m in modules]
    copies: dict[int, Tensor] = {}
    try:
        for module in modules:
            module.__dict__["training"] = False  # `train` may be overridden
            _exchange(module, copies, double)
        yield
    finally:
        for module, (attributes, registries) in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in registries.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)


def _exchange(module: nn.Module, copies: dict[int, Tensor], double: bool) -> None:
    """Put copies in the place of tensors; a tensor with two names keeps both."""

    def copied(tensor: Any, convert: Callable[[Tensor], Tensor]) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = convert(tensor)
        return copies[id(tensor)]

    def to_double(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)

    buffers = module.__dict__["_buffers"]
    convert = to_double if double else lambda tensor: tensor.detach().clone()
    buffers.update({name: copied(tensor, convert) for name, tensor in buffers.items()})
    if double:
        parameters = module.__dict__["_parameters"]
        parameters.update({name: copied(tensor, to_double) for name, tensor in parameters.items()})
        plain = {name: copied(value, to_double) for name, value in module.__dict__.items() if isinstance(value, Tensor)}
        module.__dict__.update(plain)
