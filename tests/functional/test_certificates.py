"""Certified radii against closed forms and attacks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lcnn.bounds import margin_bounds
from lightning_lcnn.functional import lipschitz_radius, second_order_dual_radius, taylor_radius
from lightning_lcnn.layers import CenteredSoftplus
from lightning_lcnn.metrics import CertifiedAccuracy

INF = float("inf")


def test_radii_of_quadratics_are_exact() -> None:
    m, g, k = torch.rand(3, 50, dtype=torch.float64).unbind()
    radius = taylor_radius(m, g, k)
    torch.testing.assert_close(m - g * radius - k * radius**2 / 2, torch.zeros_like(m))
    torch.testing.assert_close(taylor_radius(m, g, torch.zeros_like(m)), m / g)
    torch.testing.assert_close(lipschitz_radius(m, g), m / g)


@pytest.mark.parametrize(
    ("margin", "gradient", "curvature", "expected"),
    [(-1.0, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, INF, 0.0), (1.0, 0.0, 0.0, INF), (1.0, 0.0, 2.0, 1.0)],
)
def test_taylor_radius_is_never_nan(margin: float, gradient: float, curvature: float, expected: float) -> None:
    assert taylor_radius(*map(torch.tensor, (margin, gradient, curvature))).item() == pytest.approx(expected)


@pytest.mark.parametrize(("margin", "slope", "expected"), [(-1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (1.0, INF, 0.0)])
def test_lipschitz_radius_is_never_nan(margin: float, slope: float, expected: float) -> None:
    assert lipschitz_radius(torch.tensor(margin), torch.tensor(slope)).item() == expected


def test_dual_radius_of_quadratics_approaches_the_distance_and_beats_taylor() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(20, 4, 4, dtype=torch.float64)
    matrix, linear = matrix + matrix.mT, torch.randn(20, 4, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    negative, positive = (-eigenvalues[:, 0]).clamp_min(0), eigenvalues[:, -1].clamp_min(0)

    def function(y: Tensor) -> Tensor:
        return 1 + (linear * y).sum(1) + 0.5 * torch.einsum("bi,bij,bj->b", y, matrix, y)

    x = torch.zeros(20, 4, dtype=torch.float64)
    dual = second_order_dual_radius(function, x, negative, positive, num_outer=30, num_inner=200)
    taylor = taylor_radius(torch.ones(20).double(), linear.norm(dim=1), negative)
    assert (dual >= taylor * 0.999).all()
    assert (dual > taylor * 1.05).any()
    directions = nn.functional.normalize(torch.randn(20_000, 4, dtype=torch.float64), dim=1)
    for i in range(20):  # no direction crosses the boundary before the certified radius
        values = (
            1 + dual[i] * directions @ linear[i] + 0.5 * dual[i] ** 2 * ((directions @ matrix[i]) * directions).sum(1)
        )
        assert values.min() > 0


@pytest.mark.parametrize("steps", [(1, 1), (2, 3)])
def test_dual_radius_holds_however_few_the_steps(steps: tuple[int, int]) -> None:
    x = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)[:, None]
    ones = torch.ones(50, dtype=torch.float64)
    radius = second_order_dual_radius(lambda y: 1 - y.square().sum(1), x, 2 * ones, 0 * ones, *steps)
    assert (radius <= 1 - x[:, 0]).all()
    assert (radius >= 0).all()


def test_dual_radius_without_a_bound_certifies_nothing() -> None:
    infinite = torch.full((3,), INF)
    assert second_order_dual_radius(lambda y: 1 - y.abs().sum(1), torch.zeros(3, 2), infinite, infinite).sum() == 0
    with pytest.raises(ValueError, match="`num_outer` must be at least 1"):
        second_order_dual_radius(lambda y: y.sum(1), torch.zeros(1, 1), torch.ones(1), torch.ones(1), num_outer=0)


class Peaks(nn.Module):
    """1 - max(x₁, x₂) - max(x₁, 20 x₂ - 0.8) against 0."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :1], x[:, 1:]
        kinked = torch.relu(second - first) + torch.relu(20 * second - 0.8 - first)
        return torch.cat([1 - 2 * first - kinked, torch.zeros_like(first)], dim=1)


def test_kinks_are_not_certified_beyond_the_true_distance() -> None:
    point = torch.tensor(
        [[0.2, 0.05]], dtype=torch.float64
    )  # a finite curvature for max would certify far more than 0.03
    metric = CertifiedAccuracy(radii=[0.01, 0.03, 0.05], dual_steps=4)
    metric.update(Peaks().eval(), point, torch.tensor([0]))
    result = metric.compute()
    assert 0 < result["mean_radius"] <= 0.0301
    assert result["certified_accuracy_0.05"] == 0


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network, trained with weight decay so that something is certified."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x = x.double() / 16
    net = nn.Sequential(nn.Linear(64, 32), CenteredSoftplus(2.0), nn.Linear(32, 10)).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1.0)
    for _ in range(200):
        batch = torch.randint(0, 1500, (128,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval(), x[1500:], y[1500:]


def test_no_attack_beats_a_certificate() -> None:
    net, x, y = digits()
    metric = CertifiedAccuracy(radii=[0.05, 0.25])
    metric.update(net, x, y)
    result = metric.compute()
    assert result["clean_accuracy"] > 0.85
    assert result["certified_accuracy_0.25"] > result["lipschitz_accuracy_0.25"]
    _, lipschitz, radius = metric._radii_of(net, x, y)
    assert (radius >= lipschitz).all()
    attacked = x.clone()
    for _ in range(60):  # projected gradient descent on the margin, to the very edge of the certified ball
        attacked.requires_grad_()
        logits = net(attacked)
        others = logits.scatter(1, y[:, None], -INF).amax(1)
        (gradient,) = torch.autograd.grad((logits.gather(1, y[:, None])[:, 0] - others).sum(), attacked)
        step = attacked.detach() - x - 0.1 * radius[:, None] * nn.functional.normalize(gradient, dim=1)
        scale = (radius / step.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
        attacked = x + step * scale[:, None]
    broken = net(attacked).argmax(1) != y
    assert not (broken & (radius > 0)).any()


def test_normalization_gives_radii_in_pixels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), CenteredSoftplus(1.0), nn.Linear(8, 3)).double().eval()
    pixels = torch.rand(6, 3, 2, 2, dtype=torch.float64)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]
    shift = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
    target = net((pixels - shift) / 0.5).argmax(1)
    inside, outside = (CertifiedAccuracy(normalization=n, dual_steps=0) for n in ((mean, std), None))
    for metric in (inside, outside):
        metric.update(net, (pixels - shift) / 0.5, target)
    torch.testing.assert_close(inside.compute()["mean_radius"], 0.5 * outside.compute()["mean_radius"])


