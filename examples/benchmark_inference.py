"""Time of inference: the folded low-curvature ResNet-18 against the plain one with ReLU.

    python examples/benchmark_inference.py [--size WIDTH:BATCH ...] [--compile] [--device cuda --bf16] ...

"compiled softplus" are rows of eager networks with :func:`lightning_lcnn.functional.use_compiled_softplus`.
Prints a Markdown table; ratios are medians over the rounds of the ratio to the plain network in the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from benchmarking import arguments, interleaved_seconds, peak_memory, print_tables, ratio, table
from torch import nn

from lightning_lcnn import fold
from lightning_lcnn.functional import use_compiled_softplus
from lightning_lcnn.layers import CenteredSoftplus
from lightning_lcnn.models import resnet18

PLAIN = "ReLU"


def with_relu(network: nn.Module) -> nn.Module:
    """Replace every centered softplus by ReLU: what is left is the cost of everything else."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, CenteredSoftplus):
                setattr(module, name, nn.ReLU(inplace=True))
    return network


def build(options: argparse.Namespace, width: int, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Inference of one batch by each network."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, device=options.device)
    plain, ours = resnet18(10, width), resnet18(10, width, low_curvature=True)
    networks = {
        PLAIN: plain,
        "ReLU, batch norm fused": fold(resnet18(10, width, low_curvature=True), images.cpu(), batch_norm="fuse"),
        "low curvature": ours,
        "folded": fold(ours),
        "folded, batch norm fused": fold(ours, images.cpu(), batch_norm="fuse"),
        "folded, with ReLU": with_relu(fold(ours)),
    }
    with_relu(networks["ReLU, batch norm fused"])

    def task(network: nn.Module, kernels: bool = False) -> Callable[[], torch.Tensor]:
        network = network.to(options.device).eval()
        if options.channels_last:
            network = network.to(memory_format=torch.channels_last)
        called = torch.compile(network) if options.compile else network

        @torch.inference_mode()
        def run() -> torch.Tensor:
            use_compiled_softplus(kernels)  # of the whole process, so every task sets it
            with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
                return called(images)

        return run

    if options.channels_last:
        images = images.to(memory_format=torch.channels_last)
    tasks = {name: task(network) for name, network in networks.items()}
    if not options.compile and options.device == "cpu":
        for name in ("low curvature", "folded", "folded, batch norm fused"):
            tasks[f"{name}, compiled softplus"] = task(networks[name], kernels=True)
    return tasks


def measure(options: argparse.Namespace, width: int, batch: int) -> str:
    """Table of one size."""
    tasks = build(options, width, batch)
    seconds = interleaved_seconds(tasks, options.rounds, options.device)
    memory = {name: peak_memory(task, options.device) for name, task in tasks.items()}
    rows = [("", "ms", "time ratio", "peak MB of activations", "memory ratio")]
    for name in tasks:
        times = f"{1e3 * median(seconds[name]):.0f}", f"{ratio(seconds, name, PLAIN):.2f}"
        rows.append((name, *times, f"{memory[name] / 2**20:.0f}", f"{memory[name] / memory[PLAIN]:.2f}"))
    return table(rows)


def main() -> None:
    """Parse the command line and print one table for each size."""
    print_tables(arguments(__doc__.splitlines()[0]).parse_args(), ", inference", measure)


if __name__ == "__main__":
    main()
