"""Time of the activation alone, forward and backward: the centered softplus against ReLU.

    python examples/benchmark_activation.py [--rounds N] [--threads N]

Both in place, on two million values as ResNet-18 of width 16 has in its first layers at batch 128. Prints a Markdown
table; ratios are medians over the rounds of the ratio to ReLU in the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from benchmarking import interleaved_seconds, machine, ratio, table
from torch import nn

from lightning_lcnn.functional import use_compiled_softplus
from lightning_lcnn.layers import CenteredSoftplus

PLAIN = "ReLU"
REPEATS = 10  # in one turn, each on the output of the one before


def build() -> dict[str, Callable[[], object]]:
    """Forward and backward of each activation, and before it the renewal of its input."""
    torch.manual_seed(0)
    values = torch.randn(128, 16, 32, 32)
    source, upstream = values.clone(), torch.randn_like(values)

    def task(activation: nn.Module, kernels: bool = False) -> Callable[[], None]:
        def run() -> None:
            use_compiled_softplus(kernels)
            for _ in range(REPEATS):
                leaf = source.detach().requires_grad_()
                output = activation(Borrowed.apply(leaf))
                torch.autograd.grad(output, [leaf, *activation.parameters()], upstream)  # accumulates nothing

        return run

    activations = {
        PLAIN: task(nn.ReLU(inplace=True)),
        "centered softplus": task(CenteredSoftplus(10.0, inplace=True)),
        "fixed β": task(CenteredSoftplus(10.0, learnable=False, inplace=True)),
        "compiled softplus": task(CenteredSoftplus(10.0, inplace=True), kernels=True),
        "compiled softplus, fixed β": task(CenteredSoftplus(10.0, learnable=False, inplace=True), kernels=True),
    }
    tasks: dict[str, Callable[[], object]] = {}
    for name, run in activations.items():
        tasks[f"input of {name}"] = lambda: source.copy_(values)
        tasks[name] = run
    return tasks


class Borrowed(torch.autograd.Function):
    """The values of a leaf, which an activation may then overwrite; costs nothing."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        """Return the same memory as a new tensor."""
        return x.detach()

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        """Pass on the gradient."""
        return grad


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("cpu"), end="\n\n")
    tasks = build()
    seconds = interleaved_seconds(tasks, options.rounds)
    rows = [("", "ms", "time ratio")]
    for name in [name for name in tasks if not name.startswith("input of")]:
        rows.append((name, f"{1e3 * median(seconds[name]) / REPEATS:.2f}", f"{ratio(seconds, name, PLAIN):.2f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
