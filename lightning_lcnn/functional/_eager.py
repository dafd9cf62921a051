"""Where the custom autograd functions, which are faster and keep less, can stand in for composed operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def needs_composite() -> bool:
    """True where a custom autograd function would break the graph or is not supported."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def is_compiling_for_training() -> bool:
    """True under ``torch.compile``, which has no second derivatives; not under ``torch.export``."""
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)
    return torch.compiler.is_dynamo_compiling() and not exporting()


def on_plain_cpu(*tensors: Tensor) -> bool:
    """True for ordinary float32 or float64 tensors of one type on the CPU, where reading a number waits for nothing."""
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == dtype for t in tensors
    )


def stored(values: Tensor) -> Tensor:
    """The same few values: has the compiler write them down, not compute them in each turn of a long loop."""
    return torch.as_strided(values, values.shape, values.stride())


def wanted_gradients(ctx: Any) -> tuple[bool, ...]:
    """For each argument of a custom function whether the backward that is running wants its gradient.

    ``ctx.needs_input_grad`` tells what was differentiable in forward. ``torch.autograd.grad`` by the network's input
    alone wants no gradient of a parameter, and torch says so to its own functions, but not to those in Python: a
    penalty on the input gradient would compute, and keep the graph of, gradients that nobody reads.
    """
    nodes = iter(node for node, _ in ctx.next_functions if node is not None)  # one for each argument that needs it
    return tuple(needed and _is_executed(next(nodes)) for needed in ctx.needs_input_grad)


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf by which autograd.grad differentiates, about which torch does not answer
        return True
