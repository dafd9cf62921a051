"""Formulas of the penalties: on β and γ of the layers, and on the gradients by the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def log_normalized_curvature_bound(log_beta: Tensor, log_slope: Tensor) -> Tensor:
    r"""Logarithm of the curvature bound of a chain of layers, divided by its slope bound.

    .. math:: \log \bar C = \log \sum_i \frac{β_i}{4} \prod_{j \le i} L_j
              = \mathrm{logsumexp}_i \Big(\log β_i - \log 4 + \sum_{j \le i} \log L_j\Big)

    Every value and gradient is computed from logarithms, so no product of slopes can overflow. The bound on the
    Hessian norm itself is :math:`K = \bar L \bar C`, with the product :math:`\bar L` of all slopes. Networks that
    branch are handled by the traced graph of ``lightning_lcnn.bounds``, which agrees with this on chains.

    Args:
        log_beta: log β of the activations in their order, shape (n,).
        log_slope: log of the slope bound of everything between activation i - 1 and activation i, shape (n,).

    Returns:
        0-d tensor.

    Raises:
        ValueError: If the shapes differ or there is no activation.

    Source:
        LCNN (Srinivas et al., 2022), theorem 1, without its division by the gradient; the logarithm is ours.

    Example:
        >>> log_normalized_curvature_bound(torch.tensor([4.0]).log(), torch.zeros(1)).exp()
        tensor(1.)
    """
    if log_beta.ndim != 1 or log_beta.shape != log_slope.shape or not len(log_beta):
        raise ValueError(
            "`log_beta` and `log_slope` must have one shape (n,) with n >= 1, "
            f"got {tuple(log_beta.shape)} and {tuple(log_slope.shape)}."
        )
    return torch.logsumexp(log_beta - math.log(4.0) + log_slope.cumsum(0), dim=0)


def sum_log_penalty(log_betas: Sequence[Tensor], log_gammas: Sequence[Tensor]) -> Tensor:
    r"""Sum of the logarithms of all β and γ.

    .. math:: \sum_i \log β_i + \sum_j \log γ_j

    Unbounded below and no bound of the network; the penalty that the paper writes down. A β with one value for each
    channel counts with the mean of its logarithms, so that every layer has the same weight.

    Args:
        log_betas: log β of each activation, each of any shape.
        log_gammas: log γ of each layer that has a γ, each of any shape.

    Returns:
        0-d tensor.

    Raises:
        ValueError: If both sequences are empty.

    Source:
        LCNN (Srinivas et al., 2022).

    Example:
        >>> sum_log_penalty([torch.tensor(2.0), torch.tensor([0.0, 1.0])], [torch.tensor(-1.0)])
        tensor(1.5000)
    """
    return _sum([log_beta.mean() for log_beta in log_betas] + [log_gamma.mean() for log_gamma in log_gammas])


def reference_penalty(log_betas: Sequence[Tensor], log_gammas: Sequence[Tensor]) -> Tensor:
    r"""Sum of all β and of the absolute logarithms of all γ.

    .. math:: \sum_i β_i + \sum_j |\log γ_j|

    What the research code of the paper computes; it pulls γ to 1. A β with one value for each channel counts with its
    mean.

    Args:
        log_betas: log β of each activation, each of any shape.
        log_gammas: log γ of each layer that has a γ, each of any shape.

    Returns:
        0-d tensor.

    Raises:
        ValueError: If both sequences are empty.

    Source:
        Compatibility with the research code of LCNN (Srinivas et al., 2022).

    Example:
        >>> reference_penalty([torch.tensor(0.0)], [torch.tensor(-2.0)])
        tensor(3.)
    """
    return _sum([x.exp().mean() for x in log_betas] + [x.abs().mean() for x in log_gammas])


def _sum(terms: Sequence[Tensor]) -> Tensor:
    if not terms:
        raise ValueError("The penalty needs at least one β or γ, got none; convert the model first.")
    return torch.stack(tuple(terms)).sum()


def squared_norms(vectors: Tensor) -> Tensor:
    """Squared ℓ₂ norm over all but the first dimension, (B, …) to (B,), in at least float32.

    Example:
        >>> squared_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([25.,  1.])
    """
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32)).flatten(1).square().sum(1)


def gradient_norm_penalty(gradient: Tensor, squared: bool = True) -> Tensor:
    r"""Mean over the examples of the norm, or squared norm, of their input gradients.

    .. math:: \frac{1}{B} \sum_b \|g_b\|_2^2 \quad\text{or}\quad \frac{1}{B} \sum_b \|g_b\|_2

    Args:
        gradient: Input gradients g, shape (B, ...), one per example.
        squared: Which of the two.

    Returns:
        0-d tensor in at least float32. The norm of a zero gradient has gradient zero, NaN stays NaN.

    Source:
        Drucker and Le Cun (1992), as used for LCNN (Srinivas et al., 2022).

    Example:
        >>> gradient_norm_penalty(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor(12.5000)
        >>> gradient_norm_penalty(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), squared=False)
        tensor(2.5000)
    """
    squares = squared_norms(gradient)
    return squares.mean() if squared else _sqrt(squares).mean()


def gradient_norm_penalty_by_difference(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    values: Tensor,
    gradient: Tensor,
    step: float,
    squared: bool = True,
) -> Tensor:
    r"""The gradient-norm penalty with a parameter gradient from one forward difference of the function.

    .. math:: \nabla_θ \frac1B \sum_b \|g_b\|^2 = \nabla_θ \langle \nabla_x F, v \rangle
              \approx \nabla_θ \frac{F(x + ε v) - F(x)}{ε}, \quad F = \sum_b f_b, \; v = \tfrac2B g

    with v held constant (v_b = g_b / (B ‖g_b‖) without the square). The value is exact, for g is known; only the
    gradient by the parameters is a difference, and it costs first derivatives only. ε is chosen so that the
    longest shift of an example is ``step``. The error relative to the exact gradient is about step · curvature / 2,
    plus rounding of about 1e-7 / step in float32. Differentiating F as a whole stays right where examples of a batch
    depend on each other, as in batch norm.

    Args:
        function: Maps (B, ...) to per-example values f, shape (B,), differentiable in the parameters.
        x: The inputs, shape (B, ...).
        values: f(x) with its graph by the parameters, shape (B,).
        gradient: ∇_x F(x), shape (B, ...); no graph is needed.
        step: Length of the longest shift, in units of the input's ℓ₂ norm.
        squared: Whether the norms are squared.

    Returns:
        0-d tensor.

    Source:
        Finlay and Oberman (2019); the difference of the sum along one direction is ours.

    Example:
        >>> slope = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.tensor([[1.0]])
        >>> f = lambda x: x[:, 0] * slope
        >>> gradient_norm_penalty_by_difference(f, x, f(x), torch.tensor([[2.0]]), step=0.5).backward()
        >>> slope.grad  # of slope²
        tensor([4.])
    """
    gradient = gradient.detach()
    value = gradient_norm_penalty(gradient, squared)
    norms = squared_norms(gradient).sqrt()
    direction = gradient * (2 / len(x)) if squared else unit_vectors(gradient) / len(x)
    longest = norms.max() * (2 / len(x)) if squared else norms.new_tensor(1 / len(x))
    epsilon = step / torch.where(longest == 0, 1.0, longest)
    shifted = function(x.detach() + (epsilon * direction).to(x.dtype))
    slope = (shifted - values).sum() / epsilon
    return value + (slope - slope.detach())


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors divided by their ℓ₂ norms over all but the first dimension; zero stays zero, NaN stays NaN.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    norms = squared_norms(vectors).sqrt().view((-1,) + (1,) * (vectors.ndim - 1))
    return vectors / torch.where(norms == 0, 1.0, norms)


def cure_direction(gradient: Tensor) -> Tensor:
    r"""Direction in which CURE probes the curvature of the loss, the normalised sign of its gradient.

    .. math:: z_b = \mathrm{sign}(g_b) / \|\mathrm{sign}(g_b)\|_2

    Args:
        gradient: Input gradients g, shape (B, ...).

    Returns:
        Tensor like ``gradient`` without a graph; zero where the gradient vanishes, NaN where it is NaN.

    Source:
        CURE (Moosavi-Dezfooli et al., 2019).

    Example:
        >>> cure_direction(torch.tensor([[0.1, -7.0, 3.0, 2.0]]))
        tensor([[ 0.5000, -0.5000,  0.5000,  0.5000]])
    """
    gradient = gradient.detach()
    return unit_vectors(torch.where(gradient.isnan(), gradient, gradient.sign()))  # sign(NaN) would be 0


def cure_penalty(shifted_gradient: Tensor, gradient: Tensor) -> Tensor:
    r"""Mean over the examples of the squared change of their input gradients.

    .. math:: \frac1B \sum_b \|\nabla ℓ_b(x_b + h z_b) - \nabla ℓ_b(x_b)\|_2^2

    Args:
        shifted_gradient: Input gradients at the shifted points, shape (B, ...).
        gradient: Input gradients at the points themselves, shape (B, ...).

    Returns:
        0-d tensor in at least float32.

    Source:
        CURE (Moosavi-Dezfooli et al., 2019).

    Example:
        >>> cure_penalty(torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(9.)
    """
    return squared_norms(shifted_gradient - gradient).mean()


def _sqrt(squares: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero; the inner ``where`` keeps 0 · ∞ = NaN out of the backward."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
