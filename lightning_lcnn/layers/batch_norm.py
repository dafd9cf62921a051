"""Batch normalisation whose slope is limited by a learnable γ."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive
from lightning_lcnn._compat import BatchNorm
from lightning_lcnn.kernels.clipped_batch_norm import (
    batch_norm_slope,
    channel_variance,
    clip_factor,
    clipped_batch_norm,
    fits_one_pass,
    scaled_affine,
)
from lightning_lcnn.kernels.layer_operators import clipped_norm, takes_operators
from lightning_lcnn.kernels.modes import scalar, synchronized_moments, whole
from lightning_lcnn.kernels.recomputation import remember


class LipschitzBatchNorm(BatchNorm):
    """Base of the Lipschitz batch norms, which name the dimensions that they take."""

    # An instance of torch's own base, so that what looks batch norms up finds this layer too: torch's `update_bn`,
    # Lightning's BaseFinetuning, users who freeze statistics. So does torch's converter to SyncBatchNorm, which builds
    # its own layer in place of every instance and would drop γ without a word; that is why `named_children` stops it,
    # and why `convert_sync_batchnorm` below and PowerIteration, for Lightning's flag, take its place.
    _dimensions: tuple[int, ...]
    log_gamma: nn.Parameter | None
    synchronized: bool = False  # whether batches of all processes in `process_group` are normalised together
    process_group: dist.ProcessGroup | None = None  # None: all processes
    weight: Tensor | None  # type: ignore[assignment]
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float | None = 10.0,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if gamma is None:
            self.register_parameter("log_gamma", None)
        else:
            check_positive("gamma", gamma)
            self._start = math.log(gamma)
            self.log_gamma = nn.Parameter(torch.full((1,), self._start, device=device, dtype=dtype))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """None, as every layer; stops a converter to synchronised batch norm, which is about to drop γ.

        The converters of torch, timm and apex replace a batch norm by their own and then ask the old one, and only
        here, for its children. Nothing else that they do can be seen from a layer, so it is the caller's name that
        tells. What has replaced layers before stays replaced.

        Raises:
            TypeError: If a function whose name begins with ``convert_sync`` asks.
        """
        frame = inspect.currentframe()
        if frame is not None and frame.f_back is not None and frame.f_back.f_code.co_name.startswith("convert_sync"):
            raise TypeError(
                f"{type(self).__name__} would be replaced by a batch norm without γ. Use "
                "lightning_lcnn.layers.convert_sync_batchnorm(network), which keeps it; with Trainer(sync_batchnorm="
                "True) pass PowerIteration() to the trainer, which LCNNMixin does."
            )
        return super().named_children()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over how 0.1 kept in a pickle that the layer synchronises."""
        child = state.pop("_sync", None)
        super().__setstate__(state)
        if isinstance(child, nn.SyncBatchNorm):
            self.synchronized, self.process_group = True, child.process_group

    def reset_parameters(self) -> None:
        """Reset as torch does, and γ to its start value."""
        super().reset_parameters()
        if self._parameters.get("log_gamma") is not None:  # torch's constructor calls this before there is one
            nn.init.constant_(cast(Tensor, self.log_gamma), self._start)

    @property
    def gamma(self) -> Tensor | None:
        """γ as a differentiable 0-d tensor in at least float32, or None where nothing is clipped."""
        if self.log_gamma is None:
            return None
        log_gamma = scalar(self.log_gamma)
        return log_gamma.to(torch.promote_types(log_gamma.dtype, torch.float32)).exp()

    def slope(self) -> Tensor:
        r"""Exact slope in evaluation mode, :math:`\min(γ, \max_c |w_c| / \sqrt{v_c + ε})`, as a 0-d tensor."""
        slope = self._unclipped_slope(self._running_variance())
        return slope if self.gamma is None else torch.minimum(slope, self.gamma)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Per-channel a and b, each (C,), with which evaluation mode computes a·x + b."""
        variance = self._running_variance()
        factor = self._factor(variance)
        scale = torch.rsqrt(variance + self.eps) * factor
        if self.weight is not None:
            scale = scale * whole(self.weight)
        shift = -scale * cast(Tensor, self.running_mean)
        return scale, shift if self.bias is None else shift + whole(self.bias) * factor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, ...) and clip the slope to γ."""
        if x.ndim not in self._dimensions:
            expected = " or ".join(f"{d}-dimensional" for d in self._dimensions)
            raise ValueError(f"`x` must be {expected} for {type(self).__name__}, got shape {tuple(x.shape)}.")
        if x.device.type != "cpu" and self._takes_operators(x):
            return self._by_operators(x)
        momentum = self._count_batch()
        use_batch = self.training or self.running_mean is None
        if self.training and self.synchronized and dist.is_initialized():
            return self._synchronized(x, momentum)
        running = (
            (None, None) if self.training and not self.track_running_stats else (self.running_mean, self.running_var)
        )
        weight, bias, gamma = self.weight, self.bias, self.gamma
        if gamma is not None:
            if use_batch and fits_one_pass(x, weight):
                return clipped_batch_norm(x, weight, bias, *running, gamma, momentum, self.eps)
            factor = self._factor(channel_variance(x) if use_batch else self._running_variance())
            weight, bias = scaled_affine(weight, bias, factor, running[0], self.num_features)
        value = F.batch_norm(x, *running, weight, bias, use_batch, momentum, self.eps)
        scale, shift = [None if t is None else t.detach().clone() for t in (weight, bias)]
        statistics = (None, None) if use_batch else running
        remember(value, x, lambda x: F.batch_norm(x, *statistics, scale, shift, use_batch, 0.0, self.eps))
        return value

    def _takes_operators(self, x: Tensor) -> bool:
        """Whether the statistics are those of this batch, and a GPU's kernels take it."""
        if not (self.training or self.running_mean is None) or x.numel() <= x.shape[1]:
            return False
        if self.momentum is None or (self.synchronized and dist.is_initialized()):
            return False
        return takes_operators(x, self.weight, self.bias, self.log_gamma, self.running_mean)

    def _by_operators(self, x: Tensor) -> Tensor:
        statistics: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if self.training and self.track_running_stats:
            statistics = self.running_mean, self.running_var, self.num_batches_tracked
        return clipped_norm(x, self.weight, self.bias, self.log_gamma, statistics, cast(float, self.momentum), self.eps)

    def extra_repr(self) -> str:
        """Torch's arguments, γ now, and whether processes are synchronised."""
        gamma = None if self.gamma is None else f"{self.gamma.item():.4g}"
        return f"{super().extra_repr()}, gamma={gamma}{', synchronized=True' if self.synchronized else ''}"

    def _running_variance(self) -> Tensor:
        if self.running_var is None:
            raise ValueError(
                f"{type(self).__name__} keeps no running statistics, so its slope depends on the batch; "
                "use track_running_stats=True."
            )
        return self.running_var

    def _unclipped_slope(self, variance: Tensor) -> Tensor:
        dtype = torch.promote_types(variance.dtype, torch.float32)
        weight = None if self.weight is None else whole(self.weight).to(dtype)
        return batch_norm_slope(weight, variance.to(dtype), self.eps)

    def _factor(self, variance: Tensor) -> Tensor:
        """min(1, γ / slope) for these variances, 0-d."""
        if self.gamma is None:
            return torch.ones((), device=variance.device)
        return clip_factor(self._unclipped_slope(variance), self.gamma)

    def _count_batch(self) -> float:
        """Advance the batch counter in training; return the weight of this batch in the running statistics."""
        if not (self.training and self.track_running_stats) or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _synchronized(self, x: Tensor, momentum: float) -> Tensor:
        """Training step of synchronised batch norm: one all-reduce, the clip from the global variance."""
        mean, variance, count = synchronized_moments(x, self.process_group)
        if self.running_mean is not None and self.running_var is not None:
            unbiased = variance.detach() * (count / (count - 1).clamp(min=1.0)).to(variance.dtype)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        factor = self._factor(variance.detach())
        weight, bias = scaled_affine(self.weight, self.bias, factor, None, self.num_features)
        scale = torch.rsqrt(variance + self.eps) * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        shift, scale = [t.view(1, -1, *[1] * (x.ndim - 2)) for t in (shift, scale)]
        value = torch.addcmul(shift, x, scale).to(x.dtype)
        shift, scale = shift.detach(), scale.detach()
        remember(value, x, lambda x: torch.addcmul(shift, x, scale).to(x.dtype))
        return value


