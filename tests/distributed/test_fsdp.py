"""FSDP2 on two processes over gloo: whatever reads a weight sees the whole of it. The file is its own worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_lcnn import fold, to_low_curvature
from lightning_lcnn.bounds import network_bound, trace
from lightning_lcnn.callbacks.curvature_monitor import graph_values, layer_values, network_totals, to_numbers
from lightning_lcnn.functional import operator_norm_bound, projected_gradient_attack
from lightning_lcnn.kernels.modes import whole
from lightning_lcnn.kernels.preserved_state import measuring
from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    PiecewiseSoftplus,
    SpectralConv2d,
    SpectralLinear,
    convert_sync_batchnorm,
    lcnn_parameter_groups,
    update_spectral_norm,
)
from lightning_lcnn.penalties import MODES, CurePenalty, CurvaturePenalty, GradientNormPenalty
from tests import ROOT
from tests.lightning_helpers import examples

STEPS = 6


class Block(nn.Module):
    """A residual branch, so that the graph has a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SpectralConv2d(4, 4, 3, padding=1, bias=False)  # the first forward tells it the input size
        self.norm = LipschitzBatchNorm2d(4, gamma=0.4)
        self.act = CenteredSoftplus(beta=3.0, num_channels=4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.norm(self.conv(x)))


def network(seed: int = 0) -> nn.Sequential:
    """Every kind of layer that has a β or γ, for inputs (B, 1, 6, 6)."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            SpectralConv2d(1, 4, 3, padding=1, input_size=(6, 6)),
            LipschitzBatchNorm2d(4, gamma=0.5),
            CenteredSoftplus(beta=4.0),
            Block(),
            nn.PReLU(),
            nn.Flatten(),
            SpectralLinear(144, 8, gamma=2.0),
            PiecewiseSoftplus((0.0, 6.0), (1.0, -1.0), beta=6.0),
            nn.Linear(8, 3),
        )


def without_batch_norm(net: nn.Sequential) -> nn.Sequential:
    """For bfloat16: torch's batch norm on the CPU refuses a bfloat16 weight beside float32 statistics."""
    net[1] = net[3].norm = nn.Identity()
    return net


def train(net: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """Penalised training on every ``world``-th example from ``rank`` on; the penalties on the way."""
    penalty = CurvaturePenalty(weight=0.3)
    optimizer = torch.optim.SGD(lcnn_parameter_groups(net, weight_decay=1e-3), lr=0.05, momentum=0.9)
    x, y = examples(8 * STEPS)
    values = []
    for step in range(STEPS):
        if step % 2 == 0:
            update_spectral_norm(net)
        batch = slice(8 * step + rank, 8 * (step + 1), world)
        loss = F.cross_entropy(net(x[batch]), y[batch])
        value = penalty(net)
        optimizer.zero_grad()
        (loss + value).backward()
        optimizer.step()
        values.append(value.item())
    return values


def measures(net: nn.Module) -> dict[str, float]:
    """All that reads parameters outside forward: monitor, penalties, bounds."""
    surrogate = trace(net).surrogate()
    with torch.no_grad():
        values = to_numbers(layer_values(net) | graph_values(surrogate) | network_totals(surrogate))
    values |= {mode: CurvaturePenalty(weight=1.0, mode=mode)(net).item() for mode in MODES}
    net.eval()
    example = torch.zeros(1, 1, 6, 6)
    values |= {f"{method} curvature": network_bound(net, example, method).curvature for method in ("fast", "tight")}
    values["slope"] = network_bound(net, example).slope
    values["norm"] = operator_norm_bound(net[0], (1, 6, 6))
    net.train()
    return values


def shard(net: nn.Module, reshard: bool | None, **options: Any) -> nn.Module:
    """As users do, block by block and then the rest; single layers too."""
    mesh = init_device_mesh("cpu", (2,))
    for part in (net[0], net[3], net[6], net):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, **options)
    return net


