"""What every layer promises: copies, pickles, checkpoints, types, modes, and no trace in the global state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.cases import LAYERS


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A layer that has been trained for three steps, and an input."""
    make, shape = LAYERS[request.param]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    trainable = list(layer.parameters())
    optimizer = torch.optim.SGD(trainable, lr=0.1) if trainable else None
    for _ in range(3):
        layer(x.clone()).square().mean().backward() if trainable else layer(x.clone())
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    return layer, x


def test_copies_pickles_and_files_are_equal_to_the_last_bit(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    layer.eval()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    expected = layer(x.clone())
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x.clone()), expected)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in layer.parameters()}


def test_state_dict_restores_a_new_layer_to_the_last_bit(
    case: tuple[nn.Module, Tensor], request: pytest.FixtureRequest
) -> None:
    layer, x = case
    make = LAYERS[request.node.callspec.params["case"]][0]
    torch.manual_seed(1)
    fresh = make()
    assert list(fresh.state_dict()) == list(layer.state_dict())  # whether or not it has seen an input
    fresh.load_state_dict(layer.state_dict())
    for training in (False, True):
        got, expected = (copy.deepcopy(m).train(training)(x.clone()) for m in (fresh, layer))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(case: tuple[nn.Module, Tensor], dtype: torch.dtype) -> None:
    layer, x = case
    layer = layer.eval().to(dtype)
    value = layer(x.to(dtype))
    assert value.dtype == dtype
    assert torch.isfinite(value).all()


def test_leaves_random_state_and_training_flags_alone(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    state = torch.get_rng_state()
    for training in (True, False):
        layer.train(training)(x.clone())
        assert layer.training is training
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_reach_every_parameter_and_are_finite(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    x = x.clone().requires_grad_()
    layer.train()(x * 1.0).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert torch.isfinite(x.grad).all()


def test_prints_its_state(case: tuple[nn.Module, Tensor]) -> None:
    assert type(case[0]).__name__ in repr(case[0])


def test_no_parameter_is_0d_and_scalars_are(case: tuple[nn.Module, Tensor]) -> None:
    """FSDP2's fully_shard refuses parameters of shape ()."""
    layer, _ = case
    assert all(parameter.ndim > 0 for parameter in layer.parameters())
    per_channel = getattr(layer, "num_channels", None) is not None
    for name in () if per_channel else ("beta", "gamma"):
        value, stored = getattr(layer, name, None), getattr(layer, f"log_{name}", None)
        if value is not None:
            assert value.shape == ()
            assert stored.shape == (1,)
            assert value.requires_grad == stored.requires_grad
    for name in ("slope", "sigma"):
        if hasattr(layer, name) and not isinstance(getattr(layer, name), float):
            assert getattr(layer, name)().shape == ()
