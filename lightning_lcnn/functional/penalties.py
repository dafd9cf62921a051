"""Formulas of the penalties on the slopes and curvatures of the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
