"""Spectral norms refreshed together: as each layer by itself, and the kernels as their references."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.kernels import refresh_operators as operators
from lightning_lcnn.layers import (
    SpectralConv1d,
    SpectralConv2d,
    SpectralLinear,
    refresh,
    spectral,
    update_spectral_norm,
)
from lightning_lcnn.layers.upkeep import spectral_layers
from lightning_lcnn.models import resnet18


def layers() -> nn.ModuleList:
    size = {"input_size": (9, 8)}
    return nn.ModuleList(
        [
            SpectralLinear(5, 7),
            SpectralLinear(5, 7, gamma=2.0),
            SpectralLinear(7, 5),
            SpectralConv2d(4, 6, 3, padding=1, **size),
            SpectralConv2d(4, 6, 1, **size),  # goes with the one before
            SpectralConv2d(4, 6, (5, 3), padding=(2, 1), **size),  # and this
            SpectralConv2d(4, 6, 3, padding=1, stride=2, groups=2, **size),
            SpectralConv2d(4, 6, 3, padding=1, stride=2, groups=2, **size),
            SpectralConv2d(4, 6, 3, padding=2, dilation=2, **size),
            SpectralConv2d(4, 6, 4, padding="same", **size),  # this as well, with one zero more behind
            SpectralConv2d(4, 6, 2, padding="same", **size),
            SpectralConv1d(3, 4, 3, input_size=(11,)),
        ]
    ).double()


def changed(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for layer in spectral_layers(network):
            layer.weight += 0.1 * torch.randn_like(layer.weight)
    return network


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refresh, "takes_operators", lambda *tensors: True)


@pytest.mark.parametrize("num_iterations", [1, 2, 5])
@pytest.mark.parametrize("kind", ["layers", "resnet"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_together_as_each_by_itself(kind: str, num_iterations: int) -> None:
    network = layers() if kind == "layers" else resnet18(width=2, low_curvature=True, input_size=(8, 8)).double()
    together = changed(network)
    alone = copy.deepcopy(together)
    residuals = [layer.update_spectral_norm(num_iterations) for layer in spectral_layers(alone)]
    residual = update_spectral_norm(together, num_iterations)
    torch.testing.assert_close(residual, torch.stack(residuals).amax(), rtol=1e-7, atol=1e-12)
    expected, found = dict(alone.named_buffers()), dict(together.named_buffers())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    again = copy.deepcopy(alone)
    torch.testing.assert_close(update_spectral_norm(alone), update_spectral_norm(again), rtol=0, atol=0)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_equal_layers_share_a_convolution() -> None:
    groups = refresh._groups(list(spectral_layers(resnet18(width=2, low_curvature=True))))
    assert [len(group.layers) for group in groups] == [1, 4, 2, 3, 2, 3, 2, 3]
    assert [len(group.layers) for group in refresh._groups(list(layers()))] == [2, 1, 5, 2, 1, 1]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_layer_without_an_input_size_goes_alone() -> None:
    network = nn.Sequential(SpectralConv2d(2, 2, 3), SpectralLinear(3, 3))
    assert update_spectral_norm(network) < 1e-2
    assert network[0].right_vector.numel() == 0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_zero_weight_keeps_its_vector() -> None:
    network = nn.Sequential(SpectralLinear(3, 3), SpectralLinear(3, 3))
    nn.init.zeros_(network[0].weight)
    assert update_spectral_norm(network).isfinite()
    assert network[0].spectral_gradient.isfinite().all()


SIZES = (5, 5000, 1, 64), (7, 30, 9000, 2)


def vectors(which: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(sum(SIZES[which]), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_equal_their_references(dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("lightning_lcnn.kernels.triton_refresh", exc_type=ImportError)
    right, images = (operators.table(size, torch.device("cpu")) for size in SIZES)
    a, b, c, image = vectors(0, dtype), vectors(0, dtype), vectors(0, dtype), vectors(1, dtype)
    a[: SIZES[0][0]] = 0.0  # a dead layer
    norms = torch.rand(4, dtype=torch.float64).to(dtype)
    # sums of some thousand squares
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    for name, reference, arguments in (
        ("unit", operators._unit_reference, (a, b, right)),
        ("unit", operators._unit_reference, (a, None, right)),
        ("first", operators._first_reference, (a, b, image, right, images)),
        ("following", operators._next_reference, (a, b, c, norms, right)),
        ("last", operators._last_reference, (a, b, norms, right)),
    ):
        torch.testing.assert_close(getattr(kernels, name)(*arguments), reference(*arguments), **close)
    assert spectral.PERTURBATION == 0.03
