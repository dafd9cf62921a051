"""Metrics on two real processes over gloo; the file is its own worker script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import MetricCollection

from lightning_lcnn.functional import normalized_curvature
from lightning_lcnn.metrics import AdversarialAccuracy, GradientStability, InputHessianNorm, NormalizedCurvature


def network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), nn.Softplus(), nn.Linear(12, 4)).eval()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 6, generator=generator), torch.randint(0, 4, (12,), generator=generator)


def collection() -> MetricCollection:
    return MetricCollection(
        {
            "hessian": InputHessianNorm(reduction=["mean", "median", 0.9, "converged"]),
            "curvature": NormalizedCurvature(reduction=["none"]),
            "stability": GradientStability(0.2, statistic="worst", reduction=["mean"]),
            "adversarial": AdversarialAccuracy([0.1, 0.4], full=True),
            "weak": AdversarialAccuracy([0.01, 0.02], full=True),
        }
    )


def measured(metrics: MetricCollection, pieces: list[slice]) -> dict[str, list[float]]:
    model, (x, y) = network(), data()
    for piece in pieces:
        metrics.update(model, x[piece], y[piece])
    result = metrics.compute()
    return {name: sorted(value.reshape(-1).tolist()) for name, value in result.items()}


def run_metrics(rank: int) -> dict[str, object]:
    """Shards of 5 + 3 and 4 examples; then all 12 on rank 0 and an empty rank 1, twice, across a reset."""
    metrics = collection()
    uneven = measured(metrics, [slice(0, 5), slice(5, 8)] if rank == 0 else [slice(8, 12)])
    metrics.reset()
    one_sided = measured(metrics, [slice(0, 12)] if rank == 0 else [slice(0, 0)])
    return {"uneven": uneven, "one_sided": one_sided}


def run_sharded(rank: int) -> dict[str, object]:
    """FSDP2: two kinds of products work, the third says so, and so does a first forward in inference mode."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, y = data()
    mesh = init_device_mesh("cpu", (2,))

    def sharded() -> nn.Module:
        model = network()
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        return model

    def attempt(model: nn.Module, hvp: str) -> list[float] | str:
        try:
            return normalized_curvature(model, x, y, hvp=hvp).values.tolist()
        except RuntimeError as error:
            return str(error)

    result: dict[str, object] = {}
    model = sharded()
    with torch.inference_mode():
        result["forward_over_reverse"] = attempt(model, "forward_over_reverse")
    result["finite_difference"] = attempt(sharded(), "finite_difference")
    result["double_backward"] = attempt(sharded(), "double_backward")
    spoiled = sharded()
    with torch.inference_mode():
        spoiled(x)
    result["after_inference_mode"] = attempt(spoiled, "finite_difference")
    return result


def worker(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {"metrics": run_metrics(rank), "sharded": run_sharded(rank)}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    # FSDP2 on gloo leaves a thread behind that sometimes aborts the interpreter's own exit, after all is done
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes found; one start serves all tests."""
    folder = tmp_path_factory.mktemp("ddp")
    workers = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_uneven_shards_equal_the_union(results):
    expected = measured(collection(), [slice(0, 12)])
    for result in results:
        for case, measures in result["metrics"].items():
            assert measures.keys() == expected.keys()
            for name, values in expected.items():
                assert measures[name] == pytest.approx(values, rel=1e-5), (case, name)


def test_sharded_models(results):
    expected = normalized_curvature(network(), *data()).values.tolist()
    for result in (rank["sharded"] for rank in results):
        assert result["forward_over_reverse"] == pytest.approx(expected, rel=1e-5)
        assert result["finite_difference"] == pytest.approx(expected, rel=1e-2)  # h = 5e-3 in float32
        assert "sharded (FSDP2)" in result["double_backward"]
        assert "hvp='forward_over_reverse'" in result["double_backward"]
        assert "Trainer(inference_mode=False)" in result["after_inference_mode"]


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
