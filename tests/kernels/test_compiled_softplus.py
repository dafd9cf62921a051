"""Formulas for compilers and the compiled kernels: closed form in float64, layouts, second derivatives, switching."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_lcnn import fold
from lightning_lcnn.functional import centered_softplus, compiled_softplus_in_use, use_compiled_softplus
from lightning_lcnn.kernels import compiled_softplus
from lightning_lcnn.kernels import softplus_formulas as formulas
from lightning_lcnn.layers import CenteredSoftplus
from lightning_lcnn.models import resnet18

BETAS = [1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3, 1e4]


def exact(x: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Value, slope and derivative in β, in float64; the last is (log 2 - binary entropy of σ) / β²."""
    z = x.double() * beta
    value = x.double().clamp(min=0) + torch.log1p(torch.expm1(-z.abs()) / 2) / beta
    small = torch.sigmoid(-z.abs())
    entropy = -small * torch.log(small) - (1 - small) * torch.log1p(-small)
    series = z.square() / 8 - z.pow(4) / 64  # next term z^6 / 576: 1e-14 relative to the first at 1e-3
    of_beta = torch.where(z.abs() < 1e-3, series, torch.log(torch.tensor(2.0).double()) - entropy.nan_to_num(0.0))
    return value, torch.sigmoid(z), of_beta / beta**2


def grid(beta: float) -> Tensor:
    """Values from far inside the bend to far outside."""
    magnitudes = torch.logspace(-6, 2, 400, dtype=torch.float64) / beta
    return torch.cat([magnitudes, -magnitudes]).float()


@pytest.mark.parametrize("beta", BETAS)
def test_formula_of_the_value_is_accurate_relative_to_its_size(beta: float) -> None:
    x = grid(beta)
    got = formulas.value(x, torch.tensor(beta))
    expected = exact(x, float(torch.tensor(beta)))[0]
    assert ((got.double() - expected).abs() / expected.abs()).max() < 5e-7  # four units in the last place


@pytest.mark.parametrize("beta", BETAS)
def test_formulas_of_the_gradients(beta: float) -> None:
    rounded = float(torch.tensor(beta))
    x = grid(beta)[::8]
    _, slope, of_beta = exact(x, rounded)
    number = torch.tensor(beta)
    output = exact(x, rounded)[0].float()
    one = torch.ones(1)
    results = [formulas.gradients(one, s, number) for s in output.split(1)]
    # σ = 1 - e^(-βs)/2 is rounded at 6e-8, and so is βs, up to 100 in the grid
    assert (torch.cat([r[0] for r in results]).double() - slope).abs().max() < 5e-7
    assert torch.equal(
        formulas.input_gradient(torch.ones_like(output), output, number), torch.cat([r[0] for r in results])
    )
    # for z -> -inf ∂s/∂β tends to log(2)/β², and the output's rounding, 6e-8, is all that tells z apart
    got = torch.cat([r[1] for r in results]).double()
    inside = x > -8 / rounded
    assert ((got - of_beta).abs() / of_beta)[inside].max() < 2e-4
    assert (got - of_beta).abs().max() < 1e-5 / rounded**2


def test_formulas_pass_on_what_is_not_finite() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    value = formulas.value(x, torch.tensor(2.0))
    assert value[0].isnan()
    assert value[1] == float("inf")
    assert value[2].item() == pytest.approx(-0.34657359)
    grad_x, total = formulas.gradients(torch.ones(3), value, torch.tensor(2.0))
    assert grad_x[0].isnan()
    assert total.isnan()


@pytest.mark.parametrize("beta", [1e-3, 0.3, 10.0])
def test_whole_network_compilation_takes_the_formulas(beta: float) -> None:
    """Also for β < 1, which the eager form in place refuses."""
    torch.compiler.reset()
    layer = CenteredSoftplus(beta, inplace=True)
    source = torch.randn(64, generator=torch.Generator().manual_seed(0))
    x = source.clone().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        value = torch.compile(lambda v: layer(v * 1.0), backend="aot_eager", fullgraph=True)(x)
    value.sum().backward()
    expected, slope, of_beta = exact(source, float(layer.beta.detach()))
    torch.testing.assert_close(value.double(), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(x.grad.double(), slope, rtol=0, atol=5e-7)
    torch.testing.assert_close(
        layer.log_beta.grad.double(), (of_beta.sum() * layer.beta.detach().double()).view(1), rtol=1e-4, atol=0
    )
    assert {t.data_ptr() for t in saved if t.numel() == 64} == {value.data_ptr()}


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("needs a C++ compiler")
    use_compiled_softplus()
    yield
    use_compiled_softplus(False)


def run(x: Tensor, beta: Tensor, upstream: Tensor) -> list[Tensor]:
    """Value and gradients of the form in place."""
    x = x.clone().requires_grad_()
    value = centered_softplus(x * 1.0, beta, inplace=True)
    wanted = [x, beta] if beta.requires_grad else [x]
    return [value.detach().clone(), *torch.autograd.grad(value, wanted, upstream)]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("learnable", [True, False])
def test_compiled_agrees_with_the_closed_form(learnable: bool, memory_format: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(3, 4, 7, 5, generator=generator).to(memory_format=memory_format) for _ in range(2))
    beta = torch.tensor(10.0, requires_grad=learnable)
    results = run(x, beta, upstream)
    assert results[0].is_contiguous(memory_format=memory_format)
    assert results[1].is_contiguous(memory_format=memory_format)
    value, slope, of_beta = exact(x, 10.0)
    expected = [value, slope * upstream, (of_beta * upstream).sum()]
    for got, wanted, tolerance in zip(results, expected, (2e-7, 1e-6, 1e-6), strict=False):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=tolerance)


