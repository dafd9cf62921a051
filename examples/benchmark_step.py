"""Time and memory of one training step: forward, loss, penalty, backward, SGD, spectral maintenance.

    python examples/benchmark_step.py [--size WIDTH:BATCH ...] [--compile] [--device cuda --bf16] ...

Compares ResNet-18 with ReLU with its low-curvature form, both also with a penalty on the input gradients, with torch's
own spectral normalisation on every convolution, and with deel-torchlip's convolutions where that is installed.
"compiled softplus" are rows of eager networks with :func:`lightning_lcnn.functional.use_compiled_softplus`,
"recomputed" those with :func:`lightning_lcnn.functional.recompute_activations`.
Prints a Markdown table; ratios are medians over the rounds of the ratio to the plain network in the same round.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from benchmarking import arguments, interleaved_seconds, peak_memory, print_tables, ratio, resident_memory, table
from torch import Tensor, nn

from lightning_lcnn import lcnn_parameter_groups
from lightning_lcnn.functional import recompute_activations, use_compiled_softplus
from lightning_lcnn.layers import update_spectral_norm
from lightning_lcnn.models import resnet18
from lightning_lcnn.penalties import CurvaturePenalty, GradientNormPenalty, Penalty

PLAIN = "ReLU"


@dataclass
class Variant:
    """One network with what its training step does."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    images: Tensor
    labels: Tensor
    bf16: bool = False
    maintained: bool = False  # whether the spectral norms are refreshed by hand
    kernels: bool = False  # whether the centered softplus is compiled
    recomputed: bool = False  # whether backward computes activations again

    def step(self) -> None:
        """One optimizer step."""
        use_compiled_softplus(self.kernels)  # of the whole process, so every variant sets it
        self.optimizer.zero_grad()
        autocast = torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16)
        with autocast, recompute_activations(self.recomputed):
            loss = self.loss(self.network, self.images, self.labels)
        loss.backward()
        self.optimizer.step()

    def maintain(self) -> None:
        """Refresh the spectral norms."""
        update_spectral_norm(self.network)


def cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of the plain network."""
    return F.cross_entropy(network(images), labels)


class PenalisedLoss:
    """Cross-entropy with penalties; those on the input gradient differentiate the pass of the cross-entropy."""

    def __init__(self, network: nn.Module, *penalties: Penalty) -> None:
        self.network, self.penalties = network, penalties  # uncompiled: the curvature penalty reads its layers

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of one batch."""
        images = images.detach().requires_grad_(any(penalty.uses_logits for penalty in self.penalties))
        logits = network(images)
        total = F.cross_entropy(logits, labels)
        for penalty in self.penalties:
            if penalty.uses_logits:
                total = total + penalty(network, images, labels, logits=logits)
            else:
                total = total + penalty(self.network)
        return total


def normalised_by_torch(network: nn.Module) -> nn.Module:
    """Give every convolution torch's spectral normalisation, one iteration in each forward."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d):
            torch.nn.utils.parametrizations.spectral_norm(module)
    return network


def normalised_by_torchlip(network: nn.Module) -> nn.Module:
    """Replace every convolution by deel-torchlip's spectral one, without its Björck orthogonalisation."""
    from deel import torchlip

    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                sizes = child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding
                setattr(module, name, torchlip.SpectralConv2d(*sizes, bias=False, eps_bjorck=None))
    return network


def build(options: argparse.Namespace, width: int, batch: int) -> dict[str, Variant]:
    """All variants of one size, with equal data."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, device=options.device)
    labels = torch.randint(0, 10, (batch,), device=options.device)
    if options.channels_last:
        images = images.to(memory_format=torch.channels_last)

    def variant(network: nn.Module, loss: Callable | None = None, **flags: bool) -> Variant:
        network.to(options.device)
        if options.channels_last:
            network.to(memory_format=torch.channels_last)
        groups = lcnn_parameter_groups(network, weight_decay=5e-4)
        optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        called = torch.compile(network) if options.compile else network
        return Variant(called, optimizer, loss or cross_entropy, images, labels, options.bf16, **flags)

    def low_curvature(*penalties: Penalty, **flags: bool) -> Variant:
        network = resnet18(10, width, low_curvature=True)
        return variant(network, PenalisedLoss(network, CurvaturePenalty(1e-2), *penalties), maintained=True, **flags)

    variants = {PLAIN: variant(resnet18(10, width)), "low curvature": low_curvature()}
    with_kernels = not options.compile and options.device == "cpu"
    if with_kernels:
        variants["low curvature, compiled softplus"] = low_curvature(kernels=True)
    if not options.compile:  # the compiler decides itself what to compute again
        variants["low curvature, recomputed"] = low_curvature(recomputed=True)
    if with_kernels:
        variants["low curvature, compiled softplus, recomputed"] = low_curvature(kernels=True, recomputed=True)
    if not options.compile:  # torch.compile has no double backward
        network = resnet18(10, width)
        variants["ReLU, gradient norm"] = variant(network, PenalisedLoss(network, GradientNormPenalty(1e-3)))
        variants["low curvature, gradient norm"] = low_curvature(GradientNormPenalty(1e-3))
    if with_kernels:
        both = low_curvature(GradientNormPenalty(1e-3), kernels=True)
        variants["low curvature, gradient norm, compiled softplus"] = both
    difference = GradientNormPenalty(1e-3, mode="finite_difference")
    variants["low curvature, gradient norm by difference"] = low_curvature(difference)
    variants["torch spectral_norm"] = variant(normalised_by_torch(resnet18(10, width)))
    if importlib.util.find_spec("deel") and not options.compile:
        variants["deel-torchlip"] = variant(normalised_by_torchlip(resnet18(10, width)))
    return {name: v for name, v in variants.items() if name == PLAIN or options.only in name}


def measure(options: argparse.Namespace, width: int, batch: int) -> str:
    """Table of one size."""
    variants = build(options, width, batch)
    tasks: dict[str, Callable[[], None]] = {name: v.step for name, v in variants.items()}
    refreshed = {f"{name}, refresh": v for name, v in variants.items() if v.maintained}
    tasks |= {name: v.maintain for name, v in refreshed.items()}
    seconds = interleaved_seconds(tasks, options.rounds, options.device)
    for name, v in variants.items():
        if v.maintained:
            refresh = seconds[f"{name}, refresh"]
            seconds[name] = [s + r / options.every_n_steps for s, r in zip(seconds[name], refresh, strict=True)]
    memory = {}
    for name, v in variants.items():
        v.optimizer.zero_grad()
        resident = resident_memory([v.network], [v.optimizer])
        memory[name] = resident + peak_memory(v.step, options.device)
    rows = [("", "ms", "time ratio", "of it maintenance", "peak MB", "memory ratio")]
    for name, v in variants.items():
        share = "-"
        if v.maintained:
            refresh = median(seconds[f"{name}, refresh"]) / options.every_n_steps
            share = f"{100 * refresh / median(seconds[name]):.1f} %"
        rows.append(
            (
                name,
                f"{1e3 * median(seconds[name]):.0f}",
                f"{ratio(seconds, name, PLAIN):.2f}",
                share,
                f"{memory[name] / 2**20:.0f}",
                f"{memory[name] / memory[PLAIN]:.2f}",
            )
        )
    return table(rows)


def main() -> None:
    """Parse the command line and print one table for each size."""
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--every-n-steps", type=int, default=10, help="steps between two spectral refreshes")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    print_tables(parser.parse_args(), "", measure)


if __name__ == "__main__":
    main()
