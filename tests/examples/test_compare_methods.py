"""The comparison of methods on digits: all methods run, resume, survive NaN and refuse to mix settings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch

from tests import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import compare_methods

    return compare_methods


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    preset = script.PRESETS["digits"]
    small = replace(preset, examples=4, attack_examples=8, stability_radii=(0.1, 0.2), attack_radii=(0.25,))
    monkeypatch.setitem(script.PRESETS, "digits", small)

    def run(*arguments: str) -> Path:
        command = ["compare_methods.py", "--epochs", "2", "--seeds", "0", "--output", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        script.main()
        return tmp_path / "digits"

    return run


def test_every_method_trains_and_is_measured(script, run):
    folder = run("--epochs", "1")
    results = json.loads((folder / "results.json").read_text())
    assert [record["settings"]["method"] for record in results["runs"]] == list(script.METHODS)
    assert all(record["status"] == "finished" for record in results["runs"])
    ratios = results["time_per_step"]
    assert ratios["standard"] == 1.0
    assert ratios["adversarial-l2"] > 1.5  # three attack steps
    losses = {(folder / name / "seed0" / "history.csv").read_text() for name in script.METHODS}
    assert len(losses) == len(script.METHODS)  # no two methods are the same
    table = (folder / "results.md").read_text()
    assert all(f"| {name} |" in table for name in script.METHODS)
    assert {path.name for path in folder.glob("*.png")} == {"accuracy.png", "stability.png", "adversarial.png"}


def test_interrupted_run_ends_as_an_uninterrupted_one(script, run, monkeypatch, tmp_path):
    weights = torch.load(run("--methods", "lcnn") / "lcnn/seed0/network.pt", weights_only=False).state_dict()
    whole = tmp_path / "digits"
    whole.rename(tmp_path / "whole")

    def stop(module: L.LightningModule) -> None:
        if module.current_epoch == 1:
            raise KeyboardInterrupt

    training = sys.modules["comparison.training"]
    with monkeypatch.context() as patch:
        patch.setattr(training.Study, "on_train_epoch_end", stop)
        patch.setattr("signal.signal", lambda *arguments: None)  # Lightning ignores further interrupts
        with pytest.raises(SystemExit, match="interrupted: the same command goes on"):
            run("--methods", "lcnn")
    assert not (whole / "lcnn/seed0/run.json").exists()
    assert (whole / "lcnn/seed0/interrupted.ckpt").exists()
    resumed = torch.load(run("--methods", "lcnn") / "lcnn/seed0/network.pt", weights_only=False).state_dict()
    assert len((whole / "lcnn/seed0/history.csv").read_text().splitlines()) == 3  # a header and two epochs
    for key, value in weights.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:a spectral layer has the stale norm")
def test_nan_ends_one_run_and_not_the_others(script, run, monkeypatch):
    monkeypatch.setitem(script.METHODS, "lcnn", replace(script.METHODS["lcnn"], defaults={"learning_rate": 1e30}))
    with pytest.warns(UserWarning, match="lcnn, seed 0: the loss became .* in epoch 0"):
        folder = run("--methods", "lcnn", "standard")
    records = json.loads((folder / "results.json").read_text())["runs"]
    assert [record["status"] == "finished" for record in records] == [False, True]
    assert "the loss became" in (folder / "results.md").read_text()


def test_refusals(script, run):
    run("--methods", "standard")
    with pytest.raises(SystemExit, match=r"error: .*standard/seed0 holds a run of other settings \(epochs\)"):
        run("--methods", "standard", "--epochs", "3")
    with pytest.raises(SystemExit, match="error: this preset needs --data DIR"):
        run("--preset", "cifar10-small")
    with pytest.raises(SystemExit, match=r"error: .*run that with the same seed first"):
        run("--methods", "lcnn-fine-tuned", "--seeds", "5")


def test_search_measures_on_the_validation_split(script, run, monkeypatch):
    monkeypatch.setitem(
        script.METHODS, "lcnn", replace(script.METHODS["lcnn"], grid=({"weight": 0.0}, {"weight": 1.0}))
    )
    folder = run("--methods", "lcnn", "--search")
    records = json.loads((folder / "search.json").read_text())
    assert [record["settings"]["options"]["weight"] for record in records] == [0.0, 1.0]
    assert all(record["evaluation"]["examples"] == script.PRESETS["digits"].validation for record in records)
    assert records[1]["evaluation"]["curvature"]["margin"] < records[0]["evaluation"]["curvature"]["margin"]
