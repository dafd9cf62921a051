"""What each module becomes, by its exact class: a subclass may compute something else."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_lcnn.bounds.rules.activations import CURVES, curve_of_module
from lightning_lcnn.conversion.options import POOLING_KEPT, Options
from lightning_lcnn.functional.bends import Bend
from lightning_lcnn.kernels.clipped_batch_norm import batch_norm_slope
from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    LogMeanExpPool2d,
    PiecewiseSoftplus,
    ScaledActivation,
    SmoothELU,
    SmoothHardswish,
    SmoothPReLU,
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralLinear,
    convert_sync_batchnorm,
)

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
# smooth forms, by the β that they start with; they tend to the original as it grows
KINKED: dict[type[nn.Module], Callable[[Any, float], nn.Module]] = {
    nn.ReLU: lambda old, beta: CenteredSoftplus(beta, inplace=old.inplace),
    nn.ReLU6: lambda old, beta: PiecewiseSoftplus((0.0, 6.0), (1.0, -1.0), beta=beta),
    nn.LeakyReLU: lambda old, beta: PiecewiseSoftplus(
        (0.0,), (1.0 - old.negative_slope,), slope=old.negative_slope, beta=beta
    ),
    nn.Hardtanh: lambda old, beta: PiecewiseSoftplus(
        (old.min_val, old.max_val), (1.0, -1.0), offset=old.min_val, beta=beta
    ),
    nn.Hardsigmoid: lambda old, beta: PiecewiseSoftplus((-3.0, 3.0), (1 / 6, -1 / 6), beta=beta),
    nn.Softshrink: lambda old, beta: PiecewiseSoftplus(
        (-old.lambd, old.lambd), (-1.0, 1.0), slope=1.0, offset=old.lambd, beta=beta
    ),
    nn.Hardswish: lambda old, beta: SmoothHardswish(beta),
    nn.PReLU: lambda old, beta: _prelu(old, beta),
    nn.ELU: lambda old, beta: SmoothELU(old.alpha, beta=beta),  # where alpha is not 1
    nn.SELU: lambda old, beta: SmoothELU(_SELU_ALPHA, _SELU_SCALE, beta),
}
# smooth already: they get a β that starts at 1, where they are the same function
SCALABLE: tuple[type[nn.Module], ...] = (nn.SiLU, nn.GELU, nn.Mish, nn.ELU, nn.CELU, nn.Softplus)
SPECTRAL: dict[type[nn.Module], Any] = {
    nn.Linear: SpectralLinear,
    nn.Conv1d: SpectralConv1d,
    nn.Conv2d: SpectralConv2d,
    nn.Conv3d: SpectralConv3d,
}
NORMS: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: LipschitzBatchNorm1d,
    nn.BatchNorm2d: LipschitzBatchNorm2d,
    nn.BatchNorm3d: LipschitzBatchNorm3d,
}
_NORM_OF_INPUT = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
AVERAGE: dict[type[nn.Module], type[nn.Module]] = {
    nn.MaxPool1d: nn.AvgPool1d,
    nn.MaxPool2d: nn.AvgPool2d,
    nn.MaxPool3d: nn.AvgPool3d,
    nn.AdaptiveMaxPool1d: nn.AdaptiveAvgPool1d,
    nn.AdaptiveMaxPool2d: nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool3d: nn.AdaptiveAvgPool3d,
}


def activation(old: nn.Module, options: Options) -> nn.Module | None:
    """Return the low-curvature form of an activation, None if it has none."""
    if type(old) in options.activations:
        return CenteredSoftplus(options.beta)
    if type(old) in SCALABLE and not bend_reason(old):
        return ScaledActivation(_plain(old))
    return KINKED[type(old)](old, options.beta) if type(old) in KINKED else None


def is_converted(bend: Bend) -> bool:
    """Whether modules of this operation have a low-curvature form."""
    return any(cls in KINKED or cls in SCALABLE or cls in AVERAGE for cls in bend.modules)


def is_activation(module: nn.Module, options: Options) -> bool:
    """Whether it is an activation that we know of or were told of."""
    known = type(module) in CURVES and type(module) is not CenteredSoftplus
    return known or type(module) in options.activations


def bend_reason(module: nn.Module) -> str | None:
    """Return why an activation has kinks, "" if it has none, None if the module is no known activation."""
    curve = None if type(module) is CenteredSoftplus else curve_of_module(module)
    return None if curve is None else curve.reason


def _plain(old: nn.Module) -> nn.Module:
    """The same activation out of place."""
    names = inspect.signature(CURVES[type(old)]).parameters
    return type(old)(**{name: getattr(old, name) for name in names if name != "inplace"})


def _prelu(old: Any, beta: float) -> nn.Module:
    new = SmoothPReLU(old.num_parameters, beta=beta)
    new.weight = old.weight
    return new


def pooling(old: Any, options: Options) -> nn.Module | str:
    """Return what replaces a max pooling, or the reason why nothing does."""
    if options.max_pool == "keep":
        return POOLING_KEPT
    if getattr(old, "return_indices", False) or getattr(old, "dilation", 1) not in (1, (1, 1), (1, 1, 1)):
        return "dilated, or asked for indices"
    if options.max_pool == "smooth":
        if type(old) is not nn.MaxPool2d:
            return "only MaxPool2d has a smooth counterpart; use max_pool='average'"
        return LogMeanExpPool2d(old.kernel_size, old.stride, old.padding, 1 / options.beta, old.ceil_mode)
    if hasattr(old, "output_size"):
        return AVERAGE[type(old)](old.output_size)
    arguments = (old.kernel_size, old.stride, old.padding, old.ceil_mode)
    return AVERAGE[type(old)](*arguments, count_include_pad=False)


def batch_norm(old: Any, dimensions: int, gamma: float | None) -> tuple[Any, str]:
    """Return the Lipschitz batch norm with the same parameters and statistics, and a note on its γ.

    Args:
        old: A batch norm with running statistics.
        dimensions: Of its input.
        gamma: Start of γ; ``None``: 10 or the slope that it has, whichever is larger.

    Returns:
        The layer and the note.
    """
    weight = None if old.weight is None else old.weight.double()
    slope = float(batch_norm_slope(weight, old.running_var.double(), old.eps).detach())
    start = max(10.0, slope) if gamma is None else gamma
    cls = NORMS[_NORM_OF_INPUT[dimensions] if type(old) is nn.SyncBatchNorm else type(old)]
    like = {"device": old.running_var.device, "dtype": old.running_var.dtype}
    new = cls(old.num_features, old.eps, old.momentum, old.affine, **like, gamma=start)
    for name, value in (*old._parameters.items(), *old._buffers.items()):
        setattr(new, name, value)
    if old.weight is not None:
        new.log_gamma.requires_grad_(old.weight.requires_grad)
    if type(old) is nn.SyncBatchNorm:
        convert_sync_batchnorm(new, old.process_group)
    clips = slope > start * (1 + 1e-6)
    return new, f"γ {start:.4g} clips slope {slope:.4g}" if clips else f"γ {start:.4g}, slope {slope:.4g}"


def spectral(old: Any, sizes: list[tuple[int, ...]]) -> Any:
    """Return the spectral layer that holds the parameters of ``old``, so that tied weights stay tied.

    Args:
        old: A linear layer or convolution.
        sizes: Shapes of the inputs that it got.

    Returns:
        The layer, without gain.
    """
    cls = SPECTRAL[type(old)]
    if cls is SpectralLinear:
        new = cls.from_layer(old)
    else:
        rank = len(old.kernel_size)
        largest = tuple(max(size[i] for size in sizes) for i in range(-rank, 0))
        new = cls.from_layer(old, input_size=largest)
    new.weight, new.bias = old.weight, old.bias
    return new


def set_gain(layer: Any, sigma: float) -> None:
    """Give a spectral layer the gain ``sigma``, which restores the scale of its weight."""
    log_gamma = torch.full((1,), math.log(sigma), device=layer.weight.device, dtype=layer.weight.dtype)
    layer.log_gamma = nn.Parameter(log_gamma, requires_grad=layer.weight.requires_grad)


def takes_scale(norm: Any, sigma: float) -> bool:
    """Whether :func:`move_scale` keeps the function: without a weight, no variance may become negative."""
    return norm.weight is not None or bool((norm.running_var.double() + norm.eps >= norm.eps * sigma**2).all())


@torch.no_grad()
def move_scale(layer: Any, norm: Any, sigma: float) -> None:
    """Let the batch norm after a layer work on outputs that are 1/σ of those it knew.

    BN(y; m, v, ε) = BN(y/σ; m/σ, v', ε) with v' + ε = (v + ε)/σ². Where that would make v' negative, for a channel of
    next to no variance, v' is 0 and the weight makes up for the rest. ε itself stays: it is in no ``state_dict``.
    """
    if layer.bias is not None:
        layer.bias.div_(sigma)
    wanted = (norm.running_var.double() + norm.eps) / sigma**2
    variance = (wanted - norm.eps).clamp(min=0.0)
    if norm.weight is not None:
        norm.weight.mul_(((variance + norm.eps) / wanted).sqrt())
    norm.running_mean.div_(sigma)
    norm.running_var.copy_(variance)