def test_bounds_are_reused_until_parameters_change(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    import lightning_lcnn.metrics.certified as module

    monkeypatch.setattr(module, "margin_bounds", lambda *a: calls.append(1) or margin_bounds(*a))
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    metric = CertifiedAccuracy(dual_steps=0)
    batch = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1])
    metric.update(net, *batch)
    metric.update(net, *batch)
    assert len(calls) == 1
    with torch.no_grad():
        net[0].weight.mul_(2)
    metric.update(net, *batch)
    assert len(calls) == 2
    assert pickle.loads(pickle.dumps(metric)).compute() == copy.deepcopy(metric).compute() == metric.compute()


class Scaled(nn.Module):
    """A network behind a factor that is neither parameter nor buffer."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.scale * x)


def change_attribute(model: Any) -> None:
    model.scale = 5.0


def change_data(model: Any) -> None:
    model.network[0].weight.data.copy_(model.network[0].weight.data.flip(1))  # of equal norm, unseen by versions


def change_eps(model: Any) -> None:
    model.network[1].eps = 1e-3


def add_hook(model: Any) -> None:
    model.network[0].register_forward_hook(lambda module, args, output: 3 * output)


@pytest.mark.parametrize("change", [change_attribute, change_data, change_eps, add_hook])
def test_bounds_of_a_changed_network_are_its_own(change: Callable[[Any], None]) -> None:
    layers = nn.Linear(2, 4), nn.BatchNorm1d(4, eps=0.1), nn.Tanh(), nn.Linear(4, 2)
    model = Scaled(nn.Sequential(*layers), 0.1).double().eval()
    nn.init.uniform_(layers[1].running_var, 0.01, 0.02)
    x = torch.randn(6, 2, dtype=torch.float64)
    kept = CertifiedAccuracy(dual_steps=0)
    kept.update(model, x, model(x).argmax(1))
    change(model)
    target = model(x).argmax(1)
    kept.reset()
    fresh = CertifiedAccuracy(dual_steps=0)
    for metric in (kept, fresh):
        metric.update(model, x, target)
    assert kept.compute() == fresh.compute()
    assert kept._bounds[0] == fresh._bounds[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_certificates_of_low_precision_stay_below_the_exact_radius(dtype: torch.dtype) -> None:
    for _ in range(20):
        layer = nn.Linear(6, 2).to(dtype)
        x = torch.randn(1, 6).to(dtype)
        logits = layer(x)[0].detach().double()
        best = int(logits.argmax())
        weight = layer.weight.detach().double()
        gradient = weight[best] - weight[1 - best]
        exact = float((logits[best] - logits[1 - best]) / gradient.norm())
        metric = CertifiedAccuracy(dual_steps=4)
        radius = metric._radii_of(nn.Sequential(layer).eval(), x, torch.tensor([best]))[2]
        assert radius.dtype == torch.float64
        assert 0.9 * exact - 0.05 <= float(radius) <= exact
        metric.update(nn.Sequential(layer).eval(), x, torch.tensor([best]))
        assert float(metric.compute()["mean_radius"]) <= exact


def test_radii_in_low_precision_are_rounded_down() -> None:
    margin, slope = torch.rand(200) + 0.1, torch.rand(200) + 0.1
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        m, s = margin.to(dtype), slope.to(dtype)
        for radius in (lipschitz_radius(m, s), taylor_radius(m, s, torch.zeros(200, dtype=dtype))):
            assert radius.dtype == dtype
            assert (radius.double() <= m.double() / s.double() * (1 + 1e-15)).all()
            assert (radius.double() >= m.double() / s.double() * (1 - 2 * torch.finfo(dtype).eps)).all()


def test_a_first_layer_in_place_leaves_the_batch_alone() -> None:
    net = nn.Sequential(CenteredSoftplus(2.0, inplace=True), nn.Linear(3, 2)).eval()
    x = torch.randn(4, 3)
    before = x.clone()
    metric = CertifiedAccuracy(dual_steps=2)
    metric.update(net, x, net(x.clone()).argmax(1))
    assert torch.equal(x, before)
    assert metric.compute()["clean_accuracy"] == 1
    assert metric.compute()["mean_radius"] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"radii": []}, ValueError, "`radii` must name at least one"),
        ({"radii": [0.0]}, ValueError, "`radii` must be a finite number > 0"),
        ({"dual_steps": -1}, ValueError, "`dual_steps` must be at least 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CertifiedAccuracy(**arguments)


def test_refuses_what_has_no_graph() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, whose graph is bounded"):
        CertifiedAccuracy().update(lambda x: x, torch.zeros(1, 2), torch.tensor([0]))
