"""Timing and memory measurement that the benchmarks share."""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

Task = Callable[[], object]


def arguments(description: str) -> argparse.ArgumentParser:
    """Command line that the benchmarks of step and inference share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", nargs="+", default=["16:128", "64:32"], metavar="WIDTH:BATCH")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="compile every network")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    return parser


def print_tables(
    options: argparse.Namespace, what: str, measure: Callable[[argparse.Namespace, int, int], str]
) -> None:
    """One table for each size that was asked for, under the name of the machine."""
    torch.set_num_threads(options.threads)
    print(machine(options.device))
    for size in options.size:
        width, batch = map(int, size.split(":"))
        print(f"\nResNet-18 of width {width}, 32×32 images, batch {batch}{what}\n")
        print(measure(options, width, batch), flush=True)


def interleaved_seconds(tasks: Mapping[str, Task], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each task in every round; all tasks take their turn in each round, so drift hits them alike.

    On the CPU process time (user + system, all threads), which other processes hardly disturb; elapsed time with
    synchronisation on CUDA. One round before the first warms up, and in each turn a task runs once before it is timed,
    as in a loop that repeats it: the other tasks have filled the caches with their own.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds + 1):
        for name, task in tasks.items():
            gc.collect()
            task()
            start = _now(device)
            task()
            if i:
                seconds[name].append(_now(device) - start)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> float:
    """Median over the rounds of the ratio of two tasks in the same round."""
    return median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def peak_memory(task: Task, device: str = "cpu") -> int:
    """Largest number of bytes that PyTorch's allocator holds during a task beyond what it holds before.

    On the CPU from the profiler's record of every allocation and release, which is exact, includes the scratch
    of kernels, and unlike the resident set size knows no caching or fragmentation.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        task()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        task()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident_memory(modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of parameters, their gradients, buffers and optimizer states between two steps."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    tensors += [t.grad for t in tensors if t.grad is not None]
    for optimizer in optimizers:
        states = [s for state in optimizer.state.values() for s in state.values()]
        tensors += [s for s in states if isinstance(s, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def machine(device: str) -> str:
    """One line about processor, threads and versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor()
        name += f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"
    return f"{name}, Python {platform.python_version()}, PyTorch {torch.__version__}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table with aligned columns, the first row as its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
