"""β and γ are found, kept out of weight decay, and counted once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm1d,
    SpectralLinear,
    lcnn_parameter_groups,
    low_curvature_parameters,
    reset_spectral_norm,
    spectral_layers,
    update_spectral_norm,
)


def network() -> nn.Sequential:
    """All kinds of β and γ, an activation that is used twice, a fixed β, an unclipped norm."""
    shared = CenteredSoftplus()
    return nn.Sequential(
        SpectralLinear(4, 6, gamma=2.0),
        LipschitzBatchNorm1d(6, gamma=3.0),
        shared,
        nn.Linear(6, 6),
        LipschitzBatchNorm1d(6, gamma=None),
        shared,
        SpectralLinear(6, 6),
        CenteredSoftplus(learnable=False),
        CenteredSoftplus(num_channels=6),
        nn.LayerNorm(6),
    )


def test_low_curvature_parameters_are_named_as_in_the_state_dict() -> None:
    net = network()
    found = dict(low_curvature_parameters(net))
    assert list(found) == ["2.log_beta", "8.log_beta", "0.log_gamma", "1.log_gamma"]
    assert all(found[name] is net.get_parameter(name) for name in found)


@pytest.mark.parametrize("decay_bias_and_norm", [True, False])
def test_groups_hold_every_trainable_parameter_once(decay_bias_and_norm: bool) -> None:
    net = network()
    net[3].weight.requires_grad_(False)
    groups = lcnn_parameter_groups(net, weight_decay=0.1, decay_bias_and_norm=decay_bias_and_norm)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in net.parameters() if p.requires_grad}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith(("log_beta", "log_gamma")) or (parameter.ndim <= 1 and not decay_bias_and_norm)
            assert decay[id(parameter)] == (0.0 if exempt else 0.1), name


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.NAdam]
)
def test_weight_decay_alone_leaves_beta_and_gamma(optimizer: type[torch.optim.Optimizer]) -> None:
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    steps = optimizer(lcnn_parameter_groups(net, weight_decay=0.5), lr=0.1)  # type: ignore[call-arg]
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    steps.step()
    for name, _ in low_curvature_parameters(net):
        assert torch.equal(net.get_parameter(name), before[name]), name
    if optimizer is not torch.optim.Rprop:  # which knows no decay
        assert not torch.equal(net[3].weight, before["3.weight"])


def test_network_without_low_curvature_layers_gets_one_group() -> None:
    assert len(lcnn_parameter_groups(nn.Linear(2, 2), weight_decay=0.1)) == 1


def test_groups_refuse_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`weight_decay` must be a finite number >= 0"):
        lcnn_parameter_groups(network(), weight_decay=-0.1)
    with pytest.raises(ValueError, match="`module` has no trainable parameter, got Linear"):
        lcnn_parameter_groups(nn.Linear(2, 2).requires_grad_(False))


def test_update_brings_sigma_to_the_largest_singular_value() -> None:
    net = network()
    layer = net[0]
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    first = update_spectral_norm(net)
    assert first.ndim == 0
    residual = update_spectral_norm(net, num_iterations=200)
    assert float(residual) < 1e-3 < float(first)
    true = torch.linalg.matrix_norm(layer.weight.double(), 2)
    torch.testing.assert_close(layer.sigma().double(), true, rtol=1e-5, atol=0)


def test_reset_depends_on_the_weights_alone() -> None:
    net, other = network(), network()
    other.load_state_dict({k: v for k, v in net.state_dict().items() if "vector" not in k}, strict=False)
    update_spectral_norm(other, num_iterations=3)
    assert float(reset_spectral_norm(net)) <= 1e-4
    reset_spectral_norm(other)
    assert len(list(spectral_layers(net))) == 2
    for a, b in zip(spectral_layers(net), spectral_layers(other), strict=True):
        assert torch.equal(a.right_vector, b.right_vector)
        assert torch.equal(a.spectral_gradient, b.spectral_gradient)


@pytest.mark.parametrize("function", [update_spectral_norm, reset_spectral_norm])
def test_updates_refuse_a_network_without_spectral_layers(function: object) -> None:
    with pytest.raises(ValueError, match="`module` has no spectral layer, got Linear; convert it"):
        function(nn.Linear(2, 2))  # type: ignore[operator]
