"""Operators of layers: references against the layers on the CPU, kernels against references, both derivatives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lcnn.functional import centered_softplus, recompute_activations
from lightning_lcnn.kernels import layer_operators as operators
from lightning_lcnn.kernels.normalized_convolution import SharedGradient
from lightning_lcnn.layers import LipschitzBatchNorm2d, SpectralLinear
from lightning_lcnn.models import resnet18

kernels = pytest.importorskip("lightning_lcnn.kernels.triton_layers", exc_type=ImportError)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# twice the rounding of a result, or of sums of a few thousand values; the polynomials of float32 err by 2e-7
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
}


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------- activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [1e-3, 1.0, 10.0, 1e3])
def test_softplus_kernels(beta: float, dtype: torch.dtype) -> None:
    x, grad = numbers(5003, dtype=dtype) * 3, numbers(5003, dtype=dtype)
    x[:3] = torch.tensor([0.0, 1e-6, -1e-6])
    log_beta = torch.tensor([beta], dtype=torch.promote_types(dtype, torch.float32)).log()
    exact = centered_softplus(x.double(), log_beta.double().exp())
    value = torch.empty_like(x)
    kernels.softplus(x, log_beta, value)
    torch.testing.assert_close(value.double(), exact, **CLOSE[dtype])
    for from_output in (False, True) if dtype != torch.bfloat16 else (False,):
        kept = exact.to(dtype) if from_output else x
        wanted = operators._softplus_gradient_reference(grad.double(), (exact if from_output else x.double()),
                                                        log_beta.double(), from_output, True)  # fmt: skip
        found, parts = kernels.softplus_gradient(grad, kept, log_beta, from_output, True)
        slack = {"rtol": CLOSE[dtype]["rtol"], "atol": max(CLOSE[dtype]["atol"], 1e-6 * (dtype != torch.float64))}
        torch.testing.assert_close(found.double(), wanted[0], **slack)
        scale = (grad.double().abs() * (exact - exact.min())).sum()  # of what is summed
        assert (parts.sum() - wanted[1]).abs() <= CLOSE[dtype]["rtol"] * scale
        assert kernels.softplus_gradient(grad, kept, log_beta, from_output, False)[1].numel() == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_both_derivatives_of_the_softplus(inplace: bool) -> None:
    x, log_beta = numbers(3, 4).requires_grad_(), torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, log_beta: Tensor) -> Tensor:
        return operators.softplus_of_log(x * 1.0, log_beta, inplace)

    torch.testing.assert_close(function(x, log_beta), centered_softplus(x, log_beta.exp()))
    assert torch.autograd.gradcheck(function, (x, log_beta))
    assert torch.autograd.gradgradcheck(function, (x, log_beta))


# --------------------------------------------------------------------------- batch norm

SHAPES = [(3, 5, 4, 6), (7, 5), (4, 33, 2, 2), (2, 3, 41, 40), (5, 4, 7)]


def norm_arguments(shape: tuple[int, ...], dtype: torch.dtype, gamma: float | None, affine: bool, last: bool) -> Any:
    channels, wide = shape[1], torch.promote_types(dtype, torch.float32)
    x = (
        numbers(*shape) * 2 + torch.linspace(-3, 30, channels, dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    ).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = (numbers(channels, dtype=wide), numbers(channels, dtype=wide)) if affine else (None, None)
    log_gamma = None if gamma is None else torch.tensor([gamma], dtype=wide).log()
    return x, weight, bias, log_gamma


def statistics(like: Tensor, channels: int) -> list[Tensor]:
    wide = torch.promote_types(like.dtype, torch.float32)
    return [torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide), torch.tensor(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gamma", "affine"), [(0.2, True), (50.0, True), (None, True), (0.2, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_kernels(shape: tuple[int, ...], gamma: float | None, affine: bool, dtype: torch.dtype) -> None:
    for last in (False, True)[: 1 + (len(shape) == 4)]:
        arguments = norm_arguments(shape, dtype, gamma, affine, last)
        x = arguments[0]
        exact = [None if t is None else t.double() for t in arguments]
        wanted_state, state = statistics(x.double(), shape[1]), statistics(x, shape[1])
        wanted = operators._norm_reference(*exact, *wanted_state, 0.1, 1e-5)
        found = kernels.normalize(*arguments, *state, 0.1, 1e-5)
        close = dict(CLOSE[dtype], atol=max(CLOSE[dtype]["atol"], 2e-5 * (dtype == torch.float32)))
        torch.testing.assert_close([t.double() for t in found], list(wanted), **close)
        running = dict(close, rtol=max(close["rtol"], 1e-7))  # a kernel's arguments are numbers of float32
        torch.testing.assert_close([t.double() for t in state], [t.double() for t in wanted_state], **running)
        assert found[0].stride() == x.stride()
        grad = torch.empty_like(x).copy_(numbers(*shape))
        kept = [t.to(torch.promote_types(dtype, torch.float32)) for t in wanted[1:]]
        wanted = operators._norm_gradient_reference(grad.double(), *exact, *wanted[1:], True)
        found = kernels.normalize_gradient(grad, *arguments, *kept, True)
        scale = max(1.0, *(float(t.abs().max()) for t in wanted if t.numel()))
        slack = {"rtol": close["rtol"], "atol": close["atol"] * scale * (5 if dtype == torch.float32 else 1)}
        torch.testing.assert_close([t.double() for t in found], [t.double() for t in wanted], **slack)
        assert kernels.normalize_gradient(grad, *arguments, *kept, False)[0].numel() == 0


def test_equal_slopes_share_the_gradient_of_the_weight() -> None:
    x = torch.tensor([[-1.0, -1.0, -0.5], [1.0, 1.0, 0.5]], dtype=torch.float64)
    weight, log_gamma = torch.tensor([2.0, -2.0, 0.1]).double(), torch.tensor([-1.0]).double()
    _, *kept = operators._norm_reference(x, weight, None, log_gamma, None, None, None, 0.0, 0.0)
    arguments = numbers(2, 3), x, weight, None, log_gamma, *kept, True
    found = kernels.normalize_gradient(*arguments)
    torch.testing.assert_close(found[1], operators._norm_gradient_reference(*arguments)[1])


@pytest.mark.parametrize(("gamma", "affine"), [(0.2, True), (50.0, True), (None, True), (0.2, False)])
def test_both_derivatives_of_the_norm(gamma: float | None, affine: bool) -> None:
    arguments = norm_arguments((4, 3, 2), torch.float64, gamma, affine, last=False)
    given = [t.requires_grad_() for t in arguments if t is not None]

    def function(*given: Tensor) -> Tensor:
        left = iter(given)
        full = [None if t is None else next(left) for t in arguments]
        return operators.clipped_norm(*full, (None, None, None), 0.1, 1e-5)

    # the clip takes the variance as a constant, so x is checked where nothing is clipped
    if gamma == 0.2:
        fixed = given[0].detach()
        assert torch.autograd.gradcheck(lambda *g: function(fixed, *g), given[1:])
        return
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


# --------------------------------------------------------------------------- normalised weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("size", "sign"), [((5, 7), 1), ((8, 4, 3, 3), -1), ((40, 1000), 1)])
def test_weight_kernels(size: tuple[int, ...], sign: int, gain: bool, dtype: torch.dtype) -> None:
    weight = numbers(*size, dtype=dtype)
    gradient = (sign * weight + 0.1 * numbers(*size, dtype=dtype)) / weight.norm()
    log_gamma = torch.tensor([0.3], dtype=dtype) if gain else None
    exact = [None if t is None else t.double() for t in (weight, gradient, log_gamma)]
    wanted = operators._scale_reference(*exact, torch.float64)
    found = kernels.scale_weight(weight, gradient, log_gamma, dtype)
    torch.testing.assert_close([t.double() for t in found], list(wanted), **CLOSE[dtype])
    grad = numbers(*size, dtype=dtype)
    wanted = operators._scale_gradient_reference(grad.double(), *exact, wanted[1])
    found = kernels.scale_weight_gradient(grad, weight, gradient, log_gamma, found[1])
    torch.testing.assert_close([t.double() for t in found], list(wanted), **CLOSE[dtype])


@pytest.mark.parametrize("gain", [False, True])
def test_both_derivatives_of_the_weight(gain: bool) -> None:
    weight = numbers(3, 4).requires_grad_()
    reader = SharedGradient().lend(numbers(3, 4) * 0.1 + weight.detach())
    log_gamma = torch.tensor([0.3], dtype=torch.float64, requires_grad=True) if gain else None
    given = [weight, log_gamma] if gain else [weight]

    def function(weight: Tensor, log_gamma: Tensor | None = None) -> Tensor:
        return operators.scale_weight(weight, reader, log_gamma, torch.float64)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


# --------------------------------------------------------------------------- whole networks


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take their operators, whose references run on the CPU."""
    monkeypatch.setattr(operators, "runs_operators", lambda device: True)


