"""Input gradients, Hessians and curvature against dense derivatives in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_lcnn.functional import (
    HessianOperator,
    input_gradient_norm,
    input_hessian_norm,
    input_hessian_norm_probabilistic_bound,
    logit_margin,
    normalized_curvature,
    per_example_loss,
    target_logit,
)

OUTPUTS = {"margin": logit_margin, "loss": None, "logit": target_logit}


def dense_hessians(model, x, target, output):
    """Hessians (B, n, n) row by row with plain autograd, with torch's own cross-entropy for the loss."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    if output == "loss":
        value = F.cross_entropy(logits, target, reduction="sum")
    else:
        value = OUTPUTS[output](logits, target).sum()
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    columns = gradient.flatten(1).sum(0)
    rows = [torch.autograd.grad(column, leaf, retain_graph=True)[0].flatten(1) for column in columns]
    return torch.stack(rows, 1)


class Smooth(nn.Module):
    """Softplus of sharpness 8."""

    def forward(self, x):
        return torch.logaddexp(8 * x, torch.zeros_like(x)) / 8


@pytest.fixture(scope="module")
def digits():
    """Digits as 16 x 16 images, 256 unknowns."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(x, scale_factor=2, mode="bilinear"), torch.tensor(labels)


@pytest.fixture(scope="module")
def trained(digits):
    """A convolutional network with batch norm, trained to about 95 %."""
    x, y = digits
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(1, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), Smooth()),
            *(nn.Conv2d(12, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), Smooth()),
            *(nn.Conv2d(24, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), Smooth()),
            *(nn.Flatten(), nn.Linear(24 * 16, 10)),
        )
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for _ in range(3):
            for rows in torch.randperm(1500).split(64):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def spectra(trained, digits):
    """Eigenvalues (80, 256) of the dense Hessians of 80 test digits for two outputs."""
    x, y = digits[0][1500:1580].double(), digits[1][1500:1580]
    model = copy.deepcopy(trained).double()
    return {output: torch.linalg.eigvalsh(dense_hessians(model, x, y, output)) for output in ("margin", "loss")}


@pytest.mark.parametrize("output", ["margin", "loss"])
def test_within_one_percent_at_20_products_on_a_trained_network(trained, digits, spectra, output):
    x, y, truth = digits[0][1500:1580], digits[1][1500:1580], spectra[output]
    norm = truth.abs().amax(1)
    result = input_hessian_norm(trained, x, y, output, num_hvps=20)
    error = (result.values.double() - norm).abs() / norm
    assert torch.quantile(error, 0.99) <= 0.01
    assert result.converged.double().mean() >= 0.95
    # both ends, relative to the norm
    assert torch.quantile((result.largest.double() - truth[:, -1]).abs() / norm, 0.9) <= 0.02
    assert torch.quantile((result.smallest.double() - truth[:, 0]).abs() / norm, 0.9) <= 0.02
    if output == "margin":  # the loss of a confident network is nearly of rank one, easy for power iteration too
        power = input_hessian_norm(trained, x, y, output, method="power_iteration", num_hvps=20)
        assert torch.quantile((power.values.double() - norm).abs() / norm, 0.95) > 10 * torch.quantile(error, 0.95)
    # curvature and gradient norm
    gradient = input_gradient_norm(trained, x, y, output)
    curvature = normalized_curvature(trained, x, y, output)
    torch.testing.assert_close(curvature.gradient_norm, gradient.values, rtol=1e-5, atol=0)
    # float32 rounding of two runs
    torch.testing.assert_close(curvature.values, result.values / gradient.values, rtol=1e-5, atol=0)


def test_gradient_norm_against_autograd(trained, digits):
    x, y = digits[0][:20].double(), digits[1][:20]
    leaf = x.clone().requires_grad_()
    model = copy.deepcopy(trained).double()
    F.cross_entropy(model(leaf), y, reduction="sum").backward()
    values = input_gradient_norm(model, x, y, "loss").values
    torch.testing.assert_close(values, leaf.grad.flatten(1).norm(dim=1), rtol=1e-10, atol=0)


def test_three_kinds_of_products_agree_with_the_dense_hessian(trained, digits):
    x, y = digits[0][:4].double(), digits[1][:4]
    model = copy.deepcopy(trained).double()
    dense = dense_hessians(model, x, y, "margin")
    v = torch.randn(4, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("bij,bj->bi", dense, v).view_as(x)

    def function(x):
        return logit_margin(model(x), y)

    for mode, tolerance in (("double_backward", 1e-10), ("forward_over_reverse", 1e-10), ("finite_difference", 1e-6)):
        product = HessianOperator(function, x, mode)(v.view_as(x))
        error = (product - expected).norm() / expected.norm()
        assert error <= tolerance, mode
    by_mode = [
        input_hessian_norm(model, x, y, hvp=mode).values
        for mode in ("double_backward", "forward_over_reverse", "finite_difference")
    ]
    torch.testing.assert_close(by_mode[0], by_mode[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(by_mode[0], by_mode[2], rtol=1e-5, atol=0)
    difference = input_hessian_norm(trained, x.float(), y, hvp="finite_difference").values
    # h = 5e-3: the two errors of central differences in float32 are near 1e-3 on this network
    torch.testing.assert_close(difference.double(), by_mode[0], rtol=2e-2, atol=0)


SMOOTH_NETWORKS = {
    "1d": ((3, 9), lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, groups=1), nn.BatchNorm1d),
    "2d": ((4, 5, 6), lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), nn.BatchNorm2d),
    "2d same": ((2, 5, 4), lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2), nn.BatchNorm2d),
    "2d circular": ((2, 5, 4), lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d),
    "2d transposed": ((2, 4, 4), lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), nn.BatchNorm2d),
    "3d": ((2, 4, 3, 3), lambda: nn.Conv3d(2, 3, 2, stride=1, padding=1, dilation=2), nn.BatchNorm3d),
    "3d plain": ((2, 4, 3, 3), lambda: nn.Conv3d(2, 3, 2, bias=False), lambda n: nn.BatchNorm3d(n, affine=False)),
    "instance": ((2, 4, 4), lambda: nn.Conv2d(2, 3, 3), nn.InstanceNorm2d),
    "group": ((2, 4, 4), lambda: nn.Conv2d(2, 4, 3), lambda n: nn.GroupNorm(2, n)),
}


@pytest.mark.parametrize("name", SMOOTH_NETWORKS)
def test_products_through_all_kinds_of_convolutions_and_norms(name):
    """The graph for double backward is rebuilt from cheaper pieces; the truth's is not."""
    shape, convolution, norm = SMOOTH_NETWORKS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first = convolution()
        model = nn.Sequential(first, norm(first.out_channels), Smooth(), nn.Flatten(), nn.LazyLinear(3)).double()
        x, y = torch.randn(3, *shape).double(), torch.tensor([0, 1, 2])
        model(x)  # running statistics that are not 0 and 1, and the lazy layer's size
    model.eval()
    dense = dense_hessians(model, x, y, "loss")
    v = torch.randn(3, dense.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for constant in (True, False):  # weights that need a gradient take torch's own path
        for parameter in model.parameters():
            parameter.requires_grad_(not constant)
        product = HessianOperator(lambda x: per_example_loss(model(x), y), x)(v.view_as(x))
        torch.testing.assert_close(product.flatten(1), torch.einsum("bij,bj->bi", dense, v), rtol=1e-9, atol=1e-12)
    truth = torch.linalg.eigvalsh(dense).abs().amax(1)
    torch.testing.assert_close(input_hessian_norm(model, x, y, "loss", num_hvps=40).values, truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(10))
def test_saddle_is_exact_for_every_seed(seed):
    def saddle(x):  # margin (x_0² - x_1²) / 2
        return x**2 / 2

    for method in ("lanczos", "power_iteration"):
        result = input_hessian_norm(saddle, torch.tensor([[0.3, 0.7]]), torch.tensor([0]), method=method, seed=seed)
        assert abs(result.values.item() - 1) <= 4e-7  # float32 rounding


def test_linear_models_have_no_margin_curvature_and_the_closed_form_of_the_loss():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double()
    x, y = torch.randn(6, 3, 2, 2).double(), torch.randint(0, 5, (6,))
    for output in ("margin", "logit"):
        result = normalized_curvature(model, x, y, output)
        assert result.values.tolist() == [0] * 6
        assert result.hessian.values.tolist() == [0] * 6
        assert result.hessian.converged.all()
    weight, p = model[1].weight, model(x).softmax(1)
    closed = weight.T @ (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) @ weight
    result = input_hessian_norm(model, x, y, "loss")
    torch.testing.assert_close(result.values, torch.linalg.eigvalsh(closed)[:, -1].detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("margin", [5.0, 18.4, 40.0, 80.0])
@pytest.mark.parametrize("right", [True, False])
def test_confident_float32_examples_keep_their_derivatives(margin, right):
    """1 - p from 7e-3 to 2e-35; at 18.4 it is 1e-8 and log-softmax gives 0 in float32."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 6, generator=generator))
        x = torch.randn(1, 6, generator=generator)
        model.bias.copy_(torch.tensor([margin, 0.0, -1.0]) - model.weight @ x[0])
    y = torch.tensor([0 if right else 1])
    exact = nn.Linear(6, 3).double()
    exact.load_state_dict(model.state_dict())
    z = exact(x.double())
    small = (z - z[:, :1]).exp()[0]  # relative to the largest logit, no cancellation
    p = small / small.sum()
    onehot = F.one_hot(y[0], 3)
    residual = p - onehot
    residual[0] = (small[1:].sum() / small.sum()) * (-1 if right else 1) if right else p[0]
    weight = exact.weight.detach()
    gradient = (weight.T @ residual.detach()).norm()
    # Σ_{j<k} p_j p_k (e_j - e_k)(e_j - e_k)ᵀ: sums of positive terms
    hessian = sum(
        (p[j] * p[k]).detach() * torch.outer(weight[j] - weight[k], weight[j] - weight[k])
        for j in range(3)
        for k in range(j)
    )
    result = normalized_curvature(model, x, y, "loss")
    # float32 logits of size 80 are exact to 4e-6, which is the relative error of their exponentials
    assert result.gradient_norm.item() == pytest.approx(gradient.item(), rel=1e-4)
    assert result.hessian.values.item() == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-4)


def test_loss_agrees_with_torch_and_has_both_derivatives():
    z = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 7, (50,))
    torch.testing.assert_close(per_example_loss(z, y), F.cross_entropy(z, y, reduction="none"))
    assert torch.autograd.gradcheck(lambda z: per_example_loss(z, y), z)
    assert torch.autograd.gradgradcheck(lambda z: per_example_loss(z, y), z)


def test_underflow_of_the_loss_is_said():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.copy_(torch.eye(2) * 100)
    with pytest.warns(UserWarning, match="margin above 87.*use output='margin', or model.double"):
        input_gradient_norm(model, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), "loss")
    double = input_gradient_norm(model.double(), torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]), "loss")
    assert double.values.item() == pytest.approx(100 * 2**0.5 * torch.tensor(-100.0).double().exp().item())


def test_rescaled_logits_leave_the_margins_curvature(trained, digits):
    x, y = digits[0][:8], digits[1][:8]
    plain = normalized_curvature(trained, x, y).values
    scaled = normalized_curvature(lambda x: 7.5 * trained(x), x, y).values
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=0)  # float32, 20 products
    losses = [normalized_curvature(lambda x, c=c: c * trained(x), x, y, "loss").values.mean() for c in (1.0, 7.5)]
    assert losses[1] > 2 * losses[0]


def test_chunks_shards_and_callables_do_not_change_values(trained, digits):
    x, y = digits[0][:7], digits[1][:7]
    whole = normalized_curvature(trained, x, y)
    chunked = normalized_curvature(trained, x, y, batch_size=3)
    torch.testing.assert_close(chunked.values, whole.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(chunked.hessian.smallest, whole.hessian.smallest, rtol=1e-4, atol=1e-5)
    assert chunked.hessian.num_hvps == 20
    own = normalized_curvature(trained, x, y, lambda logits, target: logit_margin(logits, target))
    torch.testing.assert_close(own.values, whole.values)
    free = input_gradient_norm(trained, x, torch.zeros(7, 3), lambda logits, target: logits.sum(1) + target.sum(1))
    assert free.values.shape == (7,)


def test_probabilistic_bound_lies_above_the_truth(trained, digits, spectra):
    x, y = digits[0][1500:1580], digits[1][1500:1580]
    truth = spectra["margin"].abs().amax(1)
    result = input_hessian_norm_probabilistic_bound(trained, x, y, failure_probability=1e-3, num_hvps=30)
    assert (result.values >= truth).all()
    assert (result.estimate <= truth * (1 + 1e-5)).all()
    assert (result.values <= 1.3 * truth).all()
    few = input_hessian_norm_probabilistic_bound(trained, x, y, num_hvps=2)
    assert few.values.isinf().all()


def test_bfloat16_models_are_measured_with_float32_vectors(trained, digits):
    x, y = digits[0][:8], digits[1][:8]
    low = copy.deepcopy(trained).bfloat16()
    exact = normalized_curvature(trained, x, y)
    rough = normalized_curvature(low, x.bfloat16(), y)
    assert rough.values.dtype == torch.float32
    torch.testing.assert_close(rough.gradient_norm, exact.gradient_norm, rtol=0.2, atol=0)  # 8 bits of mantissa
    with torch.autocast("cpu", torch.bfloat16):  # mixed precision is switched off while measuring
        mixed = normalized_curvature(trained, x, y)
    torch.testing.assert_close(mixed.values, exact.values)


def test_low_curvature_networks_take_the_cheap_graph():
    """Products through torch's own double backward of a convolution cost twice as much."""
    from lightning_lcnn.functional.hessian_operator import graph_nodes
    from lightning_lcnn.models import resnet18

    model = resnet18(width=2, low_curvature=True, input_size=(8, 8)).eval().requires_grad_(False)
    operator = HessianOperator(lambda x: model(x)[:, 0], torch.rand(1, 3, 8, 8))
    names = {node.name() for node in graph_nodes(operator._graph_gradient)}
    assert "_ConvolutionBackward" in names
    assert not any("BatchNorm" in name or name.startswith(("ConvolutionBackward", "_Normalized")) for name in names)
