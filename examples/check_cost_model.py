"""Compare the cost model of docs/scaling.md with what is counted and what is measured, at three sizes.

    python examples/check_cost_model.py
    python examples/check_cost_model.py --size 16:32:128 --rounds 5

Paper and FLOPs are exact where nothing but convolutions and linear layers counts; the time shows what else there is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import interleaved_seconds, machine, table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_lcnn.functional import input_gradient_norm, input_hessian_norm
from lightning_lcnn.layers import update_spectral_norm
from lightning_lcnn.metrics import AdversarialAccuracy, GradientStability
from lightning_lcnn.models import resnet18
from lightning_lcnn.penalties import CurvaturePenalty, GradientNormPenalty, Penalty

EVERY_N_STEPS, ITERATIONS = 10, 5  # PowerIteration's defaults
PRODUCTS, SAMPLES, ATTACK_STEPS = 20, 8, 20  # defaults of Hessian norm, stability and attack


@dataclass(frozen=True)
class Part:
    """Something that costs: on paper in forward passes of one example, and to be run."""

    name: str
    passes: float
    run: Callable[[], object]
    times: int = 1  # how many of what is on paper one run does


class FlopCounter(TorchDispatchMode):
    """Counts multiplications and additions of convolutions and matrix products, twice each."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and add its cost."""
        result = func(*args, **(kwargs or {}))
        rule = flop_registry.get(func._overloadpacket)
        if rule is not None:
            self.total += rule(*args, **(kwargs or {}), out_val=result)
        return result


def flops(task: Callable[[], object]) -> int:
    """What one run of the task costs."""
    with FlopCounter() as counter:
        task()
    return counter.total


def training_step(network: nn.Module, x: Tensor, y: Tensor, *penalties: Penalty) -> None:
    """Forward and backward; penalties on input gradients take the logits that the step has."""
    x = x.clone().requires_grad_(any(penalty.needs_batch for penalty in penalties))
    logits = network(x)
    loss = F.cross_entropy(logits, y)
    for penalty in penalties:
        loss = loss + (penalty(network, x, y, logits=logits) if penalty.needs_batch else penalty(network))
    loss.backward()
    network.zero_grad()


def parts(width: int, size: int, batch: int) -> tuple[list[Part], Callable[[], object]]:
    """Everything that the cost model speaks of, the ReLU network's step first; and one forward pass of an example."""
    torch.manual_seed(0)
    plain = resnet18(width=width, input_size=(size, size))
    low = resnet18(width=width, input_size=(size, size), low_curvature=True)
    x = torch.rand(batch, 3, size, size)
    y = low(x).argmax(1)  # after a training pass, so that batch norm knows its statistics
    measured = resnet18(width=width, input_size=(size, size), low_curvature=True).eval()
    measured.load_state_dict(low.state_dict())
    y_measured = measured(x).argmax(1)  # right everywhere: every example is attacked
    stability = GradientStability(0.1, num_samples=SAMPLES)
    attacked = AdversarialAccuracy(1e-4, attack_kwargs={"num_steps": ATTACK_STEPS})
    curvature = CurvaturePenalty()
    rows = [
        Part("step, ReLU", 3 * batch, lambda: training_step(plain, x, y)),
        Part("step, low curvature", 3 * batch, lambda: training_step(low, x, y)),
        Part("… and curvature penalty", 3 * batch, lambda: training_step(low, x, y, curvature)),
        Part(
            "a tenth of a refresh",
            (2 * ITERATIONS + 1) / EVERY_N_STEPS,
            lambda: update_spectral_norm(low, ITERATIONS),
            EVERY_N_STEPS,
        ),
        Part("step with gradient norm", 6 * batch, lambda: training_step(low, x, y, GradientNormPenalty(1e-3))),
        Part("input gradients", 2 * batch, lambda: input_gradient_norm(measured, x, y_measured)),
        Part("gradient stability", 2 * (1 + SAMPLES) * batch, lambda: stability.update(measured, x, y_measured)),
        Part(
            "Hessian norm",
            (2 + 2 * PRODUCTS) * batch,
            lambda: input_hessian_norm(measured, x, y_measured, num_hvps=PRODUCTS),
        ),
        Part("attack, one radius", (4 + 2 * ATTACK_STEPS) * batch, lambda: attacked.update(measured, x, y_measured)),
    ]
    return rows, lambda: plain(x[:2])


def compare(width: int, size: int, batch: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """Name, and cost relative to the ReLU network's step: on paper, counted, and in time."""
    rows, two_examples = parts(width, size, batch)
    unit = flops(two_examples) / 2
    seconds = interleaved_seconds({row.name: row.run for row in rows}, rounds) if rounds else {}
    reference = rows[0]
    result = []
    for row in rows:
        counted = flops(row.run) / row.times / unit / reference.passes
        pairs = zip(seconds.get(row.name, ()), seconds.get(reference.name, ()), strict=True)
        time = median(a / b for a, b in pairs) / row.times if rounds else float("nan")
        result.append((row.name, row.passes / reference.passes, counted, time))
    return result


def main() -> None:
    """Print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = ["8:32:64", "16:32:64", "16:64:16"]
    parser.add_argument("--size", nargs="+", default=sizes, metavar="WIDTH:RESOLUTION:BATCH")
    parser.add_argument("--rounds", type=int, default=3, help="0 counts only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("cpu"))
    for size in options.size:
        width, resolution, batch = map(int, size.split(":"))
        print(f"\nResNet-18 of width {width}, {resolution}×{resolution} images, batch {batch}\n")
        head = ("relative to the ReLU network's step", "paper", "FLOPs", "time")
        rows = compare(width, resolution, batch, options.rounds)
        cells = [(name, *(f"{number:.3g}" for number in numbers)) for name, *numbers in rows]
        print(table([head, *cells]), flush=True)


if __name__ == "__main__":
    main()
