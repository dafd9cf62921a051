"""Which part of a module computes the outputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lcnn.layers.parameter_groups import log_betas


def network_of(module: Any, compiled: bool = False) -> Any:
    """Part of a module that computes the outputs: itself, or its only child to be trained if it has no ``forward``.

    Many Lightning modules define no ``forward`` and call ``self.net(x)`` in their steps. DistributedDataParallel is
    taken off.

    Args:
        module: Network or Lightning module; another callable is returned as it is.
        compiled: Whether the wrapper of ``torch.compile`` stays on, for a network that is to be run and not read.

    Returns:
        The module itself if it defines ``forward``. Otherwise its only child with a β; if there is none, its only
        child with parameters; and itself where that does not tell.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import CenteredSoftplus
        >>> holder = nn.ModuleDict({"net": nn.Sequential(CenteredSoftplus()), "criterion": nn.CrossEntropyLoss()})
        >>> network_of(holder) is holder["net"]
        True
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return network_of(module.module, compiled)
    if not isinstance(module, nn.Module) or defines_forward(module) or (compiled and "_orig_mod" in module._modules):
        return module
    trained = trained_children(module)
    candidates = [child for child in trained if log_betas(child)] or trained
    return network_of(candidates[0], compiled) if len(candidates) == 1 else module


def defines_forward(module: nn.Module) -> bool:
    """Whether the class says how outputs follow from an input.

    Example:
        >>> defines_forward(nn.Linear(1, 1)), defines_forward(nn.ModuleDict())
        (True, False)
    """
    forward = type(module).forward
    return forward is not nn.Module.forward and forward.__qualname__ != "LightningModule.forward"


def trained_children(module: nn.Module) -> list[nn.Module]:
    """Children with parameters.

    Example:
        >>> trained_children(nn.Sequential(nn.Linear(1, 1), nn.Tanh()))
        [Linear(in_features=1, out_features=1, bias=True)]
    """
    return [child for child in module.children() if any(True for _ in child.parameters())]
