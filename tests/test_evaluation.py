"""evaluate(): entries against dense derivatives in float64 and closed forms, subsets, what is not finite, errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.evaluation import evaluate
from lightning_lcnn.layers import CenteredSoftplus


def smooth_network(activation: nn.Module | None = None) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 12), activation or CenteredSoftplus(4.0), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double().eval()


def digits(count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (count,))


def dense(function, x: torch.Tensor) -> tuple[float, float]:
    """Norms of gradient and Hessian of a scalar function of the flat image."""
    gradient = torch.autograd.functional.jacobian(function, x)
    hessian = torch.autograd.functional.hessian(function, x)
    return gradient.norm().item(), torch.linalg.matrix_norm(hessian, 2).item()


def margin(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    others = torch.cat([logits[:label], logits[label + 1 :]])
    return logits[label] - others.max()


def test_smooth_network_against_dense_derivatives():
    network = smooth_network()
    images, labels = digits()
    record = evaluate(network, images, labels, name="net", batch_size=3, attack_radii=[])
    pairs = {
        "margin": lambda logits, label: margin(logits, label),
        "loss": lambda logits, label: nn.functional.cross_entropy(logits, label),
    }
    for output, scalar in pairs.items():
        expected = [
            dense(lambda x, y=y, scalar=scalar: scalar(network(x.view(1, -1))[0], y), image.flatten())
            for image, y in zip(images, labels, strict=True)
        ]
        gradients, hessians = (torch.tensor(column) for column in zip(*expected, strict=True))
        assert record["gradient_norm"][output] == pytest.approx(gradients.mean().item(), rel=1e-6)
        # the loss's Hessian of a network of rank 12 is found in 20 products up to rounding
        assert record["hessian_norm"][output] == pytest.approx(hessians.mean().item(), rel=1e-5)
        curvatures = (hessians / gradients).sort().values
        assert record["curvature"][output] == pytest.approx(curvatures.mean().item(), rel=1e-5)
        assert record["median_curvature"][output] == pytest.approx(curvatures[3].item(), rel=1e-5)
        assert record["converged"][output] == 1
    assert sorted(record["curvature_values"])[3] == pytest.approx(record["median_curvature"]["margin"])
    accuracy = (network(images).argmax(1) == labels).double().mean().item()
    assert record["accuracy"] == accuracy
    assert record["stand_in_beta"] is None
    assert record["betas"] == {"2": pytest.approx(4.0)}
    bound = network_bound(network, images[:1])
    assert record["certified"] == {"slope": bound.slope, "curvature": bound.curvature, "reason": ""}
    assert [row["share"] for row in record["layers"] if row["curvature"]] == [1.0]
    assert record["name"] == "net"
    assert record["examples"] == record["measured_examples"] == record["attacked_examples"] == 7
    json.dumps(record, allow_nan=False)


def test_relu_network_keeps_its_own_gradient_and_lends_a_smooth_hessian():
    network = smooth_network(nn.ReLU())
    images, labels = digits()
    record = evaluate(network, images, labels, attack_radii=[], stability_radii=[0.1], bound="fast")
    first, second = network[1], network[3]

    def by_hand(x: torch.Tensor, y: torch.Tensor, relu: bool) -> torch.Tensor:
        z = first.weight @ x + first.bias
        hidden = z.clamp(min=0) if relu else (torch.logaddexp(1000 * z, torch.zeros_like(z)) - math.log(2)) / 1000
        return margin(second.weight @ hidden + second.bias, y)

    pairs = list(zip(images.flatten(1), labels, strict=True))
    gradients = [torch.autograd.functional.jacobian(lambda v, y=y: by_hand(v, y, True), x).norm() for x, y in pairs]
    assert record["gradient_norm"]["margin"] == pytest.approx(torch.stack(gradients).mean().item(), rel=1e-9)
    norms = [dense(lambda v, y=y: by_hand(v, y, False), x) for x, y in pairs]
    assert record["hessian_norm"]["margin"] == pytest.approx(sum(h for _, h in norms) / len(norms), rel=1e-5)
    assert record["curvature"]["margin"] == pytest.approx(sum(h / g for g, h in norms) / len(norms), rel=1e-5)
    assert record["stand_in_beta"] == 1000
    assert record["certified"]["curvature"] is None
    assert record["certified"]["slope"] == network_bound(network, images[:1]).slope
    assert "2: " in record["certified"]["reason"]
    assert not any(isinstance(module, CenteredSoftplus) for module in network.modules())
    json.dumps(record, allow_nan=False)


class OnceDifferentiable(torch.autograd.Function):
    """tanh whose gradient torch cannot differentiate, as in fused attention kernels."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y**2)


class Tanh(nn.Module):
    def forward(self, x):
        return OnceDifferentiable.apply(x)


def test_operation_without_second_derivative():
    images, labels = digits()
    network = smooth_network(Tanh())
    exact = smooth_network(nn.Tanh())
    exact.load_state_dict(network.state_dict())
    options = {"attack_radii": [], "bound": None}
    record, expected = (evaluate(net, images, labels, **options) for net in (network, exact))
    # central differences in float64
    assert record["hessian_norm"]["margin"] == pytest.approx(expected["hessian_norm"]["margin"], rel=1e-5)
    assert "by finite differences" in record["notes"]["hessian_norm"]
    assert expected["notes"] == {}


