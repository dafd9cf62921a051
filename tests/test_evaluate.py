"""examples/evaluate.py on a pickled module, on weights inside a checkpoint, and on a folder of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from lightning_lcnn.models import resnet18

matplotlib.use("Agg")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def evaluate(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import evaluate

    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--examples", "6", "--batch-size", "6"])
        evaluate.main()
        output = Path(arguments[arguments.index("--output") + 1])
        assert (output / "evaluation.png").stat().st_size > 1000
        return json.loads((output / "evaluation.json").read_text())

    return run


def smooth_network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Softplus(), nn.Linear(16, 10))


def test_a_pickled_module_on_digits(evaluate, tmp_path):
    torch.save(smooth_network(), tmp_path / "network.pt")
    result = evaluate("--model", str(tmp_path / "network.pt"), "--output", str(tmp_path))
    assert len(result["curvature_margin"]["values"]) == 6
    assert result["curvature_margin"]["converged"] == 1
    assert result["gradient_change_0.05"]["mean"] <= result["worst_gradient_change_0.05"]["mean"]
    assert result["adversarial"]["robust_accuracy_1"] <= result["adversarial"]["clean_accuracy"]


def test_weights_of_a_checkpoint_on_a_folder(evaluate, tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (9, 9), (40 * i, 100, 20)).save(tmp_path / split / name / f"{i}.png")
    network = resnet18(num_classes=2, width=2, low_curvature=True, input_size=(8, 8))
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": weights | {"accuracy.tp": torch.zeros(1)}}, tmp_path / "last.ckpt")
    where = ["--model", str(tmp_path / "last.ckpt"), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    shape = ["--size", "8", "--normalize", "0.5", "0.25"]
    with pytest.raises(ValueError, match="holds weights and no module; name the network with --arch"):
        evaluate(*where, *shape)
    result = evaluate(*where, *shape, "--arch", "resnet18", "--width", "2", "--low-curvature")
    assert 0 <= result["adversarial"]["clean_accuracy"] <= 1