def full_state(net: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def run_training(rank: int, reshard: bool | None, folder: Path) -> dict[str, Any]:
    """Train in shards; compare what the shards measure with what an ordinary copy of them does."""
    net = shard(convert_sync_batchnorm(network()), reshard)
    penalties = train(net, rank, 2)
    kinds = {type(parameter).__name__ for parameter in net.parameters()}
    dcp.save(get_model_state_dict(net), checkpoint_id=folder / f"sharded-{reshard}")
    state, sharded = full_state(net), measures(net)
    result = {"penalties": penalties, "measures": sharded, "kinds": kinds, "rank": rank}
    if rank == 0:  # rank 1 gets no full state
        plain = convert_sync_batchnorm(network(1))
        plain[3].conv._see_input((4, 6, 6))
        plain.load_state_dict(state)
        result |= {"state": state, "plain": measures(plain)}
    return result


def run_penalties(rank: int) -> dict[str, Any]:
    """Collectives of a step without and with a penalty, which has seen the network before it was sharded; refusals."""
    x, y = examples(6)
    result: dict[str, Any] = {}
    for reshard in (False, True):
        net, penalty = without_batch_norm(network()), CurvaturePenalty(weight=0.3)
        penalty(net)
        shard(net, reshard)
        counts = []
        for penalties in ([], [penalty]):
            for _ in range(2):  # the first step of FSDP2 sets up more than it does later
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    loss = F.cross_entropy(net(x), y)
                    sum((p(net) for p in penalties), loss).backward()
                net.zero_grad()
            counts.append(sum(event.name.startswith("c10d::") for event in profile.events()))
        result[f"collectives {reshard}"] = counts
    for name, penalty in DATA_PENALTIES.items():
        result[name] = refusal(lambda penalty=penalty: penalty(net, x, y))
    result["convert"] = refusal(lambda: to_low_curvature(net, x))
    result["fold"] = refusal(lambda: fold(net))
    return result


def adversarial_step(net: nn.Module) -> tuple[Tensor, Tensor]:
    """An attack as AdversarialTraining makes it between two steps, and the gradient of its last layer on the result."""
    x, y = examples(6)
    F.cross_entropy(net(x), y).backward()
    net.zero_grad()
    with measuring(net, x, seed=0):
        net.eval()
        attacked = projected_gradient_attack(net, x, y, 0.3, num_steps=3, bounds=None)
    F.cross_entropy(net(attacked), y).backward()
    return attacked, whole(net[8].weight.grad)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


DATA_PENALTIES = {"gradient norm": GradientNormPenalty(weight=0.5), "cure": CurePenalty(weight=0.5)}


def run_meta(rank: int) -> dict[str, Any]:
    """Made without data, then in shards; the weights are drawn there."""
    torch.manual_seed(5)
    with torch.device("meta"):
        net = network()
    shard(net, None).to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    betas = [module.beta.detach() for module in net.modules() if isinstance(module, CenteredSoftplus)]
    gammas = [net[1].gamma.item(), net[3].norm.gamma.item(), net[6].gamma.item()]
    sigma = net[6].sigma().item()
    return {"betas": betas, "gammas": gammas, "sigma": sigma, "state": full_state(net)}


def run_mixed_precision() -> dict[str, Any]:
    """Weights gathered in bfloat16; the penalty reads the float32 shards."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    net = shard(without_batch_norm(network()), True, mp_policy=policy)
    x, _ = examples(4)
    output = net(x).float()
    value = CurvaturePenalty(weight=1.0)(net)
    (output.square().mean() + value).backward()
    gradients = [parameter.grad.full_tensor() for parameter in net.parameters()]
    finite = all(gradient.isfinite().all() for gradient in gradients)
    return {"output": output.detach(), "penalty": value.item(), "finite": finite}


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    result = {str(reshard): run_training(rank, reshard, folder) for reshard in (None, True)}
    result |= {"meta": run_meta(rank), "mixed": run_mixed_precision(), "penalties": run_penalties(rank)}
    result["attack"] = adversarial_step(shard(without_batch_norm(network()), True))
    torch.save(result, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # FSDP2 on gloo leaves a thread behind that sometimes aborts the interpreter's own exit, after all is done
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Folder, and what the two processes found; one start serves all tests."""
    folder = tmp_path_factory.mktemp("fsdp")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in workers]
    assert [process.returncode for process in workers] == [0, 0], "\n".join(errors)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> tuple[nn.Sequential, list[float]]:
    """The same training in one process, and its penalties."""
    net = network()
    return net, train(net)


