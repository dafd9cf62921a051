"""Two real processes over gloo: ranks agree, the penalty counts once, and training communicates nothing more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lcnn.callbacks import PenaltyCallback, PowerIteration
from lightning_lcnn.penalties import CurvaturePenalty
from tests import ROOT
from tests.distributed.worker import ByCallback
from tests.lightning_helpers import FILTERS, trainer

pytestmark = FILTERS


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_worker(folder: Path, strategy: str, package: str, *scenarios: str, launcher: tuple[str, ...] = ()) -> Path:
    """Run the worker script; Lightning starts the second process, or the launcher both."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LCNN_TEST_PACKAGE": package}
    script = str(ROOT / "tests" / "distributed" / "worker.py")
    command = [sys.executable, "-W", "ignore", *launcher, script, strategy, str(folder), *scenarios]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def popen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all scenarios under strategy="ddp"."""
    folder = tmp_path_factory.mktemp("ddp")
    return run_worker(folder, "ddp", "lightning.pytorch", "mixin", "callback", "collectives", "stranger")


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


def differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    assert first["state"].keys() == second["state"].keys()
    return [name for name, value in first["state"].items() if not torch.equal(value, second["state"][name])]


def one_process() -> dict[str, torch.Tensor]:
    """The same six steps on the batches that both ranks see together."""
    module = ByCallback()
    callbacks = [PowerIteration(every_n_steps=2), PenaltyCallback(CurvaturePenalty(weight=0.3))]
    trainer(callbacks=callbacks).fit(module)
    return module.state_dict()


@pytest.mark.parametrize("name", ["mixin", "callback", "straight", "half", "resumed"])
def test_ranks_are_equal_to_the_last_bit(popen: Path, name: str) -> None:
    assert differing(*load(popen, name)) == []


@pytest.mark.parametrize("name", ["mixin", "callback"])
def test_two_processes_equal_one(popen: Path, name: str) -> None:
    assert_close(load(popen, name)[0]["state"], one_process())


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():  # the mean of two means rounds differently from one mean
        assert torch.allclose(state[name], value, rtol=1e-4, atol=1e-5), name


def test_no_more_collectives_than_a_standard_network(popen: Path) -> None:
    for standard, ours in zip(load(popen, "standard-count"), load(popen, "converted-count"), strict=True):
        assert "c10d::allreduce_" in standard["collectives"]
        assert ours["collectives"] == standard["collectives"]
        assert ours["buffers"] == standard["buffers"] == 9  # running mean, variance and count: no spectral vectors


def test_resumed_training_is_equal_to_the_last_bit(popen: Path) -> None:
    straight, resumed, half = (load(popen, name)[0] for name in ("straight", "resumed", "half"))
    assert (straight["step"], half["step"]) == (6, 3)
    assert differing(straight, resumed) == []
    assert differing(straight, half) != []


@pytest.mark.parametrize(
    ("strategy", "package", "name"),
    [("ddp_spawn", "lightning.pytorch", "mixin"), ("ddp_fork", "pytorch_lightning", "callback")],
)
def test_spawn_and_fork(strategy: str, package: str, name: str, tmp_path: Path) -> None:
    run_worker(tmp_path, strategy, package, name)
    first, second = load(tmp_path, name)
    assert differing(first, second) == []
    assert_close(first["state"], one_process())
