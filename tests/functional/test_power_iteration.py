"""Largest singular value of matrices of known spectrum, and convolutions as operators with exact adjoints."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from lightning_lcnn.functional import largest_singular_triplet, power_iteration
from lightning_lcnn.functional.singular_vectors import conv_adjoint, conv_apply, conv_geometry, conv_operator

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def matrix(singular_values, rows, columns, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    k = min(rows, columns)
    values = torch.tensor(singular_values, dtype=torch.float64)
    return (left[:, :k] * values @ right[:, :k].T).to(dtype)


def random_convolution(rng, largest_size=10):
    """Weight, input size and conv_geometry arguments of a random convolution whose kernel fits."""
    while True:
        rank = rng.choice([1, 2, 2, 3])
        groups = rng.choice([1, 1, 2, 3])
        kernel = [rng.randint(1, 5 if rank < 3 else 3) for _ in range(rank)]
        size = [rng.randint(3, largest_size if rank < 3 else 5) for _ in range(rank)]
        arguments = {
            "stride": [rng.randint(1, 3) for _ in range(rank)],
            "padding": [(rng.randint(0, 3), rng.randint(0, 3)) for _ in range(rank)],
            "dilation": [rng.randint(1, 3) for _ in range(rank)],
            "groups": groups,
        }
        if min(conv_geometry(kernel, **arguments).output_size(size)) > 0:
            shape = (groups * rng.randint(1, 3), rng.randint(1, 3), *kernel)
            return torch.randn(shape, dtype=torch.float64), size, arguments


def dense_convolution(weight, size, arguments):
    """Matrix (inputs, outputs) of a convolution, by torch alone."""
    channels = weight.shape[1] * arguments["groups"]
    inputs = channels * math.prod(size)
    x = torch.eye(inputs, dtype=weight.dtype).view(inputs, channels, *size)
    x = F.pad(x, [p for pair in reversed(arguments["padding"]) for p in pair])
    y = CONV[len(size)](x, weight, None, arguments["stride"], 0, arguments["dilation"], arguments["groups"])
    return y.reshape(inputs, -1)


@pytest.mark.parametrize(("rows", "columns"), [(30, 20), (20, 30)])
@pytest.mark.parametrize(
    "values",
    [
        [2.0**-k for k in range(20)],
        [3.0] * 20,
        [1.0] + [0.999] * 19,
        [5.0] + [0.0] * 19,
        [1e-8 * 0.5**k for k in range(20)],
    ],
    ids=["decaying", "orthogonal", "cluster", "rank one", "tiny"],
)
def test_largest_singular_triplet_of_known_spectra(rows, columns, values):
    A = matrix(values, rows, columns)
    triplet = largest_singular_triplet(A.mv, A.T.mv, torch.ones(columns, dtype=A.dtype), tolerance=1e-9)
    assert triplet.value.item() == pytest.approx(values[0], rel=1e-8)  # error of σ² at most residual² / gap
    assert triplet.residual <= 1e-9
    torch.testing.assert_close(A @ triplet.right, triplet.value * triplet.left)
    assert torch.linalg.vector_norm(triplet.right).item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_singular_triplet_in_spaces_smaller_than_the_basis(dtype):
    for columns in (1, 2, 5):
        A = torch.randn(3, columns, dtype=dtype)
        triplet = largest_singular_triplet(A.mv, A.T.mv, torch.ones(columns, dtype=dtype))
        assert triplet.value.item() == pytest.approx(torch.linalg.matrix_norm(A, 2).item(), rel=1e-5)


def test_power_iteration_converges_from_below_and_keeps_a_warm_start():
    A = matrix([1.0, 0.7] + [0.2] * 18, 30, 20)
    start = torch.full((20,), 20**-0.5, dtype=torch.float64)
    values = [power_iteration(A.mv, A.T.mv, start, n).value.item() for n in (1, 2, 5, 20)]
    assert values == sorted(values)
    assert values[-1] <= 1 + 1e-12
    assert values[-1] == pytest.approx(1, abs=1e-6)  # (0.7)^(4 * 20) = 4e-13, with a start of small overlap
    five = power_iteration(A.mv, A.T.mv, start, 5)
    ten = power_iteration(A.mv, A.T.mv, five.right, 5)
    torch.testing.assert_close(ten.right, power_iteration(A.mv, A.T.mv, start, 10).right)


def test_residual_of_power_iteration_is_that_of_the_pair_before_the_last_half_step():
    A = matrix([1.0, 0.9] + [0.2] * 18, 30, 20)
    start = torch.full((20,), 20**-0.5, dtype=torch.float64)
    triplet = power_iteration(A.mv, A.T.mv, start)
    norm = (A @ start).norm()
    expected = (A.T @ (A @ start / norm) - norm * start).norm() / triplet.value
    torch.testing.assert_close(triplet.residual, expected)


def test_zero_operator_gives_zero_and_keeps_the_start():
    A = torch.zeros(3, 4)
    start = torch.full((4,), 0.5)
    step = power_iteration(A.mv, A.T.mv, start)
    converged = largest_singular_triplet(A.mv, A.T.mv, start)
    assert step.value == 0
    assert converged.value == 0
    torch.testing.assert_close(step.right, start)
    assert step.left.count_nonzero() == converged.left.count_nonzero() == 0
    assert converged.right.isfinite().all()


def test_bad_arguments_are_refused():
    A, start = torch.eye(3), torch.ones(3)
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1, got 0"):
        power_iteration(A.mv, A.mv, start, 0)
    with pytest.raises(ValueError, match="`tolerance` must be a finite number >= 0"):
        largest_singular_triplet(A.mv, A.mv, start, tolerance=-1.0)
    with pytest.raises(ValueError, match="not finite; look at the layer's weight"):
        largest_singular_triplet(lambda v: v * math.nan, lambda v: v, start)


def test_convolution_adjoint_and_weight_gradient_against_dense_matrix_and_autograd():
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        weight, size, arguments = random_convolution(rng)
        geometry = conv_geometry(weight.shape[2:], **arguments)
        A = dense_convolution(weight, size, arguments).T
        v = torch.randn(weight.shape[1] * geometry.groups, *size, dtype=torch.float64)
        operator = conv_operator(weight.requires_grad_(), size, geometry)
        image = operator.apply(v)
        u = torch.randn_like(image)
        torch.testing.assert_close(image.flatten(), A @ v.flatten())
        torch.testing.assert_close(operator.adjoint(u).flatten(), A.T @ u.flatten())
        (expected,) = torch.autograd.grad((u * image).sum(), weight)
        torch.testing.assert_close(operator.weight_gradient(u, v), expected)


@pytest.mark.parametrize("kernel", [(2,), (4, 3), (2, 1, 4)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_same_padding_is_that_of_torch(kernel, dilation):
    torch.manual_seed(0)
    weight = torch.randn(2, 3, *kernel, dtype=torch.float64)
    x = torch.randn(2, 3, *(9,) * len(kernel), dtype=torch.float64)
    geometry = conv_geometry(kernel, padding="same", dilation=dilation)
    expected = CONV[len(kernel)](x, weight, padding="same", dilation=dilation)
    torch.testing.assert_close(conv_apply(weight, x, geometry), expected)
    y = torch.randn_like(expected)
    torch.testing.assert_close((conv_adjoint(weight, y, x.shape[2:], geometry) * x).sum(), (y * expected).sum())


def test_conv_geometry_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="`stride` must be an integer or have 2 entries"):
        conv_geometry((3, 3), stride=(1,))
    with pytest.raises(ValueError, match="`padding` must have 2 entries"):
        conv_geometry((3, 3), padding=(1, 1, 1))
    with pytest.raises(ValueError, match="`padding` must be 'same', 'valid'"):
        conv_geometry((3, 3), padding="full")
