"""What a network needs after its weights were averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_lcnn.layers.batch_norm import _LipschitzBatchNorm
from lightning_lcnn.layers.spectral_updates import reset_spectral_norm, spectral_layers


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: int | torch.device | None = None) -> None:
    """Make a network of averaged weights valid: its spectral norms, then the running statistics of its batch norms.

    Does what ``torch.optim.swa_utils.update_bn`` does, which looks for torch's own batch norms and passes over ours
    without a word, and calls :func:`reset_spectral_norm` first, because the statistics depend on the norms. The running
    statistics become the averages over one pass through the data.

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
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm | _LipschitzBatchNorm) and m.track_running_stats]
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
