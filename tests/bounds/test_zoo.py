"""Networks of torchvision are traced as they are and, converted, have finite bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_lcnn.bounds import network_bound, trace
from lightning_lcnn.conversion import to_low_curvature


def vgg11_bn() -> nn.Module:
    """With a small head: the original's has 100 million weights."""
    model = models.vgg11_bn(num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return model


# builder, number of activations, number of additions and concatenations
ZOO: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "resnet18": (models.resnet18, 17, 8),
    "resnet50": (models.resnet50, 49, 16),
    "vgg11_bn": (vgg11_bn, 9, 0),
    "densenet121": (models.densenet121, 121, 62),
    "mobilenet_v2": (models.mobilenet_v2, 35, 10),
    "shufflenet_v2": (models.shufflenet_v2_x0_5, 37, 16),
}


def graph_counts(model: nn.Module, kinds: tuple[str, ...]) -> int:
    return sum(step.kind in kinds for step in trace(model).steps)


@pytest.mark.parametrize("name", ZOO)
def test_plain_networks_are_traced_whole(name: str) -> None:
    build, activations, joins = ZOO[name]
    model = build()
    assert graph_counts(model, ("ReLU", "ReLU6", "relu")) == activations
    # a concatenation of a single tensor is a join too: DenseNet has 4 of them
    assert graph_counts(model, ("add", "cat")) in (joins, joins + 4)
    assert trace(model).surrogate().log_slope.isfinite()


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121"])
def test_converted_networks_have_finite_curvature(name: str) -> None:
    build, activations, _ = ZOO[name]
    x = torch.randn(2, 3, 32, 32)
    model = to_low_curvature(build().eval(), x, max_pool="smooth").train()
    surrogate = trace(model).surrogate()
    surrogate.log_ratio.backward()
    assert len(surrogate.activations) >= activations
    assert surrogate.log_curvature.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_certified_bound_of_a_converted_resnet() -> None:
    x = torch.randn(1, 3, 24, 24)
    model = to_low_curvature(models.resnet18(num_classes=10).eval(), x, max_pool="smooth").eval()
    bound = network_bound(model, x, "tight")
    assert 0 < bound.curvature < float("inf")
    u = nn.functional.normalize(torch.randn(3 * 24 * 24), dim=0).view_as(x)
    _, product = torch.autograd.functional.vhp(lambda v: model(v)[0, 3], x, u)
    assert product.norm() <= bound.curvature
    assert bound.method == "tight"


def test_attention_has_no_bound_and_the_refusal_names_it() -> None:
    with pytest.raises(ValueError, match=r"self_attention' \(MultiheadAttention\): dot-product attention .* no finite"):
        trace(models.vit_b_16())