_DOC = r"""Batch normalisation over {inputs} whose Lipschitz constant is limited by a learnable γ.

    .. math:: y = \mathrm{{BN}}(x) \cdot \min(1, γ / \mathrm{{SN}}), \quad
              \mathrm{{SN}} = \max_c |w_c| / \sqrt{{v_c + ε}}

    In evaluation mode v is the running variance and the slope is exactly min(γ, SN). In training mode v is the variance
    of the batch, the one that normalises, so that clipping and normalisation agree; the gradient takes that variance in
    the clip as a constant. The weight w and γ receive their exact gradients.

    γ is stored as ``log_gamma`` and takes no weight decay
    (:func:`~lightning_lcnn.layers.lcnn_parameter_groups`). The other entries of the ``state_dict`` carry torch's names,
    so weights of ``nn.{torch_name}`` load with ``strict=False``.
    :func:`~lightning_lcnn.layers.convert_sync_batchnorm` (Lightning: ``Trainer(sync_batchnorm=True)``) makes the layer
    synchronise over processes, on any backend; torch's function of this name would drop γ and is refused.

    Args:
        num_features: Channels C.
        eps: ε, added to the variance.
        momentum: Weight of the newest batch in the running statistics, None for a cumulative average.
        affine: Whether weight and bias are learned.
        track_running_stats: Whether running statistics are kept; without them evaluation has no fixed slope.
        device: Device of parameters and buffers.
        dtype: Type of parameters and buffers.
        gamma: Start value of γ. The default 10 is above the slopes of freshly initialised networks, so that training
            starts as it would without a limit. None turns clipping off.

    Raises:
        ValueError: If ``gamma`` is not positive and finite, or the input has another number of dimensions.

    Source:
        LCNN (Srinivas et al., 2022); batch statistics in training are ours (the reference clips by the
        running ones).

    Example:
        >>> layer = {name}(3, gamma=0.5).eval()
        >>> round(layer.slope().item(), 4)
        0.5
    """


