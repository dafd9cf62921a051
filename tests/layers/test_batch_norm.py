"""Lipschitz batch norm: against torch's batch norm, against dense Jacobians, and synchronised over two processes."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

from lightning_lcnn.functional import clip_factor, recompute_activations
from lightning_lcnn.kernels.clipped_batch_norm import _moments_by_rows, channel_variance
from lightning_lcnn.layers import (
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    convert_sync_batchnorm,
)
from lightning_lcnn.layers.batch_norm import revert_sync_batchnorm

CASES = [
    (LipschitzBatchNorm1d, nn.BatchNorm1d, (6, 3)),
    (LipschitzBatchNorm1d, nn.BatchNorm1d, (6, 3, 5)),
    (LipschitzBatchNorm2d, nn.BatchNorm2d, (6, 3, 4, 5)),
    (LipschitzBatchNorm3d, nn.BatchNorm3d, (6, 3, 2, 3, 4)),
]


def randomised(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.running_mean.copy_(torch.randn(3, generator=generator))
        layer.running_var.copy_(torch.rand(3, generator=generator) + 0.1)
        if layer.affine:
            layer.weight.copy_(torch.randn(3, generator=generator) * 3)
            layer.bias.copy_(torch.randn(3, generator=generator))
    return layer


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gamma", [None, 1e6])
@pytest.mark.parametrize(("ours", "torchs", "shape"), CASES)
def test_equals_torchs_batch_norm_where_nothing_is_clipped(ours, torchs, shape, gamma, affine) -> None:
    layer = randomised(ours(3, affine=affine, gamma=gamma))
    reference = randomised(torchs(3, affine=affine))
    for _ in range(3):
        x = torch.randn(shape)
        assert torch.equal(layer(x), reference(x))
    assert torch.equal(layer.running_var, reference.running_var)
    assert torch.equal(layer.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gamma", [0.01, 0.5, 2.0, 1e6])
def test_slope_in_evaluation_is_exact(gamma: float, affine: bool) -> None:
    layer = randomised(LipschitzBatchNorm2d(3, affine=affine, gamma=gamma)).double().eval()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x).reshape(12, 12)
    norm = torch.linalg.matrix_norm(jacobian, ord=2)
    torch.testing.assert_close(norm, layer.slope())
    assert norm <= layer.gamma.item() * (1 + 1e-12)
    scale, shift = layer.scale_and_shift()
    torch.testing.assert_close(layer(x), scale.view(3, 1, 1) * x + shift.view(3, 1, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_training_clips_by_the_statistics_of_the_batch(affine: bool, memory_format) -> None:
    layer = randomised(LipschitzBatchNorm2d(3, affine=affine, gamma=0.25)).double()
    x = (torch.randn(8, 3, 4, 4).double() * 0.1 + 2).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64)
    got = torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)

    # the same by hand, in elementary operations: the factor's variance is a constant, all else is differentiated
    x2 = x.detach().contiguous().requires_grad_()
    mean, variance = x2.mean((0, 2, 3), keepdim=True), x2.var((0, 2, 3), keepdim=True, correction=0)
    weight = layer.weight if affine else torch.ones(3, dtype=torch.float64)
    bias = layer.bias if affine else torch.zeros(3, dtype=torch.float64)
    slope = (weight.abs() / (variance.detach().flatten() + layer.eps).sqrt()).max()
    normalised = (x2 - mean) / (variance + layer.eps).sqrt()
    value = (normalised * weight.view(3, 1, 1) + bias.view(3, 1, 1)) * layer.log_gamma.exp() / slope
    expected = torch.autograd.grad(value, [x2, *layer.parameters()], upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    # what the normalisation applies to one value has slope at most γ
    assert (weight.abs() / (variance.flatten() + layer.eps).sqrt()).max() * 0.25 / slope <= 0.25 * (1 + 1e-12)


def test_gradgradcheck_in_both_modes() -> None:
    for training in (True, False):
        layer = randomised(LipschitzBatchNorm1d(3, gamma=0.5, momentum=0.0)).double().train(training)
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

        def function(x, weight, bias, log_gamma, layer=layer):
            parameters = {"weight": weight, "bias": bias, "log_gamma": log_gamma}
            return torch.func.functional_call(layer, parameters, (x,))

        arguments = (
            x,
            *(p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias, layer.log_gamma)),
        )
        if not training:  # in training the clip's variance is a constant by definition, which a difference is not
            assert torch.autograd.gradcheck(function, arguments)
            assert torch.autograd.gradgradcheck(function, arguments)
        else:
            of_parameters = lambda *a, x=x: function(x.detach(), *a)  # noqa: E731
            assert torch.autograd.gradcheck(of_parameters, arguments[1:])
            assert torch.autograd.gradgradcheck(of_parameters, arguments[1:])


def test_both_gradients_of_training_mode_where_nothing_is_clipped() -> None:
    layer = randomised(LipschitzBatchNorm2d(3, gamma=1e6, momentum=0.0)).double()
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    arguments = (x, *(p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_one_pass_equals_two(affine: bool, memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        layer = randomised(LipschitzBatchNorm2d(3, affine=affine, gamma=0.5)).double()
        x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = x.to(memory_format=memory_format).requires_grad_()
        value = layer(x)
        (gradient,) = torch.autograd.grad(value.pow(3).sum(), x, create_graph=True)
        return [value, gradient, *torch.autograd.grad(gradient.square().sum(), [x, *layer.parameters()])]

    one_pass = run()
    monkeypatch.setattr("lightning_lcnn.layers.batch_norm.fits_one_pass", lambda *_: False)
    for a, b in zip(one_pass, run(), strict=True):
        torch.testing.assert_close(a, b)
    assert one_pass[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gamma", [0.5, 1e6])
@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (9, 3, 8, 8, 10), (32, 3, 200)])
def test_large_batches_against_torch_in_float64(shape: tuple[int, ...], gamma: float, affine: bool) -> None:
    kind = {3: LipschitzBatchNorm1d, 4: LipschitzBatchNorm2d, 5: LipschitzBatchNorm3d}[len(shape)]
    layer = randomised(kind(3, affine=affine, gamma=gamma))
    reference = copy.deepcopy(layer).double()
    x = (torch.randn(shape) * 3 + 2).requires_grad_()
    grad = torch.randn(shape)
    exact_x = x.detach().double().requires_grad_()
    variance = exact_x.detach().transpose(0, 1).flatten(1).var(1, correction=0)
    running = [reference.running_mean.clone(), reference.running_var.clone()]
    factor = clip_factor(
        ((1 if not affine else reference.weight.abs()) / (variance + layer.eps).sqrt()).max(), reference.gamma
    )
    weight = torch.ones(3, dtype=torch.float64) if not affine else reference.weight
    exact = torch.nn.functional.batch_norm(
        exact_x, *running, weight * factor, None if not affine else reference.bias * factor, True, 0.1, layer.eps
    )
    y = layer(x)
    assert _moments_by_rows(x.detach()) is not None  # the way that is tested
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    y.backward(grad)
    exact.backward(grad.double())
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-4, atol=1e-6)
    for name, parameter in layer.named_parameters():
        wanted = reference.get_parameter(name).grad
        if gamma > 1 and name == "log_gamma":
            assert not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.running_mean.double(), running[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), running[1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1e3), (1e-3, 1.0), (1e20, 0.0), (0.0, 3.0), (1.0, math.inf)])
def test_large_batches_whose_raw_moments_would_be_wrong(scale: float, offset: float) -> None:
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * scale + offset
    assert _moments_by_rows(x) is None
    layer, reference = LipschitzBatchNorm2d(3, gamma=1e9), nn.BatchNorm2d(3)
    torch.testing.assert_close(layer(x), reference(x), equal_nan=True)
    torch.testing.assert_close(layer.running_var, reference.running_var, equal_nan=True)


def test_large_batches_of_dead_channels() -> None:
    x = torch.zeros(64, 3, 16, 16)
    assert torch.equal(LipschitzBatchNorm2d(3)(x), x)


def test_second_derivatives_of_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lcnn.kernels.clipped_batch_norm._MIN_VALUES", 1)
    monkeypatch.setattr("lightning_lcnn.kernels.clipped_batch_norm._MIN_ROW", 1)
    layer = randomised(LipschitzBatchNorm2d(3, gamma=1e6)).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert _moments_by_rows(x.detach()) is not None
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))


def test_gamma_receives_a_gradient_where_it_equals_the_slope() -> None:
    slope, log_gamma = torch.tensor(2.0), torch.tensor(2.0).log().requires_grad_()
    clip_factor(slope, log_gamma.exp()).backward()
    torch.testing.assert_close(log_gamma.grad, torch.tensor(1.0))
    zero = torch.zeros((), requires_grad=True)
    clip_factor(zero, torch.tensor(1.0)).backward()
    assert zero.grad == 0


def test_zero_initialised_weight_gives_no_nan() -> None:
    layer = LipschitzBatchNorm2d(3, gamma=1.0)
    nn.init.zeros_(layer.weight)
    layer(torch.randn(4, 3, 2, 2)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer.slope() == 0


def test_channel_variance_against_two_passes() -> None:
    x = torch.randn(16, 5, 7, 3) * torch.tensor([0.01, 1, 10, 100, 1]).view(5, 1, 1) + 3
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    error = (channel_variance(x) - variance).abs() / variance
    # raw moments in float32: rounding grows with mean²/variance, which is 1e5 in channel 0
    assert (error < 1e-6 * (1 + mean.square() / variance)).all()


def test_cumulative_average_and_no_running_statistics() -> None:
    layer, reference = LipschitzBatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(8, 3)
        torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(layer.running_var, reference.running_var)
    stateless = LipschitzBatchNorm1d(3, track_running_stats=False).eval()
    torch.testing.assert_close(stateless(x), nn.BatchNorm1d(3, track_running_stats=False)(x))
    with pytest.raises(ValueError, match="use track_running_stats=True"):
        stateless.slope()


def test_loads_the_weights_of_torchs_batch_norm() -> None:
    reference = randomised(nn.BatchNorm2d(3))
    layer = LipschitzBatchNorm2d(3, gamma=None)
    assert set(layer.state_dict()) == set(reference.state_dict())
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(layer.eval()(x), reference.eval()(x))


def test_contract() -> None:
    for ours, _, shape in CASES:
        layer = randomised(ours(3, gamma=0.5))
        x = torch.randn(shape)
        layer(x)
        layer.eval()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))
        fresh = ours(3).eval()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), layer(x))
        compiled = torch.compile(copy.deepcopy(layer).train(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), copy.deepcopy(layer).train()(x))
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_synchronisation_survives_copies() -> None:
    model = nn.Sequential(LipschitzBatchNorm2d(3), nn.BatchNorm2d(3))
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    assert [type(module) for module in converted] == [LipschitzBatchNorm2d, nn.SyncBatchNorm]
    assert converted.state_dict().keys() == model.state_dict().keys()
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert copied[0].synchronized
        assert "synchronized=True" in repr(copied)
    assert not model[0].synchronized
    revert_sync_batchnorm(converted)
    assert not converted[0].synchronized
    model, converted = model[:1], convert_sync_batchnorm(copy.deepcopy(model[:1]))
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(converted(x), model(x))  # no processes: nothing to synchronise


def _converter_of_timm() -> Callable[[nn.Module], nn.Module]:
    return pytest.importorskip("timm.layers").convert_sync_batchnorm


CONVERTERS = {"torch": lambda: nn.SyncBatchNorm.convert_sync_batchnorm, "timm": _converter_of_timm}


@pytest.mark.parametrize("converter", CONVERTERS)
@pytest.mark.parametrize("layer", [LipschitzBatchNorm1d, LipschitzBatchNorm2d, LipschitzBatchNorm3d])
def test_converters_that_would_drop_gamma_are_stopped(layer: Callable[..., nn.Module], converter: str) -> None:
    with pytest.raises(
        TypeError, match=rf"{layer.__name__} would be replaced by a batch norm without γ. Use lightning_"
    ):
        CONVERTERS[converter]()(nn.Sequential(nn.Conv2d(3, 3, 1), layer(3)))


def test_the_layer_is_a_leaf() -> None:
    layer = LipschitzBatchNorm2d(3)
    model, seen = nn.Sequential(nn.Sequential(layer), nn.ReLU()), []
    model.apply(seen.append)
    assert seen == [layer, model[0], model[1], model]
    assert list(layer.modules()) == [layer]
    assert not list(layer.children())
    assert [m for m in model.modules() if not list(m.children())] == [layer, model[1]]
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 4, 4))
    assert counter.get_total_flops() == 0
    layer.add_module("quantizer", nn.Identity())  # what torch's and other tools hang onto layers
    assert list(layer.children()) == [layer.quantizer]


def test_torchs_and_lightnings_tools_find_the_layer() -> None:
    from lightning.pytorch.callbacks import BaseFinetuning

    model = nn.Sequential(LipschitzBatchNorm2d(3), nn.Flatten())
    BaseFinetuning.freeze(model, train_bn=False)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 2, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    BaseFinetuning.make_trainable(model)
    update_bn([torch.ones(4, 3, 2, 2)], model)  # torch's own
    assert torch.equal(model[0].running_mean, torch.ones(3))


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf])
def test_bad_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match="`gamma` must be a finite number > 0"):
        LipschitzBatchNorm1d(3, gamma=gamma)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`x` must be 4-dimensional for LipschitzBatchNorm2d, got shape \(2, 3\)"):
        LipschitzBatchNorm2d(3)(torch.zeros(2, 3))


def _synchronised_worker(rank: int, port: int, results: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64)
    mine = (x[:4] if rank == 0 else x[4:]).clone().requires_grad_()  # uneven batches
    layer = convert_sync_batchnorm(LipschitzBatchNorm2d(3, gamma=0.5).double())
    value = layer(mine)
    value.square().sum().backward()
    results_of_rank = value.detach(), mine.grad.clone(), layer.running_var.clone(), layer.state_dict()
    mine.grad = None
    with recompute_activations():
        again = layer(mine)
        loss = (again * again).sum()
    value_again = weakref.ref(again)
    del again
    assert value_again() is None
    loss.backward()
    torch.save((*results_of_rank, mine.grad), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_synchronised_over_two_processes_equals_the_whole_batch(tmp_path, free_port: int) -> None:
    mp.spawn(_synchronised_worker, args=(free_port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64).requires_grad_()
    layer = LipschitzBatchNorm2d(3, gamma=0.5).double()
    value = layer(x)
    value.square().sum().backward()
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), value)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad)
    for part in parts:
        assert torch.equal(part[4], part[1])  # computed again in backward
        torch.testing.assert_close(part[2], layer.running_var)
        assert set(part[3]) == set(layer.state_dict())


def test_a_pickle_of_0_1_keeps_its_synchronisation() -> None:
    """It held a stateless batch norm outside the tree of modules, which torch's converter had replaced."""
    layer = LipschitzBatchNorm2d(3)
    state = copy.deepcopy(layer).__dict__ | {"_sync": nn.SyncBatchNorm(3, affine=False)}
    layer.__setstate__(state)
    assert layer.synchronized
    assert list(layer.children()) == []
    assert "_sync" not in vars(layer)
