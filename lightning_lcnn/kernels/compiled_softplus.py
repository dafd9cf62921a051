"""Compiled kernels for the centered softplus of eager networks on the CPU, made on request."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._compat import has_inductor_option, is_dispatch_recorded, prefer_dynamic_size
from lightning_lcnn.kernels import softplus_formulas as formulas
from lightning_lcnn.kernels.modes import is_dense

_kernels: dict[str, Callable[..., Any]] = {}  # compiled at the first request and kept
in_use = False
_RECOMPILE_LIMIT = 64  # torch compiles anew for another number of threads or another mode, and raises after 8 times


def use_compiled_softplus(enabled: bool = True) -> None:
    """Compile the centered softplus once, for every eager network in this process, or switch that off.

    ``torch.compile`` makes one pass over memory of its forward and of its backward: about a third of the time of
    torch's own operations. It takes some seconds at the first call on a machine, which keeps the result, and needs a
    C++ compiler; to switch off and on again takes no time. Serves float32 on the CPU with one β: forward and backward
    wherever ``inplace`` is permitted, elsewhere forward alone. Everything else runs as before. A network that is
    compiled as a whole does not need it. Processes that are spawned start without it.

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
    global in_use
    in_use = False
    if enabled and not _kernels:
        _compile_kernels()
    in_use = enabled


def compiled_softplus_in_use() -> bool:
    """Whether :func:`use_compiled_softplus` is in effect in this process.

    Example:
        >>> compiled_softplus_in_use()
        False
    """
    return in_use


def fits(*tensors: Tensor) -> bool:
    """Whether kernels that are in use take these CPU tensors: float32, of one dense layout, more than one value."""
    # whoever records operations (a FLOP counter, conversion, torch.jit.trace) can see into torch's own alone
    if is_dispatch_recorded() or torch.jit.is_tracing():
        return False
    first = tensors[0]
    if first.dtype != torch.float32 or first.numel() < 2 or not is_dense(first):
        return False
    return all(t.dtype == first.dtype and t.shape == first.shape and t.stride() == first.stride() for t in tensors)


def overwrite(x: Tensor, beta: Tensor) -> None:
    """Overwrite x with s(x; β)."""
    _kernels["write_over"](_line(x), beta.detach().view(1))


def value(x: Tensor, beta: Tensor) -> Tensor:
    """s(x; β) in the layout of x."""
    result = torch.empty_like(x)
    _kernels["write_to"](_line(result), _line(x), beta.detach().view(1))
    return result


def gradients(grad: Tensor, output: Tensor, beta: Tensor, of_beta: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and, if asked for, of β."""
    lines = _line(grad), _line(output), beta.detach().view(1)
    if not of_beta:
        return _kernels["input_gradient"](*lines).as_strided(grad.shape, grad.stride()), None
    grad_x, grad_beta = _kernels["gradients"](*lines)
    return grad_x.as_strided(grad.shape, grad.stride()), grad_beta.view(beta.shape)


def write_over(x: Tensor, beta: Tensor) -> None:
    """Compiled as a whole, so that nothing but x is written."""
    x.copy_(formulas.value(x, beta))


def write_to(result: Tensor, x: Tensor, beta: Tensor) -> None:
    """Compiled as a whole, so that nothing but the result is written."""
    result.copy_(formulas.value(x, beta))


@torch.no_grad()  # as in a custom autograd function: kernels belong to a state of autograd
def _compile_kernels() -> None:
    functions = write_over, write_to, formulas.gradients, formulas.input_gradient
    try:
        _kernels.update({f.__name__: _compile(f) for f in functions})
        for size in (64, 96):
            x, beta = torch.zeros(size), torch.ones(1)
            overwrite(x, beta)
            value(x, beta)
            gradients(x, x, beta, of_beta=True)
            gradients(x, x, beta, of_beta=False)
    except Exception as error:
        _kernels.clear()
        raise RuntimeError(
            "`use_compiled_softplus` found no way to compile for the CPU here; torch.compile needs a C++ compiler "
            f"such as g++. Leave the call out to run torch's own operations. The compiler said: {error}"
        ) from error


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {}
    if has_inductor_option("cpp", "enable_floating_point_contract_flag"):  # a·b + c in one instruction
        options["cpp.enable_floating_point_contract_flag"] = "fast"
    arguments: dict[str, Any] = {"options": options, "fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        arguments["recompile_limit"] = _RECOMPILE_LIMIT
    return torch.compile(function, **arguments)


def _line(a: Tensor) -> Tensor:
    line = a.detach().as_strided((a.numel(),), (1,))
    prefer_dynamic_size(line, 0)
    return line
