"""Centered softplus: float64 closed form, mpmath-free; accuracy, derivatives, all execution paths."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from lightning_lcnn.functional import centered_softplus
from lightning_lcnn.kernels.fused_softplus import composite
from lightning_lcnn.layers import CenteredSoftplus

BETAS = [1e-6, 1e-4, 1e-2, 0.1, 1.0, 3.0, 10.0, 1e2, 1e3, 1e4]


def grid() -> Tensor:
    magnitudes = torch.cat([torch.logspace(-8, 4, 1201), torch.linspace(0, 2, 801)])
    return torch.cat([magnitudes, -magnitudes])


def derivatives(function, x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x, beta)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return value.detach(), first.detach(), second


def exact(x: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Closed forms in float64; log1p(expm1(-|z|)/2) loses no digits anywhere."""
    x, beta = x.double(), beta.double()
    z = beta * x
    value = x.clamp(min=0) + torch.log1p(torch.expm1(-z.abs()) / 2) / beta
    return value, torch.sigmoid(z), beta * torch.sigmoid(z) * torch.sigmoid(-z)


@pytest.mark.parametrize("function", [centered_softplus, composite], ids=["fused", "composite"])
@pytest.mark.parametrize("beta", BETAS)
def test_float32_is_accurate_in_value_and_both_derivatives(function, beta: float) -> None:
    # 5e-6: rounding of z = βx alone moves σ(z) by |z| eps, 5e-6 at the |z| = 80 where float32 still has normal numbers
    beta_tensor = torch.tensor(beta)
    for got, expected in zip(derivatives(function, grid(), beta_tensor), exact(grid(), beta_tensor), strict=True):
        assert torch.isfinite(got).all()
        normal = expected.abs() > 1e-30
        error = (got.double() - expected).abs() / expected.abs()
        assert error[normal].max() < 5e-6


def test_limits_and_values_at_zero() -> None:
    x = torch.linspace(-4, 4, 81, dtype=torch.float64)
    torch.testing.assert_close(centered_softplus(x, 1e-6), x / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(centered_softplus(x, 1e6), x.relu(), rtol=0, atol=1e-6)
    for beta in BETAS:
        value, first, second = derivatives(centered_softplus, torch.zeros(3), torch.tensor(beta))
        assert value.eq(0).all()
        assert first.eq(0.5).all()
        torch.testing.assert_close(second, torch.full((3,), beta / 4))


@pytest.mark.parametrize("shape", [(), (4,), (3, 1)])
def test_gradients_of_input_and_beta(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    beta = (torch.rand(shape, dtype=torch.float64) * 3 + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(centered_softplus, (x, beta))
    assert torch.autograd.gradgradcheck(centered_softplus, (x, beta))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_beta_gradient_does_not_depend_on_the_memory_format(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 5).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(2, 3, 5, 5)  # contiguous in both cases
    beta = torch.tensor(3.0, requires_grad=True)
    value = centered_softplus(x, beta)
    assert value.is_contiguous(memory_format=memory_format)
    got = torch.autograd.grad(value, [x, beta], upstream)
    beta64, x64 = beta.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    expected = torch.autograd.grad(composite(x64, beta64), [x64, beta64], upstream.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_the_rounded_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype).requires_grad_()
    value = centered_softplus(x, 7.0)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    reference = x.detach().float()
    assert value.dtype == gradient.dtype == dtype
    torch.testing.assert_close(value, centered_softplus(reference, 7.0).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.sigmoid(7.0 * reference).to(dtype), rtol=0, atol=0)


def test_func_transforms_and_forward_mode_agree_with_the_closed_form() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    beta = torch.tensor(4.0, dtype=torch.float64)
    _, first, second = exact(x, beta)
    scalar = lambda v: centered_softplus(v, beta)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(scalar))(x), first)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(torch.func.grad(scalar)))(x), second)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(centered_softplus(dual, beta)).tangent
    torch.testing.assert_close(tangent, first)


