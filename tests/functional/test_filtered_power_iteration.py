"""The Chebyshev filter against numpy's polynomials, and what it is for: a singular value that overtakes another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.functional import filtered_power_iteration, power_iteration
from lightning_lcnn.layers import SpectralLinear


def matrix(values: list[float], rows: int = 30, seed: int = 0) -> Tensor:
    """Float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
        for n in (rows, len(values))
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("num_iterations", [2, 3, 5, 8])
def test_filter_is_the_chebyshev_polynomial_and_a_power_step(num_iterations: int) -> None:
    A = matrix([1.0, 0.97, 0.9] + [0.5] * 17)
    start = torch.full((20,), 20**-0.5, dtype=torch.float64)
    triplet = filtered_power_iteration(A.mv, A.T.mv, start, num_iterations)
    half = 0.45 * (A @ start).square().sum().item()
    values, vectors = np.linalg.eigh((A.T @ A).numpy())
    polynomial = np.polynomial.chebyshev.Chebyshev.basis(num_iterations - 1)(values / half - 1)
    expected = vectors @ (values * polynomial * (vectors.T @ start.numpy()))
    cosine = abs(triplet.right.numpy() @ expected) / np.linalg.norm(expected)
    assert cosine == pytest.approx(1.0, abs=1e-12)
    assert triplet.value <= 1 + 1e-12
    assert triplet.iterations == num_iterations


def test_one_iteration_is_power_iteration() -> None:
    A, start = matrix([2.0, 1.0]), torch.tensor([0.6, 0.8], dtype=torch.float64)
    assert torch.equal(
        filtered_power_iteration(A.mv, A.T.mv, start, 1).right, power_iteration(A.mv, A.T.mv, start).right
    )


def test_estimate_that_is_far_off_overflows_nothing() -> None:
    A = torch.diag(torch.tensor([1e8, 1e-4]))
    triplet = filtered_power_iteration(A.mv, A.mv, torch.tensor([1e-9, 1.0]), 8)
    assert triplet.value == pytest.approx(1e8)
    zero = filtered_power_iteration(torch.zeros_like, torch.zeros_like, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(zero.right.abs(), torch.tensor([0.6, 0.8]))
    assert zero.value == 0


def test_refuses_no_iterations() -> None:
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1, got 0"):
        filtered_power_iteration(torch.clone, torch.clone, torch.ones(2), 0)


def overtaken_layer() -> SpectralLinear:
    """Converged to the first direction, which then falls behind 17 others."""
    layer = SpectralLinear(20, 20, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0] + [0.5] * 19)))
    layer.reset_spectral_norm()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.2] + [1.1] * 16 + [0.5] * 2)))
    return layer


def test_update_notices_a_vector_that_overtakes() -> None:
    layer = overtaken_layer()
    for _ in range(5):
        layer.update_spectral_norm()
    assert layer.sigma().item() == pytest.approx(1.2, rel=0.01)
    plain = overtaken_layer()
    for _ in range(5):
        plain._store(
            plain._operator(plain.weight.detach(), (20,)),
            power_iteration(plain.weight.detach().mv, plain.weight.detach().T.mv, plain.right_vector, 5),
        )
    assert plain.sigma().item() == pytest.approx(1.0, rel=1e-3)  # 25 powers have not noticed


def test_perturbation_costs_next_to_nothing_where_nothing_changes() -> None:
    layer = SpectralLinear(20, 20)
    nn.init.normal_(layer.weight)
    layer.reset_spectral_norm(1e-6)
    converged = layer.sigma().item()
    for _ in range(20):
        layer.update_spectral_norm()
    assert layer.sigma().item() == pytest.approx(converged, rel=1e-4)
