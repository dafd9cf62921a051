"""Modules of timm in terms of torch's own; known by name, for timm is no dependency."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lcnn.conversion.tree import take_over


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
