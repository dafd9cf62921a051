"""Compiled kernels for the centered softplus of eager networks on the CPU, made on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.functional import _softplus_kernels as formulas

_kernels: dict[str, Callable[..., Any]] = {}  # empty: switched off


@torch.no_grad()  # as in a custom autograd function: kernels belong to a state of autograd
def use_compiled_softplus(enabled: bool = True) -> None:
    """Compile the in-place centered softplus once, for every eager network in this process.

    ``torch.compile`` makes one pass over memory of its forward and of its backward: about a third of the time of
    torch's own operations. It takes some seconds at the first call on a machine, which keeps
    the result, and needs a C++ compiler. Serves float32 on the CPU wherever ``inplace`` is permitted, with one β;
    everything else runs as before. A network that is compiled as a whole does not need it. Processes that are
    spawned start without it.

    Args:
        enabled: False returns to torch's own operations.

    Raises:
        RuntimeError: If the kernels cannot be compiled here.

    Source:
        Ours.

    Example:
        >>> use_compiled_softplus(False)
        >>> compiled_softplus_in_use()
        False
    """
    _kernels.clear()
    if not enabled:
        return
    try:
        _kernels.update({f.__name__: _compile(f) for f in (write_value, formulas.gradients, formulas.input_gradient)})
        for size in (64, 96):
            x, beta = torch.zeros(size), torch.ones(1)
            value(x, beta)
            gradients(x, x, beta, of_beta=True)
            gradients(x, x, beta, of_beta=False)
    except Exception as error:
        _kernels.clear()
        raise RuntimeError(
            "`use_compiled_softplus` found no way to compile for the CPU here; torch.compile needs a C++ compiler "
            f"such as g++. Leave the call out to run torch's own operations. The compiler said: {error}"
        ) from error


def compiled_softplus_in_use() -> bool:
    """Whether :func:`use_compiled_softplus` is in effect in this process.

    Example:
        >>> compiled_softplus_in_use()
        False
    """
    return bool(_kernels)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels are there and take these tensors: float32, of one dense layout, more than one value."""
    first = tensors[0]
    if not _kernels or first.dtype != torch.float32 or first.numel() < 2 or not is_dense(first):
        return False
    return all(t.dtype == first.dtype and t.shape == first.shape and t.stride() == first.stride() for t in tensors)


def value(x: Tensor, beta: Tensor) -> None:
    """Overwrite x with s(x; β)."""
    _kernels["write_value"](_line(x), beta.detach().view(1))


def gradients(grad: Tensor, output: Tensor, beta: Tensor, of_beta: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and, if asked for, of β."""
    lines = _line(grad), _line(output), beta.detach().view(1)
    if not of_beta:
        return _kernels["input_gradient"](*lines).as_strided(grad.shape, grad.stride()), None
    grad_x, grad_beta = _kernels["gradients"](*lines)
    return grad_x.as_strided(grad.shape, grad.stride()), grad_beta.view(beta.shape)


def write_value(x: Tensor, beta: Tensor) -> None:
    """Compiled as a whole, so that nothing but x is written."""
    x.copy_(formulas.value(x, beta))


def is_dense(a: Tensor) -> bool:
    """Whether the values lie in memory without gaps, in one of the two layouts of images."""
    return a.is_contiguous() or (a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor import config  # takes seconds to import

    options: dict[str, Any] = {}
    if hasattr(config.cpp, "enable_floating_point_contract_flag"):  # a·b + c in one instruction
        options["cpp.enable_floating_point_contract_flag"] = "fast"
    return torch.compile(function, options=options, fullgraph=True)


def _line(a: Tensor) -> Tensor:
    line = a.detach().as_strided((a.numel(),), (1,))
    torch._dynamo.maybe_mark_dynamic(line, 0)  # one kernel for all sizes
    return line
