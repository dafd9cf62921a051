"""Spectral norm of symmetric operators by power iteration, one per example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lcnn._checks import check_int, check_positive
from lightning_lcnn.functional.lanczos import SymmetricOperator, safe_norm


@dataclass(frozen=True, eq=False)
class SymmetricPowerResult:
    """Spectral norms of B symmetric operators, from below, and how far they can be from an eigenvalue."""

    norm: Tensor  # (B,) never above the spectral norm
    residual: Tensor  # (B,) an eigenvalue's magnitude lies within this distance of `norm`
    vector: Tensor  # (B, *shape) unit direction that the last product was taken of
    tolerance: float  # relative residual that counts as converged
    num_products: int  # products with the operator

    @property
    def converged(self) -> Tensor:
        """True where the residual is at most ``tolerance * norm``: (B,) of bool."""
        return self.residual <= self.tolerance * self.norm


@torch.no_grad()
def symmetric_power_iteration(
    operator: SymmetricOperator, start: Tensor, num_iterations: int = 20, *, tolerance: float = 0.01
) -> SymmetricPowerResult:
    """Spectral norm of a batch of symmetric operators by v ← Av/‖Av‖.

    The estimate is ‖Av‖, the Rayleigh quotient of A² in square root, which only grows and which ±λ of equal size do
    not disturb (vᵀAv would settle anywhere between them). `lanczos` needs far fewer products; this is for comparison.

    Args:
        operator: maps ``(B, *shape)`` to ``(B, *shape)``; acts on each example alone and is symmetric and linear.
        start: first direction of each example, ``(B, *shape)``, of any length above zero.
        num_iterations: products with the operator.
        tolerance: relative residual up to which an example counts as converged.

    Returns:
        `SymmetricPowerResult`; the residual is of A² and the last two products, infinite after a single one.

    Raises:
        ValueError: if ``start`` has no example dimension or no unknowns, or an argument is out of range.

    Source: textbook; the estimate for ±λ is ours.

    Example:
        >>> diagonal = torch.tensor([[3.0, -3.0]])
        >>> print(f"{symmetric_power_iteration(lambda v: diagonal * v, torch.ones(1, 2)).norm.item():.4f}")
        3.0000
    """
    check_int("num_iterations", num_iterations)
    check_positive("tolerance", tolerance)
    if start.ndim < 2 or start[0].numel() == 0:
        raise ValueError(f"`start` must have shape (examples, unknowns, …), got {tuple(start.shape)}.")
    vector = _unit(start)
    norm, residual = start.new_zeros(len(start)), start.new_full((len(start),), torch.inf)
    before = product = vector
    for k in range(num_iterations):
        if k > 0:
            before, vector = vector, _unit(product)
        product = operator(vector).detach().to(start.dtype)
        previous, norm = norm, safe_norm(product)
        if k > 0:  # |μ - σ²| <= ‖A²v - σ²v‖ for an eigenvalue μ of A², divided by σ
            column = (-1,) + (1,) * (start.ndim - 1)
            residual = safe_norm(product - previous.view(column) * before) + (norm - previous)
    vanished = norm == 0
    return SymmetricPowerResult(norm, torch.where(vanished, 0, residual), vector, tolerance, num_iterations)


def _unit(vectors: Tensor) -> Tensor:
    length = safe_norm(vectors).view((-1,) + (1,) * (vectors.ndim - 1))
    return vectors / torch.where(length == 0, torch.ones_like(length), length)
