"""Rules for layers, looked up by exact type: a subclass may compute something else and inherits nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_lcnn.bounds.rules.activations import CURVES, curve_of
from lightning_lcnn.bounds.rules.normalizations import over_groups, over_last
from lightning_lcnn.bounds.rules.pieces import (
    SPECTRAL,
    Activation,
    Diagonal,
    LayerBound,
    Number,
    Piece,
    Rearrange,
    Shape,
    Smooth,
    Weight,
    read_whole,
)
from lightning_lcnn.bounds.rules.pooling import (
    adaptive_average,
    log_softmax_bound,
    pooling,
    softmax_bound,
    window_average,
    windows,
)
from lightning_lcnn.functional.bends import BENDS, NAMED
from lightning_lcnn.layers.batch_norm import LipschitzBatchNorm1d, LipschitzBatchNorm2d, LipschitzBatchNorm3d
from lightning_lcnn.layers.pooling import LogMeanExpPool2d

UserRule = Callable[[Any, "Shape | None"], LayerBound]
PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LIPSCHITZ_NORMS = (LipschitzBatchNorm1d, LipschitzBatchNorm2d, LipschitzBatchNorm3d)
_PRODUCT = "it multiplies activations by activations, which has no finite slope on unbounded inputs"
_ATTENTION = "dot-product attention multiplies activations by activations and has no finite slope on unbounded inputs"
REFUSED: dict[type, str] = {
    nn.LocalResponseNorm: "it divides by powers of sums over its own input, for which no rule is known",
    nn.MultiheadAttention: _ATTENTION,
    nn.TransformerEncoderLayer: _ATTENTION,
    nn.TransformerDecoderLayer: _ATTENTION,
    nn.Bilinear: _PRODUCT,
    nn.GLU: _PRODUCT,
    nn.LSTM: _PRODUCT,
    nn.GRU: _PRODUCT,
    nn.Embedding: "it reads integers, for which slope and curvature have no meaning",
}
REFUSED |= {cls: "it jumps, so it has no slope" for bend in BENDS if bend.jumps for cls in bend.modules}
_RULES: dict[type, Callable[[Any], Piece]] = {}


def register_rule(layer_type: type[nn.Module], rule: UserRule) -> None:
    """Teach the bounds a layer of your own; its soundness is yours to prove.

    Args:
        layer_type: the exact class; subclasses do not inherit the rule.
        rule: called as ``rule(layer, input_shape)``, where ``input_shape`` is (1, …), or None when the size is
            unknown (:meth:`CurvatureGraph.surrogate`); returns a :class:`LayerBound` of the layer in evaluation
            mode, as a map between flattened vectors. Values may be tensors of shape (), differentiable in the
            layer's parameters.

    Raises:
        TypeError: when ``layer_type`` is not a class of modules or ``rule`` is not callable.

    Source:
        Ours; the lookup by exact type follows BackPACK's extensions.

    Example:
        >>> class Halve(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> register_rule(Halve, lambda layer, input_shape: LayerBound(slope=0.5))
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise TypeError(f"`layer_type` must be a subclass of torch.nn.Module, got {layer_type!r}.")
    if not callable(rule):
        raise TypeError(f"`rule` must be callable as rule(layer, input_shape), got {rule!r}.")
    _RULES[layer_type] = partial(_user_piece, rule)


def has_rule(module: nn.Module) -> bool:
    """Whether the module is bounded as a whole; otherwise its ``forward`` is traced."""
    kind = exact_type(module)
    if issubclass(kind, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.padding_mode != "zeros":
        return False  # its forward pads, then convolves
    return kind in _RULES


def is_known(module: nn.Module) -> bool:
    """Whether the module is one step: bounded as a whole, or refused as a whole."""
    return has_rule(module) or exact_type(module) in REFUSED


def piece_of(module: nn.Module) -> Piece:
    """The piece for a module that has a rule."""
    return _RULES[exact_type(module)](module)


def rule_for(module: nn.Module) -> Callable[[Any], Piece] | None:
    """The rule as it is registered now, None where there is none."""
    return _RULES.get(exact_type(module))


def exact_type(module: nn.Module) -> type[nn.Module]:
    """The class that decides the rule; torch's parametrizations change tensors, not the forward."""
    return parametrize.type_before_parametrizations(module)


def _user_piece(rule: UserRule, module: nn.Module) -> Piece:
    return Smooth(partial(_checked_bound, rule, module))


def _checked_bound(rule: UserRule, module: nn.Module, shape: Shape | None) -> LayerBound:
    bound = rule(module, shape)
    if not isinstance(bound, LayerBound):
        raise TypeError(f"The rule of {type(module).__name__} must return a LayerBound, got {type(bound).__name__}.")
    for name, value in (("slope", bound.slope), ("curvature", bound.curvature)):
        if not _non_negative(value):
            raise ValueError(f"The rule of {type(module).__name__} returned `{name}` {value}, expected >= 0.")
    return bound


def _non_negative(value: Number) -> bool:
    return isinstance(value, Tensor) or value >= 0


def _linear(module: nn.Linear) -> Piece:
    return Weight(partial(read_whole, module, "weight"), None, module)


def _conv(module: nn.Conv2d) -> Piece:
    geometry = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
    return Weight(partial(read_whole, module, "weight"), geometry, module)


def _norm(module: nn.BatchNorm2d) -> Piece:
    if module.running_var is None:
        raise ValueError(
            "it keeps no running statistics, so its slope depends on the batch; use track_running_stats=True"
        )
    return Diagonal(module)


def _layer_norm(module: nn.LayerNorm) -> Piece:
    return over_last(module.normalized_shape, module.eps, partial(read_whole, module, "weight"))


def _group_norm(module: nn.GroupNorm) -> Piece:
    return over_groups(module.num_groups, module.num_channels, module.eps, partial(read_whole, module, "weight"))


def _instance_norm(module: nn.InstanceNorm2d) -> Piece:
    if module.running_var is not None:
        return Diagonal(module)
    return over_groups(0, None, module.eps, partial(read_whole, module, "weight"))


def _apply(module: nn.Module, x: Tensor, output_shape: Shape) -> Tensor:
    return type(module).forward(module, x)  # what its hooks do is not the layer's


def reshape(x: Tensor, output_shape: Shape) -> Tensor:
    """Give every example the output's shape."""
    return x.reshape(x.shape[0], *output_shape[1:])


def zero_pad(padding: tuple[int, ...], x: Tensor, output_shape: Shape) -> Tensor:
    """The linear part of padding with any constant."""
    return F.pad(x, padding)


def _module_map(module: nn.Module) -> Piece:
    return Rearrange(partial(_apply, module))


def _upsample(module: nn.Upsample) -> Piece:
    return upsampling(module.mode, module.scale_factor, partial(_apply, module))


def upsampling(mode: str, scale: float | tuple[float, ...] | None, function: Callable[..., Tensor]) -> Piece:
    """Nearest or linear interpolation; bicubic has negative coefficients."""
    if mode == "bicubic":
        raise ValueError("bicubic interpolation has negative coefficients; use mode='bilinear'")
    dims = {"linear": 1, "bilinear": 2, "trilinear": 3}.get(mode, 2)
    factors = () if scale is None else scale if isinstance(scale, tuple) else (scale,) * dims
    return Rearrange(function, nominal=sum(math.log(f) for f in factors) / 2)


def _pool_options(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _average(dims: int, module: nn.AvgPool2d) -> Piece:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    return window_average(dims, **_pool_options(module, *names))


def _adaptive(dims: int, module: nn.AdaptiveAvgPool2d) -> Piece:
    return adaptive_average(dims, module.output_size)


def _max_pool(dims: int, module: nn.MaxPool2d) -> Piece:
    return pooling(windows(dims, **_pool_options(module, "kernel_size", "stride", "padding", "dilation", "ceil_mode")))


def _smooth_pool(module: LogMeanExpPool2d) -> Piece:
    names = ("kernel_size", "stride", "padding", "temperature", "ceil_mode")
    return pooling(windows(2, **_pool_options(module, *names)))


def _fill() -> None:
    for kind, curve in CURVES.items():
        _RULES[kind] = partial(_activation, curve)
    for kind in (nn.Linear, SPECTRAL[0]):
        _RULES[kind] = _linear
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, *SPECTRAL[1:]):
        _RULES[kind] = _conv
    for kind in (*PLAIN_NORMS, *LIPSCHITZ_NORMS):
        _RULES[kind] = _norm
    for kind in (nn.LayerNorm, nn.RMSNorm):
        _RULES[kind] = _layer_norm
    _RULES[nn.GroupNorm] = _group_norm
    for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        _RULES[kind] = _instance_norm
    for name in ("Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"):
        _RULES[getattr(nn, name)] = _identity
    for kind in (nn.Flatten, nn.Unflatten):
        _RULES[kind] = _reshaping
    for name in (
        "ChannelShuffle",
        "PixelShuffle",
        "PixelUnshuffle",
        *_paddings("Reflection", "Replication", "Circular"),
    ):
        _RULES[getattr(nn, name)] = _module_map
    for name in _paddings("Constant", "Zero"):
        _RULES[getattr(nn, name)] = _constant_pad
    for kind in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d):
        _RULES[kind] = _upsample
    _RULES[LogMeanExpPool2d] = _smooth_pool
    for dims in (1, 2, 3):
        _RULES[getattr(nn, f"AvgPool{dims}d")] = partial(_average, dims)
        _RULES[getattr(nn, f"AdaptiveAvgPool{dims}d")] = partial(_adaptive, dims)
        for kind in NAMED[f"max_pool{dims}d"].modules:
            _RULES[kind] = partial(_max_pool, dims)


def _paddings(*kinds: str) -> list[str]:
    return [f"{kind}Pad{dims}d" for kind in kinds for dims in (1, 2, 3)]


def _activation(curve: Callable[..., Any], module: nn.Module) -> Piece:
    return Activation(partial(curve_of, module, curve), module)


def _identity(module: nn.Module) -> Piece:
    return Rearrange()


def _reshaping(module: nn.Module) -> Piece:
    return Rearrange(reshape)


def _constant_pad(module: nn.ConstantPad2d) -> Piece:
    return Rearrange(partial(zero_pad, tuple(module.padding)))


_fill()
register_rule(nn.Softmax, lambda module, shape: softmax_bound(module.dim, shape))
register_rule(nn.LogSoftmax, lambda module, shape: log_softmax_bound(module.dim, shape))