def test_kinks_of_max_pooling_are_smoothed_too():
    network = nn.Sequential(nn.Conv2d(1, 3, 3), CenteredSoftplus(5.0), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    images, labels = digits()
    record = evaluate(network.double().eval(), images, labels, attack_radii=[])
    assert record["stand_in_beta"] == 1000
    assert record["notes"] == {}


def test_attack_on_a_linear_classifier_matches_the_distance_to_its_boundary():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double().eval()
    images, _ = digits(40)
    images = 0.5 + 0.1 * (images - 0.5)  # no perturbation below reaches the edge of [0, 1]
    logits = network(images).detach()
    labels = logits.argmax(1)
    labels[:4] = 1 - labels[:4]
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])).squeeze(1)
    weight = network[1].weight.detach()
    distance = gap / (weight[0] - weight[1]).norm()
    radii = [distance[4:].quantile(0.3).item(), distance[4:].quantile(0.7).item()]
    record = evaluate(network, images, labels, attack_radii=radii, stability_radii=[0.05], batch_size=16)
    for radius in radii:
        robust = (distance > radius).double().mean().item()
        assert record["adversarial_accuracy"][f"{radius:g}"] == pytest.approx(robust)
        error = math.sqrt(robust * (1 - robust) / 40)
        assert record["adversarial_standard_error"][f"{radius:g}"] == pytest.approx(error)
    assert record["accuracy"] == 36 / 40
    assert record["curvature"]["margin"] == pytest.approx(0, abs=1e-9)
    assert record["gradient_change"] == {"0.05": pytest.approx(0, abs=1e-9)}
    assert record["certified"]["curvature"] == 0


def test_subsets_are_the_same_for_every_model_and_nested():
    images, labels = digits(20)
    short = {"attack_radii": [0.1], "stability_radii": [], "bound": None}
    few = evaluate(smooth_network(), images, labels, examples=4, attack_examples=6, **short)
    assert (few["measured_examples"], few["attacked_examples"], few["examples"]) == (4, 6, 20)
    assert few["certified"] == {"slope": None, "curvature": None, "reason": "not asked for"}
    network = smooth_network()
    every = evaluate(network, images, labels, examples=100, **short)
    assert evaluate(network, images, labels, examples=4, **short)["curvature_values"] == every["curvature_values"][:4]


def test_bytes_and_fractions_agree_and_progress_counts_all_images():
    network = smooth_network()
    pixels, labels = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8), digits()[1]
    seen: dict[str, list[tuple[int, int]]] = {}
    record = evaluate(
        network,
        pixels,
        labels,
        attack_radii=[0.1],
        batch_size=4,
        examples=5,
        attack_examples=6,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    fractions = evaluate(
        network, pixels.double() / 255, labels, attack_radii=[0.1], batch_size=4, examples=5, attack_examples=6
    )
    assert record == fractions
    assert seen == {
        "accuracy": [(4, 7), (7, 7)],
        "curvature": [(4, 5), (5, 5)],
        "gradient change": [(4, 5), (5, 5)],
        "attack": [(4, 6), (6, 6)],
    }


class Bowl(nn.Module):
    """Logits (‖x‖², 0): the gradient vanishes at 0 and the Hessian does not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x.flatten(1).square().sum(1)
        return torch.stack([value, torch.zeros_like(value)], 1)


def test_an_infinite_curvature_is_null_with_a_reason():
    images, labels = torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)
    images[1] = 0
    record = evaluate(Bowl().eval(), images, labels, attack_radii=[], stability_radii=[0.1])
    assert record["curvature"]["margin"] is None
    assert "not finite for 1 of 4 examples" in record["notes"]["curvature.margin"]
    assert record["gradient_change"]["0.1"] is None
    assert record["median_curvature"]["margin"] > 0
    assert record["curvature_values"].count(None) == 1
    assert record["hessian_norm"]["margin"] == pytest.approx(2, rel=1e-4)
    assert record["certified"]["slope"] is None
    assert record["certified"]["reason"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, ValueError, "`model` must be in evaluation mode: call model.eval"),
        ({"model": len}, TypeError, "`model` must be a torch.nn.Module, got builtin"),
        ({"images": torch.rand(3, 64)}, ValueError, r"`images` must have shape \(N, C, H, W\)"),
        ({"images": torch.randn(3, 1, 8, 8)}, ValueError, r"`images` must lie in \[0, 1\].*put the normalisation"),
        ({"images": torch.full((3, 1, 8, 8), math.nan)}, ValueError, r"`images` must lie in \[0, 1\], got \[nan"),
        ({"images": torch.ones(3, 1, 8, 8, dtype=torch.int64)}, TypeError, "`images` must be uint8 or floating point"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"`labels` must have shape \(3,\)"),
        ({"labels": torch.tensor([0, 1, 7])}, ValueError, r"must lie in \[0, 3\) for 3 logits, got 7"),
        ({"examples": 0}, ValueError, "`examples` must be at least 1"),
        ({"bound": "best"}, ValueError, "`bound` must be one of"),
    ],
)
def test_errors(change, error, message):
    arguments = {"model": smooth_network(), "images": torch.rand(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(error, match=message):
        evaluate(**(arguments | change))


def test_logits_that_are_not_finite_raise():
    network = smooth_network()
    nn.init.constant_(network[3].bias, math.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        evaluate(network, *digits())
