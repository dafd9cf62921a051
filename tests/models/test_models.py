"""The networks for small images in both forms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm2d, LogMeanExpPool2d, SpectralConv2d
from lightning_lcnn.models import Normalize, resnet18, resnet34, vgg11

BUILDERS = [resnet18, resnet34, vgg11]
CONVS = {resnet18: 20, resnet34: 36, vgg11: 8}
# Weights of the published CIFAR ResNets (64 channels, 3x3 stem, linear head) and of this VGG, counted by hand
PARAMETERS = {resnet18: 11_173_962, resnet34: 21_282_122, vgg11: 9_228_362}


class LeafTracer(torch.fx.Tracer):
    """Our layers are leaves, as torch's are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("lightning_lcnn.layers") or super().is_leaf_module(
            m, module_qualified_name
        )


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize("build", BUILDERS)
def test_standard_form_is_the_published_network(build):
    model = build()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[build]
    assert count(model, nn.Conv2d) == count(model, nn.BatchNorm2d) == CONVS[build]
    assert not {CenteredSoftplus, LipschitzBatchNorm2d, SpectralConv2d} & {type(m) for m in model.modules()}


@pytest.mark.parametrize("build", BUILDERS)
def test_low_curvature_form_has_smooth_layers_only(build):
    model = build(width=4, low_curvature=True, beta=7.0, gamma=3.0)
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {nn.ReLU, nn.BatchNorm2d, nn.Conv2d, nn.MaxPool2d}
    assert count(model, SpectralConv2d) == count(model, LipschitzBatchNorm2d) == CONVS[build]
    betas = [m.beta.item() for m in model.modules() if isinstance(m, CenteredSoftplus)]
    assert betas == pytest.approx([7.0] * len(betas))
    gammas = [m.gamma.item() for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    assert gammas == pytest.approx([3.0] * len(gammas))


@pytest.mark.parametrize("build", BUILDERS)
def test_every_activation_is_used_once(build):
    model = build(width=2, low_curvature=True).eval()
    calls: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, CenteredSoftplus):
            module.register_forward_hook(lambda m, *_: calls.update({m: calls.get(m, 0) + 1}))
    model(torch.randn(1, 3, 32, 32))
    assert set(calls.values()) == {1}
    assert len(calls) == count(model, CenteredSoftplus) == {resnet18: 17, resnet34: 33, vgg11: 8}[build]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("low_curvature", [False, True])
def test_other_sizes_channels_and_classes(build, low_curvature):
    size = (33, 47)
    model = build(3, width=2, low_curvature=low_curvature, in_channels=1, input_size=size).eval()
    sizes: dict[str, tuple[int, ...]] = {}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in convs.items():
        module.register_forward_pre_hook(lambda _, x, name=name: sizes.update({name: x[0].shape[1:]}))
    assert model(torch.randn(2, 1, *size)).shape == (2, 3)
    if low_curvature:  # the sizes computed at construction are those that arrive
        assert {name: m.right_vector.shape for name, m in convs.items()} == sizes


@pytest.mark.parametrize("build", BUILDERS)
def test_standard_weights_load_into_the_low_curvature_form(build):
    standard, smooth = build(width=2), build(width=2, low_curvature=True)
    result = smooth.load_state_dict(standard.state_dict(), strict=False)
    assert result.unexpected_keys == []
    new = {key.rpartition(".")[2] for key in result.missing_keys}
    assert new == {"log_beta", "log_gamma", "right_vector", "spectral_gradient"}
    assert list(standard.state_dict()) == [k for k in smooth.state_dict() if k.rpartition(".")[2] not in new]


@pytest.mark.parametrize("build", BUILDERS)
def test_contract(build):
    torch.manual_seed(0)
    model = build(width=2, low_curvature=True)
    x = torch.randn(4, 3, 32, 32)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    expected = model(x)
    traced = torch.fx.GraphModule(model, LeafTracer().trace(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), traced):
        assert torch.equal(other(x), expected)
    fresh = build(width=2, low_curvature=True).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("build", BUILDERS)
def test_same_seed_gives_the_same_weights_in_both_forms(build):
    torch.manual_seed(0)
    standard = build(width=2)
    torch.manual_seed(0)
    smooth = build(width=2, low_curvature=True)
    for name, weight in standard.named_parameters():
        assert torch.equal(weight, smooth.get_parameter(name))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "`num_classes` must be at least 1"),
        ({"width": 1.5}, TypeError, "`width` must be an integer"),
        ({"in_channels": -1}, ValueError, "`in_channels`"),
        ({"beta": 0.0}, ValueError, "`beta`"),
        ({"gamma": -1.0}, ValueError, "`gamma`"),
        ({"input_size": 32}, ValueError, "`input_size` must be a tuple"),
        ({"input_size": (0, 4)}, ValueError, "`input_size` must be at least 1"),
    ],
)
@pytest.mark.parametrize("build", BUILDERS)
def test_bad_arguments(build, arguments, error, message):
    with pytest.raises(error, match=message):
        build(**{"width": 2} | arguments)


def test_vgg_pooling():
    assert count(vgg11(width=2), nn.MaxPool2d) == 5
    assert count(vgg11(width=2, low_curvature=True), nn.AvgPool2d) == 5
    assert count(vgg11(width=2, low_curvature=True, pooling="max"), nn.MaxPool2d) == 5
    smooth = vgg11(width=2, low_curvature=True, beta=4.0, pooling="smooth")
    assert [m.temperature for m in smooth.modules() if isinstance(m, LogMeanExpPool2d)] == [0.25] * 5
    with pytest.raises(ValueError, match="`pooling` must be one of"):
        vgg11(width=2, pooling="median")
    with pytest.raises(ValueError, match="`input_size` must be at least 32"):
        vgg11(width=2, input_size=(16, 16))


def test_normalize_enters_bounds_and_no_checkpoint():
    network = nn.Sequential(Normalize([0.5, 0.4], [0.25, 0.5]), nn.Flatten(), nn.Linear(8, 3, bias=False)).eval()
    x = torch.rand(5, 2, 2, 2)
    by_hand = (x - torch.tensor([0.5, 0.4]).view(2, 1, 1)) / torch.tensor([0.25, 0.5]).view(2, 1, 1)
    torch.testing.assert_close(network(x), network[2](by_hand.flatten(1)))
    assert list(network.state_dict()) == ["2.weight"]
    exact = torch.linalg.matrix_norm(network[2].weight, 2).item()
    assert 2 * exact <= network_bound(network, x[:1]).slope <= 4.001 * exact


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [(0.0, 0.0, "`std`"), (float("nan"), 1.0, "`mean` must be finite"), ([0.0], [1.0, 1.0], "equal lengths")],
)
def test_normalize_refuses(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)