@pytest.mark.parametrize("reshard", ["None", "True"])
def test_training_in_shards_equals_training_in_one_process(results, alone, reshard: str) -> None:
    net, penalties = alone
    for rank in results[1]:
        assert rank[reshard]["kinds"] == {"DTensor"}
        # the mean of two halves rounds differently from one mean, and six steps of momentum carry it on
        assert rank[reshard]["penalties"] == pytest.approx(penalties, rel=1e-5)
    assert max(penalties) - min(penalties) > 0.01  # they moved
    state = results[1][0][reshard]["state"]
    assert list(state) == list(net.state_dict())
    for name, value in net.state_dict().items():
        assert torch.allclose(state[name], value, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("reshard", ["None", "True"])
def test_shards_are_measured_as_the_whole(results, alone, reshard: str) -> None:
    first, second = (rank[reshard] for rank in results[1])
    assert first["measures"] == second["measures"]
    assert first["measures"].keys() == first["plain"].keys()
    for name, value in first["plain"].items():  # the ordinary copy holds the very same numbers
        assert first["measures"][name] == pytest.approx(value, rel=1e-6), name
    for name, value in measures(alone[0]).items():
        assert value == pytest.approx(first["plain"][name], rel=1e-3, abs=1e-5), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled.*single process")  # as meant
def test_sharded_checkpoint_of_two_processes_loads_in_one(results) -> None:
    folder, ranks = results
    net = network(1)
    net[3].conv._see_input((4, 6, 6))
    state = net.state_dict()
    dcp.load(state, checkpoint_id=folder / "sharded-True", no_dist=True)
    net.load_state_dict(state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, ranks[0]["True"]["state"][name]), name


def test_network_made_on_the_meta_device_starts_as_it_was_told(results) -> None:
    for rank in (rank["meta"] for rank in results[1]):
        expected = [beta.detach() for beta in (m.beta for m in network().modules() if isinstance(m, CenteredSoftplus))]
        torch.testing.assert_close(rank["betas"], expected)
        assert rank["gammas"] == pytest.approx([0.5, 0.4, 2.0])
    weight = results[1][0]["meta"]["state"]["6.weight"]
    assert rank["sigma"] == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-3)


def test_penalty_adds_no_collective_where_weights_stay_whole_until_backward(results) -> None:
    for rank in (rank["penalties"] for rank in results[1]):
        without, penalised = rank["collectives False"]
        assert without == penalised > 0
        without, penalised = rank["collectives True"]
        # one for each of two numbers β and one β per channel, γ of the linear layer, the PReLU and the output layer
        assert penalised == without + 6


def test_penalties_on_input_gradients_refuse_shards(results) -> None:
    for name in DATA_PENALTIES:
        assert "sharded (FSDP2)" in results[1][0]["penalties"][name]
        assert "strategy='ddp'" in results[1][0]["penalties"][name]


def test_adversarial_examples_are_those_of_one_process(results) -> None:
    x, _ = examples(6)
    attacked, gradient = adversarial_step(without_batch_norm(network()))
    assert (attacked - x).abs().max() > 0.05
    for rank in results[1]:
        torch.testing.assert_close(rank["attack"], (attacked, gradient))


@pytest.mark.parametrize("name", ["convert", "fold"])
def test_conversion_refuses_shards(results, name: str) -> None:
    assert "convert before `fully_shard`" in results[1][0]["penalties"][name]


def test_mixed_precision(results) -> None:
    net = without_batch_norm(network())
    expected = net(examples(4)[0])
    for rank in (rank["mixed"] for rank in results[1]):
        assert rank["finite"]
        assert rank["penalty"] == pytest.approx(CurvaturePenalty(weight=1.0)(net).item(), rel=1e-6)
        assert (rank["output"] - expected).abs().max() < 0.03 * expected.abs().max()  # bfloat16 keeps 8 bits


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
