"""Lanczos and symmetric power iteration against dense eigenvalues (LAPACK) and ARPACK."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lcnn.functional import lanczos, lanczos_probabilistic_gap, symmetric_power_iteration


def symmetric(spectra, seed=0):
    """Matrices (B, n, n) in float64 with the given spectra in random bases."""
    spectra = torch.as_tensor(spectra, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(*spectra.shape, spectra.shape[-1], generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(gaussian)
    return basis @ torch.diag_embed(spectra) @ basis.mT


def product(matrices):
    return lambda v: torch.einsum("bij,bj->bi", matrices, v)


def start_for(matrices, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(matrices), matrices.shape[-1], generator=generator, dtype=torch.float64).to(matrices)


SPECTRA = {
    "decaying": [2.0**-k for k in range(40)],
    "near ±λ": [1.0, -0.999] + [0.5 * (-0.8) ** k for k in range(38)],
    "equal ±λ": [1.0, -1.0] + [0.3] * 19 + [-0.3] * 19,
    "negative": [-3.0] + [-1.0 / (k + 1) for k in range(39)],
    "identity": [1.0] * 40,
    "zero": [0.0] * 40,
    "rank one": [-2.0] + [0.0] * 39,
    "three values": [1.0] * 20 + [-4.0] * 10 + [3.0] * 10,
    "tiny": [1e-30 * 0.5**k for k in range(40)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_eigenvalues_of_all_spectra_in_one_batch(dtype):
    spectra = torch.tensor(list(SPECTRA.values()), dtype=torch.float64)
    matrices = symmetric(spectra).to(dtype)
    result = lanczos(product(matrices), start_for(matrices), num_steps=20)
    truth = torch.linalg.eigvalsh(matrices.double())
    scale = truth.abs().amax(1)
    assert ((result.norm.double() - scale).abs() <= 1e-6 * scale).all()  # float32 rounding of the products
    # the end that does not set the norm may be crowded ("negative": -1/39, -1/40 beside -3) and needs more steps
    assert ((result.largest.double() - truth[:, -1]).abs() <= 1e-3 * scale).all()
    assert ((result.smallest.double() - truth[:, 0]).abs() <= 1e-3 * scale).all()
    assert result.converged.all()
    assert result.num_products == 20


def test_agrees_with_arpack():
    from scipy.sparse.linalg import eigsh

    matrices = symmetric(torch.randn(3, 60, generator=torch.Generator().manual_seed(2)).double())
    result = lanczos(product(matrices), start_for(matrices), num_steps=60)
    for i, matrix in enumerate(matrices.numpy()):
        expected = np.sort(eigsh(matrix, k=2, which="BE", return_eigenvectors=False))
        np.testing.assert_allclose([result.smallest[i], result.largest[i]], expected, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**31 - 1))
def test_residual_bounds_the_distance_to_an_eigenvalue(n, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = symmetric(torch.randn(4, n, generator=generator, dtype=torch.float64).round(decimals=1), seed)
    result = lanczos(product(matrices), start_for(matrices, seed), steps)
    truth = torch.linalg.eigvalsh(matrices)
    rounding = 1e-10
    for value, residual in (
        (result.smallest, result.smallest_residual),
        (result.largest, result.largest_residual),
    ):
        assert ((truth - value[:, None]).abs().amin(1) <= residual + rounding).all()
    assert (result.largest <= truth[:, -1] + rounding).all()
    assert (result.smallest >= truth[:, 0] - rounding).all()
    # the Ritz vector has unit length and reproduces value and residual
    image = product(matrices)(result.vector)
    torch.testing.assert_close(result.vector.norm(dim=1), torch.ones(4, dtype=torch.float64))
    quotient = (result.vector * image).sum(1)
    torch.testing.assert_close(quotient.abs(), result.norm, atol=1e-10, rtol=0)
    actual = (image - quotient[:, None] * result.vector).norm(dim=1)
    torch.testing.assert_close(actual, result.residual, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", range(20))
def test_opposite_eigenvalues_give_exactly_one_for_every_start(seed):
    diagonal = torch.tensor([[1.0, -1.0]])
    start = torch.randn(1, 2, generator=torch.Generator().manual_seed(seed))
    result = lanczos(lambda v: diagonal * v, start)
    rounding = 4 * torch.finfo(torch.float32).eps
    assert abs(result.norm.item() - 1) <= rounding
    assert abs(result.smallest.item() + 1) <= rounding
    assert abs(symmetric_power_iteration(lambda v: diagonal * v, start).norm.item() - 1) <= rounding


def test_power_iteration_grows_from_below_and_is_slow():
    matrices = symmetric([SPECTRA["near ±λ"]])
    norms = [symmetric_power_iteration(product(matrices), start_for(matrices), k).norm.item() for k in range(1, 30)]
    assert all(after >= before - 1e-12 for before, after in pairwise(norms))
    assert norms[-1] <= 1
    result = symmetric_power_iteration(product(matrices), start_for(matrices), 60)
    truth = torch.linalg.eigvalsh(matrices).abs()
    assert (truth - result.norm).abs().min() <= result.residual + 1e-12
    assert result.converged.item()
    assert math.isinf(symmetric_power_iteration(product(matrices), start_for(matrices), 1).residual.item())


def test_power_iteration_on_zero():
    result = symmetric_power_iteration(torch.zeros_like, torch.ones(2, 3))
    assert result.norm.tolist() == [0, 0]
    assert result.converged.all()


def test_a_zero_start_and_a_nan_operator_stay_with_their_example():
    matrices = symmetric([[1.0, -2.0, 0.5]] * 3)
    matrices[1] = torch.nan
    start = start_for(matrices)
    start[0] = 0
    result = lanczos(product(matrices), start)
    torch.testing.assert_close(result.norm[[0, 2]], torch.full((2,), 2.0, dtype=torch.float64))
    assert result.norm[1].isnan()
    assert result.converged.tolist() == [True, False, True]


def test_any_shape_and_a_single_unknown():
    result = lanczos(lambda v: -3 * v, torch.ones(2, 1, 1, 1), 5)
    assert result.vector.shape == (2, 1, 1, 1)
    assert result.norm.tolist() == [3, 3]
    image = lanczos(lambda v: v.flip(3), torch.randn(2, 3, 4, 4))  # eigenvalues ±1
    torch.testing.assert_close(image.smallest, torch.full((2,), -1.0))
    torch.testing.assert_close(image.largest, torch.ones(2))


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    lanczos(lambda v: v, torch.ones(2, 5))  # breaks down at once and draws fresh directions
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("algorithm", [lanczos, symmetric_power_iteration])
def test_bad_arguments(algorithm):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        algorithm(lambda v: v, torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"`start` must have shape \(examples, unknowns, …\), got \(3,\)"):
        algorithm(lambda v: v, torch.ones(3))
    with pytest.raises(ValueError, match="`tolerance` must be"):
        algorithm(lambda v: v, torch.ones(1, 2), 3, tolerance=0.0)


def test_probabilistic_gap_covers_and_is_not_vacuous():
    """Random starts on spectra that are hard for Lanczos: dense up to an isolated or unisolated top."""
    n, steps, probability, trials = 200, 12, 0.1, 400
    gap = lanczos_probabilistic_gap(steps, n, probability)
    starts = torch.randn(trials, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bulk = torch.cos(torch.linspace(0, math.pi, n - 1, dtype=torch.float64)) * 0.5 * (1 - gap) + 0.5 * (1 - gap)
    hardest = torch.cat([bulk, torch.ones(1, dtype=torch.float64)])
    for spectrum in (hardest, torch.linspace(0, 1, n, dtype=torch.float64)):
        result = lanczos(lambda v, s=spectrum: s * v, starts, steps)
        missed = (1 - result.largest > gap).double().mean().item()
        # binomial standard error of 400 trials at 0.1 is 0.015
        assert missed <= probability + 4 * 0.015
    assert lanczos_probabilistic_gap(steps, n, 0.01) > gap > lanczos_probabilistic_gap(2 * steps, n, probability)
    assert lanczos_probabilistic_gap(n, n, probability) == 0
    # Kuczyński and Woźniakowski's own form is looser
    root = math.sqrt(gap)
    assert probability <= 1.648 * math.sqrt(n) * ((1 - root) / (1 + root)) ** (steps - 0.5)


def test_breakdown_with_a_start_drawn_from_the_same_seed() -> None:
    start = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    result = lanczos(lambda v: 0.25 * v, start, 4, seed=0)
    assert result.largest.item() == pytest.approx(0.25)
