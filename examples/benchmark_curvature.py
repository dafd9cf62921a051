"""Time and error of the Hessian norm: Lanczos on a retained graph against power iteration with double backward.

A low-curvature ResNet-18 is trained for a moment on scikit-learn's digits (as 32 x 32 colour images), so that its
spectra are those of a network and not of noise. One thread, process time, methods interleaved, medians. The truth is
Lanczos with 80 products, in float32 too.

    python examples/benchmark_curvature.py --width 16
    python examples/benchmark_curvature.py --width 64 --rounds 1 --train-steps 60
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.functional import input_hessian_norm
from lightning_lcnn.functional.lanczos import common_directions, safe_norm
from lightning_lcnn.functional.outputs import OUTPUTS
from lightning_lcnn.models import resnet18

LANCZOS_STEPS = (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 20)


def digits() -> tuple[Tensor, Tensor]:
    """1797 digits as 3 x 32 x 32 images in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return F.interpolate(x, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels)


def trained(width: int, steps: int) -> nn.Module:
    """A low-curvature ResNet-18 after a few steps of AdamW."""
    torch.manual_seed(0)
    model = resnet18(num_classes=10, width=width, low_curvature=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    x, y = digits()
    for _ in range(steps):
        rows = torch.randint(0, 1500, (64,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def reference(model: nn.Module, x: Tensor, y: Tensor, output: str, iterations: int) -> Tensor:
    """Power iteration that builds the graph anew for every product, ‖Hv‖ at the end."""
    v = common_directions(x, 1, 0).expand(x.shape)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _ in range(iterations):
        v = v / safe_norm(v).view(-1, 1, 1, 1)
        leaf = x.clone().requires_grad_()
        values = OUTPUTS[output](model(leaf), y)
        (gradient,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
        (v,) = torch.autograd.grad(gradient, leaf, v)
    return safe_norm(v)


def methods(model: nn.Module, x: Tensor, y: Tensor, output: str) -> dict[str, Callable[[], Tensor]]:
    """All that is compared, each giving (B,) estimates."""
    table: dict[str, Callable[[], Tensor]] = {
        "power iteration, new graph, 20": lambda: reference(model, x, y, output, 20),
        "power iteration, kept graph, 20": lambda: (
            input_hessian_norm(model, x, y, output, method="power_iteration", num_hvps=20).values
        ),
    }
    for steps in LANCZOS_STEPS:
        table[f"Lanczos, {steps}"] = lambda k=steps: input_hessian_norm(model, x, y, output, num_hvps=k).values
    return table


def benchmark(arguments: argparse.Namespace) -> None:
    """Print the table and the time for equal error."""
    model = trained(arguments.width, arguments.train_steps)
    x, y = (tensor[1500 : 1500 + arguments.batch_size] for tensor in digits())
    truth = input_hessian_norm(model, x, y, arguments.output, num_hvps=80)
    right = model_accuracy(model, x, y)
    print(f"ResNet-18, width {arguments.width}, batch {len(x)}, {arguments.output}; {right:.0%} right")
    print(f"truth converged for {truth.converged.float().mean():.0%}, largest residual {truth.residual.max():.1e}")
    table = methods(model, x, y, arguments.output)
    times: dict[str, list[float]] = {name: [] for name in table}
    errors: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for name, run in table.items():
            start = time.process_time()
            values = run()
            times[name].append(time.process_time() - start)
            error = (values - truth.values).abs() / truth.values
            errors[name] = torch.quantile(error, 0.95).item()
    first, *_ = table
    base = statistics.median(times[first])
    print(f"{'method, products':34} {'CPU s':>8} {'ratio':>6} {'95 % error':>11}")
    for name in table:
        median = statistics.median(times[name])
        print(f"{name:34} {median:8.2f} {base / median:6.1f} {errors[name]:11.1e}")
    equal = next(name for name in table if name.startswith("Lanczos") and errors[name] <= errors[first])
    print(f"equal error: {equal} products, {base / statistics.median(times[equal]):.1f} times less time")


def model_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right predictions."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def memory(arguments: argparse.Namespace) -> None:
    """Peak memory of one double backward and of 20 Lanczos products, each in a process of its own."""
    peaks = {}
    for task in ("nothing", "double backward", "Lanczos"):
        command = [sys.executable, __file__, "--peak", task, "--width", str(arguments.width)]
        command += ["--batch-size", str(arguments.batch_size)]
        peaks[task] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    basis = 20 * arguments.batch_size * 3 * 32 * 32 * 4 / 2**20
    for task in ("double backward", "Lanczos"):
        print(f"peak memory, {task:16} {peaks[task] - peaks['nothing']:8.0f} MiB")
    print(f"Lanczos basis of 20 vectors      {basis:8.0f} MiB")


def peak(arguments: argparse.Namespace) -> None:
    """Run one task of `memory` and print the peak of the process in MiB."""
    model = resnet18(width=arguments.width, low_curvature=True).eval()
    x, y = torch.rand(arguments.batch_size, 3, 32, 32), torch.zeros(arguments.batch_size, dtype=torch.int64)
    if arguments.peak == "nothing":
        with torch.no_grad():
            model(x[:1])
    elif arguments.peak == "double backward":
        reference(model, x, y, "margin", 1)
    else:
        input_hessian_norm(model, x, y)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--output", choices=sorted(OUTPUTS), default="margin")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        peak(arguments)
        return
    memory(arguments)
    benchmark(arguments)


if __name__ == "__main__":
    main()
