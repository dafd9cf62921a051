"""Turning a low-curvature network into plain layers for inference."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from lightning_lcnn._checks import check_choice
from lightning_lcnn._compat import has_hooks_between
from lightning_lcnn.conversion.options import check_input, check_model
from lightning_lcnn.conversion.rules import NORMS, SPECTRAL
from lightning_lcnn.conversion.tree import replace_modules, take_over
from lightning_lcnn.layers import LearnableBeta, ScaledActivation
from lightning_lcnn.recording.run import record_run

ModelT = TypeVar("ModelT", bound=nn.Module)
_PLAIN = {ours: stock for stock, ours in (SPECTRAL | NORMS).items()}


@torch.no_grad()
def fold(model: ModelT, example_input: Tensor | None = None, *, batch_norm: str = "keep") -> ModelT:
    """Return a copy for inference, of torch's own layers but for the activation.

    Spectral layers become ``nn.Linear`` and ``nn.ConvNd`` with the weight W γ/σ, Lipschitz batch norms
    ``nn.BatchNormNd`` whose weight holds the clipping; activations stay, with β fixed. Outputs are those of ``model``
    in evaluation mode up to rounding. The result has no buffers of the power iteration and exports with
    ``torch.export`` and ``torch.onnx``.

    Args:
        model: A network with low-curvature layers; not changed.
        example_input: One batch, needed for ``batch_norm="fuse"`` only.
        batch_norm: ``"keep"`` leaves batch norms as layers; ``"fuse"`` multiplies those that get all of the output of
            one convolution or linear layer into it, and an ``nn.Identity`` takes their place.

    Returns:
        The copy, in evaluation mode.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If there is nothing to fold, a batch norm has no running statistics, ``batch_norm`` is unknown,
            or ``"fuse"`` lacks an example input that the model accepts.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> from lightning_lcnn.models import resnet18
        >>> plain = fold(resnet18(width=4, low_curvature=True))
        >>> type(plain.conv1).__name__, type(plain.bn1).__name__, plain.act.learnable
        ('Conv2d', 'BatchNorm2d', False)
    """
    check_model(model)
    check_choice("batch_norm", batch_norm, ("keep", "fuse"))
    folded = copy.deepcopy(model).eval()
    pairs = [(old, _plain(old)) for old in folded.modules()]
    replacements = {id(old): take_over(old, new, attributes=False) for old, new in pairs if new is not None}
    if not replacements:
        raise ValueError(f"`model` ({type(model).__name__}) has nothing to fold: no low-curvature layer is in it.")
    folded = replace_modules(folded, replacements)  # type: ignore[assignment]
    return folded if batch_norm == "keep" else _fuse(folded, example_input)


def _plain(module: Any) -> nn.Module | None:
    if isinstance(module, LearnableBeta):
        return _fixed(module)
    if type(module) not in _PLAIN:
        return None
    return _plain_norm(module) if _PLAIN[type(module)] in NORMS else _plain_linear(module)


def _fixed(module: LearnableBeta) -> nn.Module:
    """Without what is trained; a scaled activation at β = 1 is the activation."""
    if type(module) is ScaledActivation and not module.log_beta.any():
        return module.activation
    new = copy.copy(module)
    new._parameters, new._buffers = {}, {"log_beta": module.log_beta.detach().clone()}
    return new


def _plain_linear(module: Any) -> nn.Module:
    cls: Any = _PLAIN[type(module)]
    has_bias = module.bias is not None
    if cls is nn.Linear:
        new = cls(module.in_features, module.out_features, has_bias, device="meta")
    else:
        size = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
        new = cls(*size, module.dilation, module.groups, has_bias, device="meta")
    new.weight = nn.Parameter(module.normalized_weight(), module.weight.requires_grad)
    new.bias = module.bias
    return new


def _plain_norm(module: Any) -> nn.Module:
    scale, shift = module.scale_and_shift()
    like = {"device": module.running_var.device, "dtype": module.running_var.dtype}
    new: Any = _PLAIN[type(module)](module.num_features, module.eps, module.momentum, **like)
    new.load_state_dict({name: value for name, value in module._buffers.items() if value is not None}, strict=False)
    new.weight.copy_(scale * (module.running_var + module.eps).sqrt())
    new.bias.copy_(shift + scale * module.running_mean)
    return new


def _fuse(model: Any, example_input: Tensor | None) -> Any:
    if example_input is None:
        raise ValueError(
            "batch_norm='fuse' needs `example_input`, one batch, to see which layer feeds which batch norm."
        )
    check_input(example_input, model)
    record, modules = record_run(model, example_input), dict(model.named_modules())
    replacements: dict[int, nn.Module] = {}
    for name, module in modules.items():
        behind = record.only_consumer(name) or name
        norm: Any = modules[behind]
        if type(module) not in SPECTRAL or type(norm) not in NORMS or norm.running_var is None:
            continue
        over_channels = (
            len(record.usage[behind].inputs[0]) == module.weight.dim()
        )  # not so behind a Linear on (N, L, C)
        if not over_channels or name in record.read_outside or has_hooks_between(module, norm):
            continue
        fuse: Any = fuse_linear_bn_eval if type(module) is nn.Linear else fuse_conv_bn_eval
        replacements[id(module)] = take_over(module, fuse(module, norm))
        replacements[id(norm)] = take_over(norm, nn.Identity(), attributes=False)
    return replace_modules(model, replacements)
