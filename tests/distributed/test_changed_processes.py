"""Checkpoints of two processes go on in one, and of one in two that torchrun starts: with DDP and in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_distributed import TORCHRUN, assert_close, differing, load, run_worker
from tests.distributed.worker import Synchronised, watched
from tests.lightning_helpers import FILTERS, loader, trainer

pytestmark = FILTERS


def fit(**kwargs: Any) -> tuple[Any, Synchronised]:
    """Training in one process, on the batches that both ranks see together."""
    module = Synchronised()
    options = {"max_epochs": 2} | {key: kwargs.pop(key) for key in ("max_epochs",) if key in kwargs}
    runner = trainer(callbacks=watched(), **options)
    runner.fit(module, val_dataloaders=loader(8), **kwargs)
    return runner, module


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worker wrote, which began with one process's checkpoint and left some of its own."""
    folder = tmp_path_factory.mktemp("resume")
    fit(max_epochs=1)[0].save_checkpoint(folder / "one.ckpt")
    return run_worker(folder, "ddp", "lightning.pytorch", "resume", "model_parallel", launcher=TORCHRUN)


@pytest.fixture(scope="module")
def straight() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics and state of two epochs in one process."""
    runner, module = fit()
    return {name: float(value) for name, value in runner.callback_metrics.items()}, module.state_dict()


@pytest.mark.parametrize("name", ["one-two", "one-shards", "shards-shards"])
def test_two_processes_go_on(results: Path, straight: Any, name: str) -> None:
    first, second = load(results, name)
    assert first["step"] == 12
    assert differing(first, second) == []
    assert_close(first["state"], straight[1])
    expected = straight[0]
    assert {"lcnn/log_ratio", "lcnn/certified_slope", "lcnn/certified_curvature"} < set(expected)
    for key, value in expected.items():
        assert first["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("name", ["two", "shards"])
def test_one_process_goes_on_with_the_checkpoint_of_two(results: Path, straight: Any, name: str) -> None:
    half = load(results, f"{name}-half")[0]
    assert half["step"] == 6
    assert not torch.allclose(half["state"]["net.0.weight"], straight[1]["net.0.weight"], rtol=1e-2)
    _, module = fit(ckpt_path=results / f"{name}.ckpt")
    assert_close(module.state_dict(), straight[1])
