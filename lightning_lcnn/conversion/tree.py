"""Replacing modules in a tree of modules, and modules of timm in terms of torch's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from lightning_lcnn._compat import is_hook_attribute

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
        if (is_hook_attribute(key) and value) or (attributes and key not in vars(new)):
            vars(new)[key] = value
    return new


def is_ours(module: nn.Module) -> bool:
    """Whether the class of the module belongs to this package."""
    return type(module).__module__.partition(".")[0] == "lightning_lcnn"


def stock_form(module: nn.Module) -> nn.Module | None:
    """Return torch's form of a module of timm, with the same parameters; None for any other module.

    Args:
        module: Left as it is.

    Example:
        >>> stock_form(nn.ReLU()) is None
        True
    """
    cls = type(module)
    make = _FORMS.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if make is None else take_over(module, make(module), attributes=False)


def _norm_and_activation(module: Any) -> nn.Module:
    """Batch norm, dropout and activation one after the other."""
    norm: Any = nn.BatchNorm2d(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
    )
    _share(module, norm)
    parts = {"norm": norm.train(module.training)}
    parts |= {name: stock_form(child) or child for name, child in module.named_children()}
    return nn.Sequential(OrderedDict((name, part) for name, part in parts.items() if type(part) is not nn.Identity))


def _linear(module: Any) -> nn.Module:
    new = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    return _share(module, new)


def _prelu(module: Any) -> nn.Module:
    return _share(module, nn.PReLU(module.num_parameters))


def _share(module: nn.Module, new: nn.Module) -> nn.Module:
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        setattr(new, name, value)
    return new


_FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "timm.layers.norm_act.BatchNormAct2d": _norm_and_activation,
    "timm.layers.linear.Linear": _linear,
    "timm.layers.activations.PReLU": _prelu,
    "timm.layers.activations.Swish": lambda old: nn.SiLU(inplace=old.inplace),
    "timm.layers.activations.Mish": lambda old: nn.Mish(),
    "timm.layers.activations.GELU": lambda old: nn.GELU(),
    "timm.layers.activations.GELUTanh": lambda old: nn.GELU("tanh"),
    "timm.layers.activations.Sigmoid": lambda old: nn.Sigmoid(),
    "timm.layers.activations.Tanh": lambda old: nn.Tanh(),
    "timm.layers.activations.HardSwish": lambda old: nn.Hardswish(inplace=old.inplace),
    "timm.layers.activations.HardSigmoid": lambda old: nn.Hardsigmoid(inplace=old.inplace),
}
