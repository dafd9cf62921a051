"""Gradient stability against closed forms of quadratics and against brute force."""

import pytest
import torch
from torch import nn

from lightning_lcnn.functional import gradient_stability, logit_margin


def quadratic(matrix):
    """Two logits whose margin is xᵀAx / 2."""
    return lambda x: torch.stack([torch.einsum("bi,ij,bj->b", x, matrix, x) / 2, torch.zeros(len(x)).to(x)], 1)


def test_quadratics_have_closed_forms():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.T
    x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    y = torch.zeros(5, dtype=torch.int64)
    result = gradient_stability(quadratic(matrix), x, y, 0.3, num_samples=4000, num_worst_steps=60)
    gradient = (x @ matrix).norm(dim=1)
    # worst: ‖A‖ r / ‖Ax‖ ; mean over the sphere: r E‖Au‖ / ‖Ax‖, E‖Au‖² = ‖A‖_F² / n
    spectral = torch.linalg.eigvalsh(matrix).abs().max()
    torch.testing.assert_close(result.worst, 0.3 * spectral / gradient, rtol=1e-3, atol=0)
    square = (result.samples**2).mean(1)
    expected = (0.3 * matrix.norm() / gradient) ** 2 / 6
    torch.testing.assert_close(square, expected, rtol=0.05, atol=0)  # 4000 samples: about 1.5 % standard error
    assert (result.values <= result.worst).all()
    torch.testing.assert_close(result.perturbation.norm(dim=1), torch.full((5,), 0.3, dtype=torch.float64))


def test_samples_are_what_they_say():
    """Each sample recomputed by hand from the perturbation of the worst one."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        x, y = torch.randn(6, 8).double(), torch.randint(0, 3, (6,))

    def gradient(x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(logit_margin(model(leaf), y).sum(), leaf)[0]

    result = gradient_stability(model, x, y, 0.5, num_samples=3)
    change = (gradient(x + result.perturbation) - gradient(x)).norm(dim=1) / gradient(x).norm(dim=1)
    torch.testing.assert_close(change, result.worst)
    torch.testing.assert_close(result.samples.amax(1), result.worst)
    torch.testing.assert_close(result.samples.mean(1), result.values)
    searched = gradient_stability(model, x, y, 0.5, num_samples=3, num_worst_steps=10)
    assert (searched.worst > 1.2 * result.worst).all()
    # brute force over the sphere finds nothing worse; the search is local, so this is observed, not proven
    random = gradient_stability(model, x, y, 0.5, num_samples=2000)
    assert (searched.worst >= 0.999 * random.worst).all()
    for hvp in ("forward_over_reverse", "finite_difference"):
        other = gradient_stability(model, x, y, 0.5, num_samples=3, num_worst_steps=10, hvp=hvp)
        torch.testing.assert_close(other.worst, searched.worst, rtol=1e-4, atol=0)


def test_linear_margins_are_perfectly_stable_and_batches_do_not_matter():
    model = nn.Linear(5, 3).double()
    x, y = torch.randn(7, 5).double(), torch.randint(0, 3, (7,))
    result = gradient_stability(model, x, y, 1.0, num_worst_steps=3)
    assert result.worst.abs().max() == 0
    curved = nn.Sequential(model, nn.Tanh())
    whole = gradient_stability(curved, x, y, 1.0, num_worst_steps=3)
    parts = [gradient_stability(curved, x[i : i + 1], y[i : i + 1], 1.0, num_worst_steps=3) for i in range(7)]
    torch.testing.assert_close(torch.cat([part.values for part in parts]), whole.values)
    chunked = gradient_stability(curved, x, y, 1.0, num_worst_steps=3, batch_size=3)
    torch.testing.assert_close(chunked.worst, whole.worst)
    assert chunked.samples.shape == (7, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.0}, "`radius` must be a finite number > 0"),
        ({"radius": -1.0}, "`radius` must be a finite number > 0"),
        ({"radius": 1.0, "num_samples": 0}, "`num_samples` must be at least 1"),
        ({"radius": 1.0, "num_worst_steps": -1}, "`num_worst_steps` must be at least 0"),
        ({"radius": 1.0, "hvp": "none"}, "`hvp` must be one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        gradient_stability(nn.Linear(2, 2), torch.ones(1, 2), torch.tensor([0]), **arguments)