class LipschitzBatchNorm1d(LipschitzBatchNorm):
    __doc__ = _DOC.format(inputs="(N, C) or (N, C, L)", torch_name="BatchNorm1d", name="LipschitzBatchNorm1d")
    _dimensions = (2, 3)


class LipschitzBatchNorm2d(LipschitzBatchNorm):
    __doc__ = _DOC.format(inputs="(N, C, H, W)", torch_name="BatchNorm2d", name="LipschitzBatchNorm2d")
    _dimensions = (4,)


class LipschitzBatchNorm3d(LipschitzBatchNorm):
    __doc__ = _DOC.format(inputs="(N, C, D, H, W)", torch_name="BatchNorm3d", name="LipschitzBatchNorm3d")
    _dimensions = (5,)


class _Converter(nn.SyncBatchNorm):
    """Torch's converter, which calls itself through its class for every child, with an exception for our layers."""

    @classmethod
    def convert_sync_batchnorm(cls, module: Any, process_group: Any = None) -> Any:
        """Mark our layers, leave the others to torch."""
        if not isinstance(module, LipschitzBatchNorm):
            return super().convert_sync_batchnorm(module, process_group)
        module.synchronized, module.process_group = True, process_group
        return module


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Have the batch norms of a network normalise the batches of all processes together.

    Ours stay, with γ and all hooks, and synchronise in training from then on, with one all-reduce per layer, on any
    backend. Torch's own become ``nn.SyncBatchNorm``, as by ``nn.SyncBatchNorm.convert_sync_batchnorm``, which would
    also replace ours and is stopped when it meets one. ``Trainer(sync_batchnorm=True)`` calls this function where the
    trainer has :class:`~lightning_lcnn.PowerIteration`.

    Args:
        module: Network, changed in place.
        process_group: Processes that normalise together, None for all.

    Returns:
        The network, or what replaces it if it is itself a batch norm of torch.

    Source:
        Torch's converter; the treatment of our layers is ours.

    Example:
        >>> network = convert_sync_batchnorm(nn.Sequential(LipschitzBatchNorm2d(3), nn.BatchNorm2d(3)))
        >>> network[0].synchronized, type(network[1]).__name__
        (True, 'SyncBatchNorm')
    """
    return _Converter.convert_sync_batchnorm(module, process_group)


def revert_sync_batchnorm(module: nn.Module) -> None:
    """Let our batch norms normalise by the batch of their own process again; others stay as they are."""
    for layer in module.modules():
        if isinstance(layer, LipschitzBatchNorm):
            layer.synchronized, layer.process_group = False, None
