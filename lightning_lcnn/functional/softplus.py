"""The centered softplus: a ReLU whose curvature is a parameter."""

from __future__ import annotations

from torch import Tensor

from lightning_lcnn._checks import check_positive
from lightning_lcnn.kernels.fused_softplus import softplus


def centered_softplus(x: Tensor, beta: float | Tensor, inplace: bool = False) -> Tensor:
    r"""Smooth, strictly increasing activation through the origin, with curvature set by ``beta``.

    .. math:: s(x; β) = \frac{1}{β} \log\frac{1 + e^{βx}}{2}

    :math:`s(0) = 0`, :math:`s'(x) = σ(βx)` lies strictly between 0 and 1, and
    :math:`0 < s''(x) = β σ(βx) σ(-βx) \le β/4` with equality at 0. β → 0 gives the line x/2, β → ∞ gives ReLU.
    Values and both derivatives are finite and accurate to a few units in the last place of float32 for β from 1e-6 to
    1e4 and \|x\| up to 1e4; float16 and bfloat16 inputs are evaluated in float32.

    Eager calls run a fused kernel with its own backward, which saves the input and shares the saved output with the
    layer that follows; ``torch.compile`` gets one whose operations it can fuse. Under ``torch.export``, ``torch.func``
    and forward-mode differentiation the same function is composed of differentiable operations. On the CPU
    :func:`~lightning_lcnn.functional.use_compiled_softplus` makes the in-place form three times as fast, and forward
    without it.

    With ``inplace`` a network needs the memory of one with in-place ReLU: the output replaces x and backward recovers
    :math:`σ = 1 - e^{-βs}/2` from it. Value and slope then err by up to 1e-7 / β and 1e-7, however small they are.

    Args:
        x: Floating-point tensor of any shape.
        beta: Positive number, or a positive tensor that broadcasts to the shape of ``x`` (one value, or one per
            channel in the shape (C, 1, 1)). Gradients flow to a tensor.
        inplace: Permits to overwrite x. Done in eager mode on the CPU in float32 and float64 with one β >= 1, where it
            is faster and saves memory; elsewhere it changes nothing.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: If ``x`` is not a floating-point tensor.
        ValueError: If ``beta`` is a number that is not positive and finite.

    Source:
        LCNN (Srinivas et al., 2022); the numerical scheme is ours.

    Example:
        >>> import torch
        >>> x = torch.tensor([-1.0, 0.0, 1.0])
        >>> centered_softplus(x, beta=10.0)
        tensor([-0.0693,  0.0000,  0.9307])
    """
    if not isinstance(beta, Tensor):
        check_positive("beta", beta)
    return softplus(x, beta, inplace)
