"""Find β and γ in a network, and sort its parameters for the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_lcnn._checks import check_non_negative
from lightning_lcnn.layers.activation import LearnableBeta
from lightning_lcnn.layers.batch_norm import _LipschitzBatchNorm
from lightning_lcnn.layers.spectral_base import SpectralLayer


def log_betas(module: nn.Module) -> dict[str, Tensor]:
    """Name and tensor of every log β, parameter or buffer, shared ones once.

    Args:
        module: Network that may hold activations with a β.

    Returns:
        Mapping from the name in the ``state_dict`` to the tensor, in module order.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import CenteredSoftplus
        >>> log_betas(nn.Sequential(nn.Linear(2, 2), CenteredSoftplus(beta=1.0)))["1.log_beta"].item()
        0.0
    """
    return _collect(module, LearnableBeta, "log_beta")


def log_gammas(module: nn.Module) -> dict[str, Tensor]:
    """Name and tensor of every log γ (batch-norm bounds and gains of spectral layers), shared ones once.

    Args:
        module: Network that may hold low-curvature layers.

    Returns:
        Mapping from the name in the ``state_dict`` to the tensor, in module order.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> list(log_gammas(nn.Sequential(SpectralLinear(2, 2, gamma=3.0), SpectralLinear(2, 2))))
        ['0.log_gamma']
    """
    return _collect(module, (_LipschitzBatchNorm, SpectralLayer), "log_gamma")


def low_curvature_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate over the trainable β and γ of a network: (name, parameter), shared ones once.

    Args:
        module: Network that may hold low-curvature layers.

    Returns:
        Iterator over names and parameters; fixed and frozen ones are left out.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import CenteredSoftplus
        >>> [name for name, _ in low_curvature_parameters(nn.Sequential(nn.Linear(2, 2), CenteredSoftplus()))]
        ['1.log_beta']
    """
    for name, tensor in (log_betas(module) | log_gammas(module)).items():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            yield name, tensor


def lcnn_parameter_groups(
    module: nn.Module, weight_decay: float = 0.0, decay_bias_and_norm: bool = True
) -> list[dict[str, Any]]:
    r"""Parameter groups in which weight decay does not reach β and γ.

    Decay pulls :math:`\log β` and :math:`\log γ` to 0, that is β and γ to 1, whatever the data say.

    Args:
        module: Network whose trainable parameters are grouped; frozen ones are left out, shared ones come once.
        weight_decay: Decay of all parameters but β and γ, >= 0.
        decay_bias_and_norm: Whether biases and the weights of normalisation layers (everything with at most one
            dimension) are decayed too. True is what ``optimizer(module.parameters(), weight_decay=…)`` does.

    Returns:
        One or two groups, ``{"params": [...], "weight_decay": ...}``, for any torch optimizer: what is decayed, then
        what is not. A group without parameters is left out.

    Raises:
        TypeError: If ``weight_decay`` is not a number.
        ValueError: If ``weight_decay`` is negative or nothing in ``module`` is trainable.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> from lightning_lcnn.layers import CenteredSoftplus
        >>> net = nn.Sequential(nn.Linear(2, 2), CenteredSoftplus(), nn.Linear(2, 1))
        >>> optimizer = torch.optim.AdamW(lcnn_parameter_groups(net, weight_decay=0.05), lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(4, 0.05), (1, 0.0)]
    """
    check_non_negative("weight_decay", weight_decay)
    exempt = {id(parameter) for _, parameter in low_curvature_parameters(module)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        is_kept = id(parameter) in exempt or (parameter.ndim <= 1 and not decay_bias_and_norm)
        (kept if is_kept else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"`module` has no trainable parameter, got {type(module).__name__}; unfreeze some.")
    return groups


def _collect(module: nn.Module, kinds: type | tuple[type, ...], attribute: str) -> dict[str, Tensor]:
    """Tensors of one attribute by their names, a tensor that layers share under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, layer in module.named_modules():
        tensor = getattr(layer, attribute) if isinstance(layer, kinds) else None
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            found[f"{prefix}.{attribute}" if prefix else attribute] = tensor
    return found
