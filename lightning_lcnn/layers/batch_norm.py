"""Batch normalisation whose slope is limited by a learnable γ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lcnn._checks import check_positive
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


class _LipschitzBatchNorm(_NormBase):
    _dimensions: tuple[int, ...]
    log_gamma: nn.Parameter | None
    _sync: nn.Module
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
        self.add_module("sync", nn.BatchNorm1d(num_features, affine=False, track_running_stats=False))

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """A stateless batch norm, which is no module of this one, for ``convert_sync_batchnorm`` to find.

        torch replaces every subclass of its batch norm by its own class, which would drop γ without a word. So this
        layer is none; the converter finds the stateless one, hands its replacement to :meth:`add_module`, and the
        layer then knows that it shall synchronise, and over which processes.
        """
        yield "sync", self._sync

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Keep what ``convert_sync_batchnorm`` made of the stateless batch norm, outside the module tree."""
        if name != "sync":
            raise ValueError(f"{type(self).__name__} takes no submodules, got {name!r}.")
        object.__setattr__(self, "_sync", module)

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
        if self._takes_operators(x):
            return self._by_operators(x)
        momentum = self._count_batch()
        use_batch = self.training or self.running_mean is None
        if self.training and isinstance(self._sync, nn.SyncBatchNorm) and dist.is_initialized():
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
        if self.momentum is None or (isinstance(self._sync, nn.SyncBatchNorm) and dist.is_initialized()):
            return False
        return takes_operators(x, self.weight, self.bias, self.log_gamma, self.running_mean)

    def _by_operators(self, x: Tensor) -> Tensor:
        statistics: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if self.training and self.track_running_stats:
            statistics = self.running_mean, self.running_var, self.num_batches_tracked
        return clipped_norm(x, self.weight, self.bias, self.log_gamma, statistics, cast(float, self.momentum), self.eps)

    def extra_repr(self) -> str:
        """Torch's arguments and γ now."""
        gamma = None if self.gamma is None else f"{self.gamma.item():.4g}"
        return f"{super().extra_repr()}, gamma={gamma}"

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
        mean, variance, count = synchronized_moments(x, cast(Any, self._sync).process_group)
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
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` (Lightning: ``Trainer(sync_batchnorm=True)``) makes the layer
    synchronise over processes, on any backend, and keeps γ.

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


class LipschitzBatchNorm1d(_LipschitzBatchNorm):
    __doc__ = _DOC.format(inputs="(N, C) or (N, C, L)", torch_name="BatchNorm1d", name="LipschitzBatchNorm1d")
    _dimensions = (2, 3)


class LipschitzBatchNorm2d(_LipschitzBatchNorm):
    __doc__ = _DOC.format(inputs="(N, C, H, W)", torch_name="BatchNorm2d", name="LipschitzBatchNorm2d")
    _dimensions = (4,)


class LipschitzBatchNorm3d(_LipschitzBatchNorm):
    __doc__ = _DOC.format(inputs="(N, C, D, H, W)", torch_name="BatchNorm3d", name="LipschitzBatchNorm3d")
    _dimensions = (5,)
