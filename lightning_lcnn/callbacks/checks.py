"""Refuse strategies that cannot train low-curvature layers, warn of optimizers that mistreat β and γ."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lcnn.layers.parameter_groups import low_curvature_parameters


def check_strategy(strategy: Any) -> None:
    """Raise for FSDP1 and DeepSpeed ZeRO-3, which leave a rank without the weights that σ and G are made of."""
    names = {base.__name__ for base in type(strategy).__mro__}
    sharding = "FSDP1" if "FSDPStrategy" in names else None
    if "DeepSpeedStrategy" in names and strategy.zero_stage_3:
        sharding = "DeepSpeed ZeRO stage 3"
    if sharding is not None:
        raise ValueError(
            f"`strategy` {type(strategy).__name__} ({sharding}) splits and flattens the weights, of which spectral "
            "norms, slopes and penalties need the whole. Use strategy='ddp', FSDP2 (ModelParallelStrategy), or "
            "DeepSpeed stage 1 or 2."
        )


def check_optimizers(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Warn where an optimizer decays β or γ, and where none has them."""
    names = {id(parameter): name for name, parameter in low_curvature_parameters(module)}
    decayed, present = [], set()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        ours = [id(parameter) for parameter in group["params"] if id(parameter) in names]
        present.update(ours)
        if group.get("weight_decay", 0):
            decayed += [names[key] for key in ours]
    if decayed:
        warnings.warn(
            f"The optimizer decays {_list(decayed)}, which pulls β and γ to 1. Build it with "
            "`lcnn_parameter_groups(self, weight_decay=...)`.",
            UserWarning,
        )
    absent = [name for key, name in names.items() if key not in present]
    if absent:
        warnings.warn(
            f"No optimizer has {_list(absent)}, so they keep their start values. Pass "
            "`lcnn_parameter_groups(self, weight_decay=...)` to it, or freeze them with `requires_grad_(False)`.",
            UserWarning,
        )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