def test_compiles_without_graph_breaks() -> None:
    layer = CenteredSoftplus(beta=5.0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(compiled(x), layer(x))


def test_eager_saves_one_tensor_beside_its_output() -> None:
    saved: list[Tensor] = []
    x = torch.randn(8, requires_grad=True)
    beta = torch.tensor(2.0, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = centered_softplus(x, beta)
    storages = {t.data_ptr() for t in saved if t.numel() == 8}
    assert storages == {x.data_ptr(), value.data_ptr()}


def in_place(x: Tensor, beta: Tensor) -> Tensor:
    return centered_softplus(x.clone(), beta, inplace=True)


@pytest.mark.parametrize("beta", [b for b in BETAS if b >= 1])
def test_in_place_is_accurate_absolutely(beta: float) -> None:
    # log 2 is rounded at 6e-8, σ = 1 - e^(-βs)/2 inherits twice that and the rounding of βs (large s: 1 - σ vanishes)
    x, beta_tensor = grid(), torch.tensor(beta)
    tolerances = (2e-7 / beta, 5e-7, 5e-7 * beta)
    results = zip(derivatives(in_place, x, beta_tensor), exact(x, beta_tensor), tolerances, strict=True)
    for got, expected, tolerance in results:
        assert torch.isfinite(got).all()
        assert ((got.double() - expected).abs() <= tolerance + 2e-7 * expected.abs()).all()


@pytest.mark.parametrize("beta", [1.0, 10.0, 100.0])
def test_in_place_beta_gradient(beta: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    got, expected = (torch.tensor(beta, dtype=d).requires_grad_() for d in (torch.float32, torch.float64))
    in_place(x.requires_grad_(), got).backward(upstream)
    composite(x.detach().double(), expected).backward(upstream.double())
    # each term of the sum is below log(2)/β² and rounded at 1e-6 of it, random signs
    torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-5 / beta**2)
    assert torch.isfinite(x.grad).all()


def test_in_place_gradients_of_both_orders() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    beta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(in_place, (x, beta))
    assert torch.autograd.gradgradcheck(in_place, (x, beta))


def test_in_place_overwrites_its_input_and_saves_nothing_else() -> None:
    saved: list[Tensor] = []
    source = torch.randn(8, requires_grad=True)
    x = source * 2
    expected = CenteredSoftplus(3.0)(x).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = CenteredSoftplus(3.0, inplace=True)(x)
    assert value.data_ptr() == x.data_ptr() == next(t for t in saved if t.numel() == 8).data_ptr()
    assert sum(t.numel() == 8 for t in saved) == 1
    torch.testing.assert_close(value, expected)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        centered_softplus(torch.zeros(2, requires_grad=True), 3.0, inplace=True)


@pytest.mark.parametrize(
    ("x", "beta"),
    [
        (torch.randn(4), 0.5),
        (torch.randn(4).bfloat16(), 5.0),
        (torch.randn(2, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])),
    ],
    ids=["small beta", "bfloat16", "per channel"],
)
def test_in_place_leaves_the_input_alone_where_it_would_lose_accuracy(x: Tensor, beta: float | Tensor) -> None:
    before = x.clone()
    torch.testing.assert_close(
        centered_softplus(x, beta, inplace=True), centered_softplus(before, beta), rtol=0, atol=0
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"beta": 0.0}, ValueError, "`beta` must be a finite number > 0, got 0.0"),
        ({"beta": float("nan")}, ValueError, "`beta` must be a finite number > 0"),
        ({"beta": "5"}, TypeError, "`beta` must be a number > 0, got '5' of type str"),
        ({"num_channels": 0}, ValueError, "`num_channels` must be at least 1"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CenteredSoftplus(**kwargs)


def test_bad_inputs() -> None:
    with pytest.raises(TypeError, match="`x` must be a floating-point tensor, got torch"):
        centered_softplus(torch.arange(3), 1.0)
    with pytest.raises(ValueError, match="must have 3 channels in dimension 1"):
        CenteredSoftplus(num_channels=3)(torch.zeros(2, 4))


def test_layer_per_channel_and_fixed() -> None:
    layer = CenteredSoftplus(num_channels=3)
    with torch.no_grad():
        layer.log_beta.copy_(torch.tensor([1.0, 4.0, 9.0]).log())
    x = torch.randn(2, 3, 4, 4)
    for channel, beta in enumerate([1.0, 4.0, 9.0]):
        torch.testing.assert_close(layer(x)[:, channel], centered_softplus(x[:, channel], beta))
    fixed = CenteredSoftplus(beta=2.0, learnable=False)
    assert not list(fixed.parameters())
    assert "log_beta" in fixed.state_dict()


def test_layer_contract() -> None:
    layers = [CenteredSoftplus(), CenteredSoftplus(num_channels=3), CenteredSoftplus(learnable=False)]
    for layer in (*layers, CenteredSoftplus(inplace=True)):
        x = torch.randn(2, 3)
        expected = layer(x.clone())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x.clone()), expected)
        fresh = CenteredSoftplus(1.0, layer.learnable, layer.num_channels, layer.inplace)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x.clone()), expected)
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
