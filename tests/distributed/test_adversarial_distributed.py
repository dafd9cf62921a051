"""Adversarial training in two processes over gloo; run as a script, this file is what both of them do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lcnn.callbacks import AdversarialTraining
from tests import ROOT
from tests.callbacks.test_adversarial_training import classifier, fast_gradient, pixels
from tests.distributed.worker import Count, Save
from tests.lightning_helpers import FILTERS, trainer

pytestmark = FILTERS
CALLBACKS = {
    "standard": lambda: [],
    "random": lambda: [AdversarialTraining(0.1)],
    "by_hand": lambda: [AdversarialTraining(0.1, fast_gradient, norm="linf")],
}


def same_for_both() -> DataLoader[Any]:
    """Without a sampler every process gets the same batches."""
    return DataLoader(TensorDataset(*pixels()), batch_size=2)


def main(out: Path) -> None:
    for name, callbacks in CALLBACKS.items():
        module = classifier()
        callbacks = [*callbacks(), Save(out / name), Count(out / f"{name}-count")]
        runner = trainer(strategy="ddp", devices=2, callbacks=callbacks, use_distributed_sampler=False)
        runner.fit(module, same_for_both())
        torch.save([batch[0] for batch in module.seen], out / f"{name}-seen-{runner.global_rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes have saved."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def load(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]


def test_ranks_agree_on_the_network_and_differ_in_their_random_starts(folder: Path) -> None:
    first, second = (saved["state"] for saved in load(folder, "random"))
    weights = [name for name in first if "running" not in name]  # those are of each rank's own batches
    assert all(torch.equal(first[name], second[name]) for name in weights)
    seen: list[list[Tensor]] = load(folder, "random-seen")
    assert not any(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_an_attack_without_random_numbers_gives_what_one_process_gives(folder: Path) -> None:
    """Both processes see the same, so that their mean gradient is that of one."""
    module = classifier()
    trainer(callbacks=CALLBACKS["by_hand"]()).fit(module, same_for_both())
    for saved in load(folder, "by_hand"):
        for name, value in module.state_dict().items():
            assert torch.allclose(saved["state"][name], value, rtol=1e-5, atol=1e-7), name


def test_the_attack_communicates_nothing(folder: Path) -> None:
    for name in ("random", "by_hand"):
        for standard, adversarial in zip(load(folder, "standard-count"), load(folder, f"{name}-count"), strict=True):
            assert "c10d::allreduce_" in standard["collectives"]
            assert adversarial["collectives"] == standard["collectives"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
