"""What the caller of a conversion asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice, check_positive
from lightning_lcnn._compat import is_compiled
from lightning_lcnn.kernels.modes import is_sharded

POOLINGS = ("keep", "smooth", "average")
# reasons that the caller knows of
SKIPPED = "in `skip`"
OUTPUT_LAYER = "gives the output, so no activation follows; output_layer=True converts it"
POOLING_KEPT = "max_pool='keep'"


@dataclass(frozen=True)
class Options:
    """Checked arguments of ``to_low_curvature``."""

    beta: float
    gamma: float | None
    max_pool: str
    skip: tuple[str | type[nn.Module], ...]
    spectral: bool
    output_layer: bool
    activations: tuple[type[nn.Module], ...]
    separate_activations: bool

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        if self.gamma is not None:
            check_positive("gamma", self.gamma)
        check_choice("max_pool", self.max_pool, POOLINGS)
        for item in self.activations:
            if not (isinstance(item, type) and issubclass(item, nn.Module)):
                raise TypeError(f"`activations` must hold classes of modules, such as nn.SiLU, got {item!r}.")

    def skips(self, name: str, module: nn.Module) -> bool:
        """Whether the module, or one that contains it, was excluded."""
        return any(
            name == item or name.startswith(f"{item}.") if isinstance(item, str) else isinstance(module, item)
            for item in self.skip
        )


def checked_skip(skip: Iterable[str | type[nn.Module]], model: nn.Module) -> tuple[str | type[nn.Module], ...]:
    """Return ``skip`` as a tuple, all of whose paths exist in the model."""
    items = (skip,) if isinstance(skip, str | type) else tuple(skip)
    paths = {name for name, _ in model.named_modules(remove_duplicate=False)} - {""}
    for item in items:
        if isinstance(item, str) and item not in paths:
            raise ValueError(
                f"`skip` names {item!r}, which is no module of the model; `dict(model.named_modules())` has the paths."
            )
        if not isinstance(item, str) and not (isinstance(item, type) and issubclass(item, nn.Module)):
            raise TypeError(f"`skip` must hold module paths or classes of modules, got {item!r}.")
    return items


def check_model(model: nn.Module) -> None:
    """Raise unless it is a module that can be copied and edited."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}.")
    if is_sharded(model):
        raise ValueError(
            f"`model` ({type(model).__name__}) is sharded by FSDP2 and cannot be copied; convert before "
            "`fully_shard`, or load its full state dict into an ordinary network."
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or is_compiled(module):
            raise ValueError(f"`model` is compiled or scripted at {name!r}; convert it first and compile the result.")
        if type(module).__module__.startswith("torch.nn.parallel"):
            raise ValueError(
                f"`model` is wrapped in {type(module).__name__}; convert `model.module` and wrap the result."
            )


def check_input(example_input: Tensor, model: nn.Module) -> None:
    """Raise unless it is a tensor on a device of the model."""
    if not isinstance(example_input, Tensor):
        raise TypeError(
            f"`example_input` must be a tensor, one batch of inputs, got {type(example_input).__name__}; "
            "a model with other inputs needs a small module around it that takes one tensor."
        )
    devices = {parameter.device for parameter in model.parameters()}
    if devices and example_input.device not in devices:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"`example_input` is on {example_input.device} and the model on {where}; move one of them with `.to`."
        )
