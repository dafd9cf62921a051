"""Saliency maps with and without noise and their agreement, against closed forms and gradient_stability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_lcnn.functional import cosine_agreement, gradient_stability, saliency_under_noise, top_k_agreement


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Softplus(beta=20), nn.Linear(16, 4)).double().eval()


def test_maps_are_the_gradients_that_autograd_finds():
    model, x, target = network(), torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.arange(5) % 4
    result = saliency_under_noise(model, x, target, 0.3, output="logit", batch_size=2)
    assert result.noise.norm().item() == pytest.approx(0.3)
    for maps, point in ((result.clean, x), (result.noisy, x + result.noise)):
        leaf = point.clone().requires_grad_()
        (expected,) = torch.autograd.grad(model(leaf)[range(5), target].sum(), leaf)
        torch.testing.assert_close(maps, expected)


def test_the_change_is_that_of_gradient_stability():
    model, x, target = network(), torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.arange(6) % 4
    result = saliency_under_noise(model, x, target, 0.5)
    change = (result.noisy - result.clean).flatten(1).norm(dim=1) / result.clean.flatten(1).norm(dim=1)
    torch.testing.assert_close(change, gradient_stability(model, x, target, 0.5, num_samples=1).values)


def test_the_rival_class_stays_that_of_the_image():
    def three_lines(x):  # beyond x = 0.01 the third logit overtakes the second
        return torch.stack([x[:, 0] * 0 + 1, x[:, 0] * 0, x[:, 0] - 0.01], dim=1)

    x = torch.zeros(1, 1, dtype=torch.float64)
    for seed in range(4):
        result = saliency_under_noise(three_lines, x, torch.tensor([0]), 1.0, seed=seed)
        assert result.clean.item() == result.noisy.item() == 0


def test_cosine_of_known_angles():
    angle = torch.tensor([0.0, 0.5, math.pi / 2, math.pi], dtype=torch.float64)
    a = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(4, 2)
    b = 1e-30 * torch.stack([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(cosine_agreement(a, b), angle.cos(), atol=1e-12, rtol=0)
    tiny = torch.full((1, 3), 1e-25)
    assert cosine_agreement(tiny, tiny).item() == pytest.approx(1, abs=1e-6)


def test_cosine_of_vanishing_maps():
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert cosine_agreement(zero, zero).item() == 1
    assert cosine_agreement(zero, one).item() == 0


def test_top_k_counts_common_entries():
    a = torch.arange(20.0).view(1, 4, 5)
    assert top_k_agreement(a, -a, 0.25).item() == 1
    assert top_k_agreement(a, a.flip(1, 2), 0.25).item() == 0
    b = a.clone()
    b[0, 3, 4] = 0  # leaves the top five, 14 enters
    assert top_k_agreement(a, b, 0.25).item() == pytest.approx(0.8)


def test_unrelated_maps_share_the_fraction():
    a, b = torch.randn(2, 200, 400)
    shared = top_k_agreement(a, b, 0.1).mean().item()  # standard deviation 0.0033
    assert shared == pytest.approx(0.1, abs=0.015)


def test_bad_arguments():
    a = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"`a` and `b` must have one shape \(B, …\), got \(2, 3\) and \(1, 3\)"):
        cosine_agreement(a, a[:1])
    with pytest.raises(ValueError, match=r"`fraction` must be at most 1, got 1\.5"):
        top_k_agreement(a, a, 1.5)
    with pytest.raises(ValueError, match="`radius` must be a finite number > 0"):
        saliency_under_noise(network(), a, torch.tensor([0, 1]), 0.0)