def step(network: torch.nn.Module, x: Tensor, recompute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    with recompute_activations(recompute):
        loss = F.cross_entropy(network(x), torch.arange(len(x)) % 3)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    names = [name for name, _ in network.named_parameters()]
    return loss, dict(zip(names, gradients, strict=True)) | dict(network.named_buffers())


@pytest.mark.parametrize("channels_last", [False, True])
def test_training_step_equals_that_of_the_cpu(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = resnet18(3, 4, low_curvature=True, gamma=1.5, input_size=(8, 8)).double()
    x = numbers(6, 3, 8, 8)
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    twin, again = copy.deepcopy(network), copy.deepcopy(network)
    loss, expected = step(network, x)
    monkeypatch.setattr(operators, "runs_operators", lambda device: True)
    found_loss, found = step(twin, x)
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert step(again, x, recompute=True)[1].keys() == found.keys()
    torch.testing.assert_close(step(copy.deepcopy(twin), x, recompute=True)[1], step(twin, x)[1], rtol=0, atol=0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradient_penalty_has_the_gradient_of_differences() -> None:
    network = torch.nn.Sequential(SpectralLinear(4, 5, gamma=2.0), LipschitzBatchNorm2d(5, gamma=30.0)).double()
    x = numbers(6, 4).requires_grad_()

    def function(*values: Tensor) -> Tensor:
        state = dict(zip([n for n, _ in network.named_parameters()], values, strict=True))
        hidden = F.linear(x, operators.scale_weight(state["0.weight"], reader, state["0.log_gamma"], x.dtype))
        y = operators.clipped_norm(
            hidden, state["1.weight"], state["1.bias"], state["1.log_gamma"], (None,) * 3, 0.1, 1e-5
        )
        y = operators.softplus_of_log(y, torch.zeros(1, dtype=x.dtype), inplace=True)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return gradient.square().sum()

    layer = network[0]
    assert isinstance(layer, SpectralLinear)
    reader = SharedGradient().lend(layer.spectral_gradient)
    values = list(network.parameters())
    del values[[n for n, _ in network.named_parameters()].index("0.bias")]
    names = [n for n, _ in network.named_parameters() if n != "0.bias"]

    def checked(*values: Tensor) -> Tensor:
        return function(*[dict(zip(names, values, strict=True)).get(n, x) for n, _ in network.named_parameters()])

    assert torch.autograd.gradcheck(checked, values)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_layouts_that_are_not_dense() -> None:
    x, log_beta, zero = numbers(4, 3, 6, 5)[..., ::2], torch.zeros(1, dtype=torch.float64), (None,) * 3
    torch.testing.assert_close(operators.softplus_of_log(x, log_beta, True), centered_softplus(x, log_beta.exp()))
    torch.testing.assert_close(
        operators.clipped_norm(x, None, None, None, zero, 0.1, 1e-5), F.batch_norm(x, None, None, training=True)
    )
    weight = numbers(6, 4).T.requires_grad_()
    reader = SharedGradient().lend(weight.detach().contiguous() / weight.detach().square().sum())
    value = operators.scale_weight(weight, reader, None, x.dtype)
    torch.testing.assert_close(value, weight)
    (gradient,) = torch.autograd.grad(value.square().sum(), weight)
    torch.testing.assert_close(
        (gradient * weight).sum(), gradient.new_zeros(()), rtol=0, atol=1e-9
    )  # σ takes out the scale


def test_autocast_keeps_the_types_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = resnet18(3, 4, low_curvature=True, input_size=(8, 8)), numbers(8, 3, 8, 8, dtype=torch.float32)
    twin = copy.deepcopy(network)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = step(network, x)
        monkeypatch.setattr(operators, "runs_operators", lambda device: True)
        found_loss, found = step(twin, x)
        hidden = twin.act(twin.bn1(twin.conv1(x)))
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(found_loss, loss, rtol=2e-2, atol=2e-2)  # bfloat16
    assert all(found[name].dtype == value.dtype for name, value in expected.items())
    large = [
        name for name, value in expected.items() if value.is_floating_point() and value.ndim == 4 and "weight" in name
    ]
    for name in large:
        assert F.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0) > 0.95, name


@pytest.mark.usefixtures("as_on_a_gpu")
def test_refresh_between_forward_and_backward() -> None:
    layer, x = SpectralLinear(4, 3).double(), numbers(2, 4)
    value = layer(x).square().sum()
    expected = torch.autograd.grad(value, layer.weight, retain_graph=True)[0]
    with torch.no_grad():
        layer.update_spectral_norm(1)
    torch.testing.assert_close(torch.autograd.grad(value, layer.weight)[0], expected)


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    x, weight, bias, log_gamma = norm_arguments((3, 4, 2, 2), torch.float32, 0.2, True, False)
    log_beta, state = torch.zeros(1), statistics(x, 4)
    kept = operators._norm_reference(x, weight, bias, log_gamma, None, None, None, 0.0, 1e-5)[1:]
    matrix = torch.randn(4, 3)
    return {
        "centered_softplus": (x, log_beta),
        "centered_softplus_": (x.clone(), log_beta),
        "clipped_norm": (x, weight, bias, log_gamma, *state, 0.1, 1e-5),
        "clipped_norm_gradient": (x, x, weight, bias, log_gamma, *kept, True),
        "scale_weight": (matrix, matrix, log_gamma, torch.bfloat16),
        "scale_weight_gradient": (matrix, matrix, matrix, log_gamma, torch.ones(2)),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_schema_and_outputs_without_data(name: str) -> None:
    operator = getattr(torch.ops.lightning_lcnn, name).default
    torch.library.opcheck(operator, operator_arguments()[name], test_utils=("test_schema", "test_faketensor"))
