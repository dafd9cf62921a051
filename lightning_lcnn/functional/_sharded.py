"""Networks as FSDP2 (``torch.distributed.fsdp.fully_shard``) leaves them outside forward: with weights in shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


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
    state = {name: value for name, value in module.__dict__.items() if not name.startswith("__composable_api")}
    twin.__dict__.update(state, _modules={})
    for kind in _HOOKS:
        hooks = state[kind]
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
