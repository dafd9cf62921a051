"""Replacing modules in a tree of modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_stock(module: nn.Module) -> bool:
    """Whether the class of the module is torch's or ours."""
    return type(module).__module__.partition(".")[0] in ("torch", "lightning_lcnn")


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules wherever they occur, so that shared ones stay shared.

    Args:
        model: Changed in place, unless it is to be replaced itself.
        replacements: New modules by the ``id`` of the old ones.

    Returns:
        The model, or what replaces it.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)


def take_over(old: nn.Module, new: ModuleT, attributes: bool = True) -> ModuleT:
    """Give a new module the training flag, the hooks and the user's attributes of the one it replaces."""
    new.training = old.training
    for key, value in vars(old).items():
        is_hook = key.endswith(("_hooks", "_hook", "_with_kwargs", "_always_called"))
        if (is_hook and value) or (attributes and key not in vars(new)):
            vars(new)[key] = value
    return new


def is_ours(module: nn.Module) -> bool:
    """Whether the class of the module belongs to this package."""
    return type(module).__module__.partition(".")[0] == "lightning_lcnn"
