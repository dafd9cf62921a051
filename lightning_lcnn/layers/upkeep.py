"""What is done to whole networks: parameters in groups, spectral norms refreshed, averages made valid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int, check_non_negative
from lightning_lcnn._compat import BatchNorm
from lightning_lcnn.layers.activation import LearnableBeta
from lightning_lcnn.layers.batch_norm import LipschitzBatchNorm
from lightning_lcnn.layers.refresh import divided, update_together
from lightning_lcnn.layers.spectral import SpectralLayer


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
    return _collect(module, (LipschitzBatchNorm, SpectralLayer), "log_gamma")


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


def spectral_layers(module: nn.Module) -> Iterator[SpectralLayer]:
    """Iterate over the layers of a network that divide their weight by its spectral norm, shared ones once.

    Args:
        module: Any network.

    Returns:
        Iterator over ``SpectralLinear`` and ``SpectralConv`` layers, in module order.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> len(list(spectral_layers(nn.Sequential(SpectralLinear(2, 2), nn.ReLU(), nn.Linear(2, 2)))))
        1
    """
    return (layer for layer in module.modules() if isinstance(layer, SpectralLayer))


def update_spectral_norm(module: nn.Module, num_iterations: int = 5) -> Tensor:
    """Warm-started power iterations in every spectral layer; call it every few optimizer steps.

    Args:
        module: Network with at least one spectral layer.
        num_iterations: Products with each layer and with its adjoint, >= 1; see
            :func:`~lightning_lcnn.functional.filtered_power_iteration`.

    Returns:
        Largest relative residual of the singular pairs, 0-d, without host synchronisation.

    Raises:
        TypeError: If ``num_iterations`` is not an integer.
        ValueError: If ``num_iterations`` is below 1 or ``module`` has no spectral layer.

    Source:
        LCNN (Srinivas et al., 2022); the interval and the residual are ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> float(update_spectral_norm(SpectralLinear(3, 3))) < 0.01
        True
    """
    check_int("num_iterations", num_iterations)
    together: list[list[SpectralLayer]] = []
    alone = list(spectral_layers(module))
    if any(layer.weight.device.type != "cpu" for layer in alone):
        together, alone = divided(alone)
    residuals = [layer.update_spectral_norm(num_iterations) for layer in alone]
    residuals += [update_together(layers, num_iterations) for layers in together]
    return residuals[0] if len(residuals) == 1 else _stacked(residuals, module).amax()


@torch.no_grad()
def spectral_norms(module: nn.Module) -> Tensor:
    """Present estimates ⟨W, G⟩ of the norms of all spectral layers, on the device of the first.

    Args:
        module: Network with at least one spectral layer.

    Returns:
        (layers,), without host synchronisation.

    Raises:
        ValueError: If ``module`` has no spectral layer.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> spectral_norms(nn.Sequential(SpectralLinear(3, 3), SpectralLinear(3, 2))).shape
        torch.Size([2])
    """
    return _stacked([layer.sigma() for layer in spectral_layers(module)], module)


def reset_spectral_norm(module: nn.Module, tolerance: float = 1e-3, max_iterations: int = 240) -> Tensor:
    """Iterate every spectral layer to convergence from a fixed start; the result depends on the weights alone.

    Args:
        module: Network with at least one spectral layer.
        tolerance: Relative residual at which a layer stops.
        max_iterations: Products with the layer and with its adjoint after which it stops in any case.

    Returns:
        Largest relative residual, 0-d.

    Raises:
        ValueError: If ``module`` has no spectral layer.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import SpectralLinear
        >>> float(reset_spectral_norm(SpectralLinear(3, 3))) <= 1e-3
        True
    """
    residuals = [layer.reset_spectral_norm(tolerance, max_iterations) for layer in spectral_layers(module)]
    return _stacked(residuals, module).amax()


def _stacked(values: list[Tensor], module: nn.Module) -> Tensor:
    if not values:
        raise ValueError(
            f"`module` has no spectral layer, got {type(module).__name__}; convert it with `to_low_curvature` or use "
            "SpectralLinear and SpectralConv layers."
        )
    return torch.stack([value.to(values[0]) for value in values])


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None) -> None:
    """Make a network of averaged weights valid: its spectral norms, then the running statistics of its batch norms.

    Does what ``torch.optim.swa_utils.update_bn`` does, and calls :func:`reset_spectral_norm` first, because the
    statistics depend on the norms. The running statistics become the averages over one pass through the data.

    Args:
        loader: Batches for one pass in training mode: tensors, or tuples and lists that begin with the input tensor.
        model: Network, called with the input. Its mode and the momentum of its batch norms are restored.
        device: Where to move the inputs; None leaves them where they are.

    Source:
        Ours; the loop is that of torch.

    Example:
        >>> from lightning_lcnn.layers import LipschitzBatchNorm1d
        >>> layer = LipschitzBatchNorm1d(1)
        >>> update_bn([torch.tensor([[1.0], [3.0]]), torch.tensor([[7.0], [9.0]])], layer)
        >>> layer.running_mean
        tensor([5.])
    """
    if any(True for _ in spectral_layers(model)):
        reset_spectral_norm(model)
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta, modes = [norm.momentum for norm in norms], [(module, module.training) for module in model.modules()]
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average over all batches
        for batch in loader:
            x = batch[0] if isinstance(batch, list | tuple) else batch
            model(x if device is None else x.to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
