"""The examples evaluate.py and train_image_folder.py on modules, weights and folders of images."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from torch import nn

from lightning_lcnn.models import resnet18
from tests import ROOT

matplotlib.use("Agg")
EXAMPLES = ROOT / "examples"


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
    assert len(result["curvature_values"]) == 6
    assert result["converged"]["margin"] == 1
    assert result["stand_in_beta"] is None
    assert result["gradient_change"]["0.05"] <= result["gradient_change"]["0.15"]
    assert result["adversarial_accuracy"]["1"] <= result["adversarial_accuracy"]["0.05"]


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
    with pytest.raises(ValueError, match="holds weights and no network; name it"):
        evaluate(*where, *shape)
    result = evaluate(*where, *shape, "--arch", "resnet18", "--width", "2", "--low-curvature")
    assert result["examples"] == 6
    assert len(result["betas"]) == 17


def test_training_on_a_folder_of_images(monkeypatch, tmp_path):
    from PIL import Image

    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (9, 9), (20 * i, 100, 20)).save(tmp_path / "train" / name / f"{i}.png")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import train_image_folder

    options = ["--epochs", "1", "--width", "2", "--size", "8", "--batch-size", "2", "--measure", "4", "--output", "out"]
    monkeypatch.setattr(sys, "argv", ["train_image_folder.py", "--data", str(tmp_path), *options])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        train_image_folder.main()
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (record["examples"], record["measured_examples"], record["name"]) == (4, 4, "low-curvature")
    weights = torch.load(tmp_path / "out/weights.pt", weights_only=True)
    resnet18(2, 2, low_curvature=True, input_size=(8, 8)).load_state_dict(weights)
