"""How the code runs: eagerly or under the compiler, on plain CPU tensors, in shards, over several processes.

The custom autograd functions of this folder are faster and keep less than composed operations; this module tells where
they can stand in for them.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from lightning_lcnn._compat import hook_tables, in_function_transform, is_executed, is_of_fully_shard

# ``known``: what can be computed again, set within ``recompute_activations``. Local to the thread, as torch's hooks on
# saved tensors are: with a global one a forward in another thread, of nn.DataParallel or a server, would write down
# recipes that no hook of its own reads, and keep their inputs alive. Backward reads none of it, whatever its thread.
recomputation = threading.local()


def needs_composite() -> bool:
    """True where a custom autograd function would break the graph or is not supported."""
    return torch.compiler.is_compiling() or in_function_transform()


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


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """No autocast on the device; nothing to do on one that has none, as the meta device."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def is_dense(a: Tensor) -> bool:
    """Whether the values lie in memory without gaps, in one of the two layouts of images."""
    return a.is_contiguous() or (a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last))


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
        return is_executed(node)
    except RuntimeError:  # a leaf by which autograd.grad differentiates, about which torch does not answer
        return True


def is_recomputing() -> bool:
    """Whether this thread is within ``recompute_activations``, so that layers tell how their outputs are computed."""
    return getattr(recomputation, "known", None) is not None


def whole(tensor: Any) -> Tensor:
    """The whole of a sharded tensor, differentiable: a collective, so every rank must call it; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def scalar(tensor: Tensor) -> Tensor:
    """A parameter of shape (1,) as a 0-d tensor, differentiable; FSDP2 cannot shard 0-d parameters.

    Example:
        >>> import torch
        >>> scalar(torch.ones(1))
        tensor(1.)
    """
    return whole(tensor).reshape(())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages a part of the model, so that reading its parameters may be a collective."""
    return any(_plain_class(module) is not type(module) for module in model.modules())


def unsharded(model: nn.Module, gather: bool) -> nn.Module:
    """The model itself, or in place of one that FSDP2 manages a stand-in of its plain classes, without FSDP2's hooks.

    Rules that go by exact class know the stand-in, torch.fx can trace it, and running it communicates nothing.

    Args:
        model: Any module.
        gather: Give the stand-in whole weights, detached; a collective, so every rank must call it. Otherwise it shares
            the parameters as they are registered at any time, sharded or whole.
    """
    if not is_sharded(model):
        return model
    gathered: dict[int, nn.Parameter] = {}
    twins = {id(module): _twin(module) for module in model.modules()}
    for module in model.modules():
        twin = twins[id(module)]
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[id(child)]
        if gather:
            twin._parameters = {name: _gathered(value, gathered) for name, value in module._parameters.items()}
    return twins[id(model)]


def _twin(module: nn.Module) -> nn.Module:
    """A module of the plain class that shares parameters and buffers, still without children."""
    twin: Any = object.__new__(_plain_class(module))
    state = {name: value for name, value in module.__dict__.items() if not is_of_fully_shard(name)}
    twin.__dict__.update(state, _modules={})
    for kind, hooks in hook_tables(module, forward_only=True).items():
        kept = {key: hook for key, hook in hooks.items() if not str(hook.__module__).startswith("torch.distributed.")}
        twin.__dict__[kind] = type(hooks)(kept)
    return twin


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before ``fully_shard`` put its own in front."""
    mro = type(module).__mro__
    return next((mro[i + 1] for i, base in enumerate(mro) if base.__name__ == "FSDPModule"), mro[0])


def _gathered(parameter: Tensor | None, known: dict[int, nn.Parameter]) -> nn.Parameter | None:
    if parameter is None:
        return None
    if id(parameter) not in known:
        known[id(parameter)] = nn.Parameter(whole(parameter).detach(), requires_grad=parameter.requires_grad)
    return known[id(parameter)]


def synchronized_moments(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count per channel over the batches of all processes of ``group``, differentiable.

    One all-reduce of 2C + 1 float64 numbers forward and one backward; batches may differ in size.

    Args:
        x: This process's batch (N, C, ...).
        group: The processes to synchronise, None for all.

    Returns:
        mean (C,), variance (C,), both in at least float32, and the count of values per channel, 0-d float64.

    Source:
        Ours.
    """
    dims = [d for d in range(x.ndim) if d != 1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    variance, mean = torch.var_mean(x.to(dtype), dim=dims, correction=0)
    count = torch.full((1,), x.numel() / x.shape[1], dtype=torch.float64, device=x.device)
    mean, variance = mean.double(), variance.double()
    moments = torch.cat([mean * count, (variance + mean.square()) * count, count])
    moments = all_reduce(moments, group=dist.group.WORLD if group is None else group)
    total = moments[-1].detach()
    mean, square = (moments[:-1] / total).chunk(2)
    return mean.to(dtype), (square - mean.square()).clamp(min=0.0).to(dtype), total
