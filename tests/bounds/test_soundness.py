"""No input that gradient ascent finds exceeds a bound: random graphs with fan-out, sharing, joins and odd sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lcnn.bounds import direction_bounds, network_bound
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm2d, LogMeanExpPool2d, SpectralConv2d
from tests.bounds.ascent import ascend

ACTIVATIONS = (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.Sigmoid, nn.Mish, nn.Softsign)


class RandomGraph(nn.Module):
    """Applies drawn operations to drawn earlier values, then flattens into a linear head."""

    def __init__(self, draw: Any, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.plan: list[tuple[str, tuple[int, ...], int]] = []  # operation, values that it reads, layer
        shapes = [shape]
        for _ in range(draw(st.integers(2, 6))):
            shapes.append(self._add(draw, shapes))
        self.head = nn.Linear(math.prod(shapes[-1]), 3)

    def _add(self, draw: Any, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        source = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        kind = draw(
            st.sampled_from(["conv", "conv", "act", "act", "join", "pool", "pool", "norm", "shared", "function"])
        )
        same = [i for i, s in enumerate(shapes) if s == shapes[source]]
        if kind == "join":
            operation = draw(st.sampled_from(["add", "sub", "cat"]))
            other = draw(st.sampled_from(same))
            self.plan.append((operation, (source, other), -1))
            c, *size = shapes[source]
            return (2 * c if operation == "cat" else c, *size)
        if kind == "function":
            self.plan.append((draw(st.sampled_from(["scale", "pad", "flip", "expand", "mean"])), (source,), -1))
            return self._probe(shapes[source])
        reusable = [i for i, m in enumerate(self.layers) if isinstance(m, CenteredSoftplus) and m.num_channels is None]
        if kind == "shared" and reusable:
            index = draw(st.sampled_from(reusable))
        else:
            self.layers.append(_layer(draw, kind, shapes[source]))
            index = len(self.layers) - 1
        self.plan.append(("layer", (source,), index))
        return self._probe(shapes[source])

    def _probe(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        with torch.no_grad():
            return tuple(self._step(self.plan[-1], [torch.zeros(1, *shape)] * 2, probe=True).shape[1:])

    def _step(self, entry: tuple[str, tuple[int, ...], int], values: list[Tensor], probe: bool = False) -> Tensor:
        operation, sources, layer = entry
        x = values[0] if probe else values[sources[0]]
        if operation == "layer":
            return self.layers[layer].eval()(x)
        if operation in ("add", "sub", "cat"):
            y = values[sources[1]]
            return {"add": torch.add, "sub": torch.sub, "cat": lambda a, b: torch.cat([a, b], dim=1)}[operation](x, y)
        if operation == "scale":
            return -1.5 * x / 0.75 + 0.3
        if operation == "pad":
            return F.pad(x, (1, 0, 0, 2))
        if operation == "mean":
            return x.mean(3, keepdim=True)
        return x.flip(2) if operation == "flip" else x + x.mean((2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for entry in self.plan:
            values.append(self._step(entry, values))
        return self.head(values[-1].flatten(1))


def _layer(draw: Any, kind: str, shape: tuple[int, ...]) -> nn.Module:
    c, h, w = shape
    if kind in ("act", "shared"):
        if kind == "shared" or draw(st.booleans()):
            return CenteredSoftplus(draw(st.floats(0.5, 8.0)), num_channels=None if kind == "shared" else c)
        return draw(st.sampled_from(ACTIVATIONS))()
    if kind == "norm":
        norm = draw(st.sampled_from([nn.BatchNorm2d, LipschitzBatchNorm2d]))(c)
        nn.init.uniform_(norm.running_var, 0.2, 3.0)
        nn.init.normal_(norm.weight)
        return norm
    if kind == "pool":
        k, s = draw(st.integers(1, min(3, h, w))), draw(st.integers(1, 3))
        if draw(st.booleans()):
            return LogMeanExpPool2d(k, s, draw(st.integers(0, k // 2)), temperature=draw(st.floats(0.1, 2.0)))
        return nn.AvgPool2d(k, s, draw(st.integers(0, k // 2)), draw(st.booleans()), draw(st.booleans()))
    kernel = (draw(st.integers(1, min(3, h))), draw(st.integers(1, min(3, w))))
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
    stride = (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    padding = (draw(st.integers(0, 1)), draw(st.integers(0, 2)))
    kind_of = draw(st.sampled_from([nn.Conv2d, SpectralConv2d]))
    return kind_of(c, groups * draw(st.integers(1, 2)), kernel, stride, padding, 1, groups)


def directions() -> Tensor:
    w = torch.eye(3, dtype=torch.float64)
    return torch.stack([w[0] - w[1], w[2] - w[0], w[1]])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_input_exceeds_the_bounds(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(3, 6)), data.draw(st.integers(3, 6)))
    net = RandomGraph(data.draw, shape).double().eval().requires_grad_(False)
    for parameter in net.parameters():  # larger than the usual start, so that activations leave their middle
        parameter.mul_(2.0)
    example = torch.zeros(1, *shape, dtype=torch.float64)
    fast, tight = network_bound(net, example), network_bound(net, example, "tight")
    assert tight.slope <= fast.slope * (1 + 1e-9)
    assert tight.curvature <= fast.curvature * (1 + 1e-9)
    heads = direction_bounds(net, example, directions())
    x = torch.randn(9, *shape, dtype=torch.float64)
    any_direction = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    slope, curvature = ascend(net, x, any_direction, 1.0, 40)
    assert slope <= tight.slope
    assert curvature <= tight.curvature
    for h, w in enumerate(directions()):
        for sign, limit in ((1.0, heads.positive[h]), (-1.0, heads.negative[h])):
            slope, curvature = ascend(net, x[:4], w.expand(4, 3), sign, 15)
            assert slope <= heads.slope[h]
            assert curvature <= limit


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_bound_is_nearly_attained_by_one_neuron(kind: type[nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(1, 1), kind(), nn.Linear(1, 1)).double().eval().requires_grad_(False)
    nn.init.constant_(net[0].weight, 1.5)  # so that the inputs below reach both ends of the activation
    nn.init.constant_(net[2].weight, -0.7)
    nn.init.zeros_(net[0].bias)
    bound = network_bound(net, torch.zeros(1, 1, dtype=torch.float64), "tight")
    x = torch.linspace(-30, 30, 40001, dtype=torch.float64)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert 0.99 * bound.slope <= slope.detach().abs().max() <= bound.slope
    assert 0.97 * bound.curvature <= curvature.abs().max() <= bound.curvature
