"""examples/explanations.py with tiny settings: digits with training, a folder of images with checkpoints, mistakes."""

from __future__ import annotations

import re
import sys

import matplotlib
import pytest
import torch
from torch import nn

from tests import ROOT

matplotlib.use("Agg")
EXAMPLES = ROOT / "examples"


@pytest.fixture
def explanations(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import explanations

    return explanations


@pytest.fixture
def run(explanations, monkeypatch, tmp_path, capsys):
    def run(*arguments: str) -> str:
        small = ["--measured", "6", "--shown", "2", "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["explanations.py", *arguments, *small])
        explanations.main()
        assert (tmp_path / "out" / "gradient.png").stat().st_size > 1000
        return capsys.readouterr().out

    return run


def network(features: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 8), nn.Softplus(beta=50), nn.Linear(8, classes)).eval()


def test_digits_with_training(run, tmp_path):
    output = run("--epochs", "1", "--radii", "0.25")
    assert (tmp_path / "out" / "table.txt").read_text() in output + "\n"
    first, second = map(float, re.search(r"GradientStability, ℓ₂ 0.25 +([\d.]+) % +([\d.]+) %", output).groups())
    assert first > 0
    assert second > 0
    cosines = [float(value) for value in re.search(r"cosine +(\S+) +(\S+)", output).groups()]
    assert all(0 < value <= 1 for value in cosines)


def test_a_folder_of_images_and_pickled_networks(run, tmp_path):
    from PIL import Image

    for name in ("cats", "dogs"):
        for split in ("train", "test"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                colour = (40 * i, 100, 20 + 100 * (name == "dogs"))
                Image.new("RGB", (8, 8), colour).save(tmp_path / split / name / f"{i}.png")
    for name in ("a", "b"):
        torch.save(network(3 * 8 * 8, 2), tmp_path / f"{name}.pt")
    where = ["--data", str(tmp_path), "--standard", str(tmp_path / "a.pt"), "--low-curvature", str(tmp_path / "b.pt")]
    with pytest.raises(ValueError, match="--trust"):
        run(*where)
    assert "GradientStability, ℓ₂ 0.15" in run(*where, "--size", "8", "--trust")


def test_captum_agrees_with_the_gradient(explanations):
    pytest.importorskip("captum", reason="captum is not installed: pip install 'lightning-lcnn[explain]'")
    model, images, labels = network(16, 3), torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    maps = {name: explain(images, labels) for name, explain in explanations.captum_explanations(model).items()}
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[range(5), labels].sum(), leaf)
    torch.testing.assert_close(maps["Saliency"], gradient.abs())
    # completeness: integrated gradients add up to the difference from the black image; 32 steps leave a per mille
    total = maps["IntegratedGradients"].flatten(1).sum(1)
    difference = (model(images) - model(torch.zeros_like(images)))[range(5), labels]
    torch.testing.assert_close(total.float(), difference.detach(), atol=5e-3, rtol=5e-3)


def test_a_linear_network_has_explanations_that_noise_does_not_change(explanations):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    agreement = explanations.measure(linear, torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), 0.5)["gradient"]
    assert agreement.change < 1e-6
    assert agreement.cosine == pytest.approx(1, abs=1e-6)
    assert agreement.top == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "x"], "--data needs --standard and --low-curvature"),
        (["--standard", "x"], "--standard and --low-curvature need --data"),
    ],
)
def test_incomplete_arguments(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err