@pytest.mark.usefixtures("compiled")
def test_compiled_writes_over_its_input_and_serves_all_sizes_by_one_kernel() -> None:
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (2, 17, 1000):
        x = torch.randn(size)
        expected = exact(x, 3.0)[0]
        value = centered_softplus(x, 3.0, inplace=True)
        assert value is x
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        run(torch.randn(size, 3), torch.tensor(5.0, requires_grad=True), torch.randn(size, 3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("beta", [0.3, 10.0])  # in place only where β >= 1
def test_compiled_leaves_its_input_alone_unless_it_may_not(context, beta: float, monkeypatch) -> None:
    calls = []
    for name in ("write_to", "write_over"):
        kernel = compiled_softplus._kernels[name]
        recorded = lambda *args, name=name, kernel=kernel: (calls.append(name), kernel(*args))  # noqa: E731
        monkeypatch.setitem(compiled_softplus._kernels, name, recorded)
    source = torch.randn(3, 4, 7, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    expected = exact(source, float(torch.tensor(beta)))[0]
    for inplace in (False, True):
        with context():
            x = source.clone()
            value = centered_softplus(x, beta, inplace=inplace)
        overwritten = inplace and beta >= 1
        assert (value is x) == overwritten
        assert torch.equal(x, source) != overwritten
        assert value.stride() == source.stride()
        torch.testing.assert_close(value.double(), expected, rtol=5e-7, atol=0)
    assert calls == ["write_to", "write_over" if beta >= 1 else "write_to"]


@pytest.mark.usefixtures("compiled")
def test_output_of_the_compiled_form_may_be_changed_in_place() -> None:
    x = torch.randn(50, requires_grad=True)
    centered_softplus(x, 3.0).mul_(2.0).sum().backward()
    torch.testing.assert_close(x.grad.double(), 2 * exact(x.detach(), 3.0)[1], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("compiled")
def test_whoever_records_operations_sees_those_of_torch() -> None:
    network, x = resnet18(5, width=4, low_curvature=True, input_size=(8, 8)).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = network(x)
        folded = fold(network, x, batch_norm="fuse")  # conversion records operations
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
        with FlopCounterMode(display=False) as counter:
            network(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, yet in use
            traced = torch.jit.trace(CenteredSoftplus(10.0), x)
        other = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(traced(other), centered_softplus(other, 10.0))
    assert counter.get_total_flops() > 0


@pytest.mark.usefixtures("compiled")
def test_switching_does_not_compile_again() -> None:
    before = dict(compiled_softplus._kernels)
    x, beta = torch.randn(9), torch.tensor(3.0)
    use_compiled_softplus(False)
    assert not compiled_softplus_in_use()
    torch_value = centered_softplus(x, beta)
    use_compiled_softplus()
    assert compiled_softplus_in_use()
    assert compiled_softplus._kernels == before
    torch.testing.assert_close(centered_softplus(x, beta), torch_value)


@pytest.mark.usefixtures("compiled")
def test_layouts_with_gaps_and_second_derivatives_take_torch_operations() -> None:
    x = torch.randn(4, 6)[:, ::2]
    expected = exact(x, 4.0)[0]
    torch.testing.assert_close(centered_softplus(x, 4.0, inplace=True).double(), expected, rtol=1e-6, atol=1e-7)
    x = torch.randn(5, requires_grad=True)
    value = centered_softplus(x * 1.0, 4.0, inplace=True)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    slope = exact(x.detach(), 4.0)[1]
    torch.testing.assert_close(second.double(), 4 * slope * (1 - slope), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("compiled")
def test_network_with_compiled_softplus_has_the_gradients_of_torch_operations() -> None:
    network = resnet18(5, width=4, low_curvature=True, input_size=(8, 8))
    other = copy.deepcopy(network)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network(x).square().sum().backward()
    use_compiled_softplus(False)
    other(x).square().sum().backward()
    use_compiled_softplus()
    for (name, a), b in zip(network.named_parameters(), other.parameters(), strict=True):
        # 17 batch norms of few values amplify rounding
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-3 * float(b.grad.abs().max()), msg=name)


def test_no_compiler_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("g++ not found")

    monkeypatch.setattr(compiled_softplus, "_kernels", {})
    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler such as g\+\+.*g\+\+ not found"):
        use_compiled_softplus()
    assert not compiled_softplus_in_use()
