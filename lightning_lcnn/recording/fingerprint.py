"""Whether two runs were of the same function: a digest of a recorded program and of every number that it reads."""

from __future__ import annotations

import hashlib
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn.recording.nodes import Layer, Program, Ref, State

_PLAIN = (
    int,
    float,
    complex,
    str,
    bool,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_REGISTRIES = frozenset(nn.Module().__dict__) - {"training"}


def fingerprint(model: nn.Module, program: Program) -> str | None:
    """Digest of operations, arguments, attributes of whole layers, and the contents of parameters and buffers.

    Args:
        model: what the program was recorded of, just now.
        program: its run.

    Returns:
        Equal for equal functions and only for these; None where a layer has an attribute whose equality is not known.

    Example:
        >>> from lightning_lcnn.recording.program import record_program
        >>> net, x = nn.Sequential(nn.Linear(2, 2)).eval(), torch.zeros(1, 2)
        >>> before = fingerprint(net, record_program(net, x))
        >>> net[0].weight.data.neg_() is None
        False
        >>> before == fingerprint(net, record_program(net, x))
        False
    """
    digest = hashlib.blake2b()
    try:
        for i in program.needed:
            node = program.nodes[i]
            _add(digest, (type(node).__name__, node.shapes, node.dtypes))
            for name, value in vars(node).items():
                if name == "target":
                    _add(digest, str(value))
                elif name not in ("place", "shapes", "dtypes"):
                    _add(digest, value)
            if isinstance(node, State):
                _add(digest, attrgetter(node.path)(model))
            elif isinstance(node, Layer):
                _add(digest, model.get_submodule(node.path))
        _add(digest, program.output)
    except _UnknownError:
        return None
    return digest.hexdigest()


class _UnknownError(Exception):
    """A value of which it is not known whether another is equal."""


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _add(digest, ("tensor", tuple(value.shape), value.dtype))
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, _PLAIN):
        digest.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, tuple | list | torch.Size):
        digest.update(f"{len(value)}(".encode())
        for entry in value:
            _add(digest, entry)
    elif isinstance(value, dict):
        _add(digest, tuple(value.items()))
    elif isinstance(value, nn.Module):
        _add_module(digest, value)
    elif isinstance(value, Ref):
        _add(digest, ("ref", value.node, value.output))
    elif hasattr(value, "__dataclass_fields__"):
        _add(digest, vars(value))
    else:
        raise _UnknownError


def _add_module(digest: Any, module: nn.Module) -> None:
    for path, part in module.named_modules():
        _add(digest, (path, type(part).__module__, type(part).__qualname__, id(type(part))))
        _add(digest, {name: value for name, value in vars(part).items() if name not in _REGISTRIES})
        _add(digest, dict(part.named_parameters(recurse=False)))
        _add(digest, dict(part.named_buffers(recurse=False)))
