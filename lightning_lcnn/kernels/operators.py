"""Our own operators: one name in ``torch.ops.lightning_lcnn`` for what runs as Triton kernels on a GPU.

An operator has a reference in torch's own operations, which runs on the CPU, and a form for tensors without data, with
which fake tensors, counters and the meta device see one operation of known outputs. What calls an operator is an
autograd function, so derivatives are not the operator's business; compilers get the composed form instead, which they
fuse themselves.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

LARGEST_WHOLE = 2**15  # values of a weight up to which every program computes its inner product for itself
_LIBRARY = torch.library.Library("lightning_lcnn", "DEF")


def operator(schema: str, reference: Callable[..., Any], meta: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Define an operator and return what calls it.

    Args:
        schema: Name, arguments and results, as torch writes them.
        reference: Computes it with torch's operations.
        meta: Makes the outputs without their values.
        cuda: Launches it on a GPU.
    """
    name = _LIBRARY.define(schema)
    for key, function in (("CPU", reference), ("Meta", meta), ("CUDA", _on_its_device(cuda))):
        _LIBRARY.impl(name, function, key)
    return getattr(torch.ops.lightning_lcnn, name).default


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    def launch(*arguments: Any) -> Any:
        first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
        with torch.cuda.device(first.device):
            return function(*arguments)

    return launch


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton can be imported, which torch's own packages for CUDA bring along."""
    return importlib.util.find_spec("triton") is not None


def runs_operators(device: torch.device) -> bool:
    """Whether operators have kernels there: a GPU with Triton, or the meta device, which stands for one."""
    return device.type == "meta" or (device.type == "cuda" and has_triton())
