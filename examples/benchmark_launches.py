"""What one training step asks of a GPU, counted without one: operations to launch and memory traffic.

    python examples/benchmark_launches.py [--width 16 --batch 128] [--gradient-norm]

Runs steps of ResNet-18 on the meta device, which takes the code paths of a GPU and computes nothing; whatever would
wait for the device (``.item()``, ``bool(tensor)``) raises there. An operation counts as one launch, also where torch
runs several kernels for it; our own operators count with all their kernels. Views, allocations and look-ups are free.
Traffic is what operations other than convolutions and matrix products read and write, every argument once.

The last columns are an estimate for one GPU, not a measurement: launches x 5 us, traffic / bandwidth and FLOPs / peak.
"""

from __future__ import annotations

import argparse
import collections
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_lcnn.kernels.layer_operators import kernels
from lightning_lcnn.layers import update_spectral_norm
from lightning_lcnn.models import resnet18
from lightning_lcnn.penalties import CurvaturePenalty, GradientNormPenalty

FREE = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "unsqueeze_", "slice"),
    *("select", "split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "reshape", "_reshape_alias"),
    *("narrow", "lift_fresh", "is_same_size", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("set_", "promote_types", "diagonal", "unflatten", "view_as_real", "is_pinned"),
}
DENSE = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "_scaled_mm"}
LAUNCH_SECONDS = 5e-6
GPU = "H200 (float32 without TF32)"
BANDWIDTH, PEAK = 4.8e12, 67e12  # bytes and operations a second, from its data sheet


class Count(TorchDispatchMode):
    """Counts what a device would have to launch, and the bytes it would move."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.traffic, self.flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.launches[name] += kernels(name, args) if func.namespace == "lightning_lcnn" else 1
            if func.overloadpacket in flop_registry:
                self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            if name not in DENSE:
                tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
                self.traffic += sum(t.numel() * t.element_size() for t in tensors)
        return out

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())


@dataclass
class Step:
    """What one training step asks for, by phase; the penalty's own backward is in ``backward``."""

    phases: dict[str, Count] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations of convolutions and matrix products."""
        return sum(count.flops for count in self.phases.values())

    @property
    def launches(self) -> int:
        """Of all phases."""
        return sum(count.total for count in self.phases.values())

    @property
    def traffic(self) -> int:
        """Bytes of all phases."""
        return sum(count.traffic for count in self.phases.values())

    @property
    def estimate(self) -> float:
        """Seconds, if launches and work took turns; an estimate for :data:`GPU`."""
        return self.launches * LAUNCH_SECONDS + self.traffic / BANDWIDTH + self.flops / PEAK


def on_meta(network: nn.Module) -> nn.Module:
    """A copy on the meta device, whose layers keep their input sizes."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    empty = torch.empty_like(value, device="meta")
                    table[name] = nn.Parameter(empty, value.requires_grad) if name in module._parameters else empty
    return network


def count_step(network: nn.Module, batch: int, penalty: Callable[..., Tensor] | None = None) -> Step:
    """Count the second of two steps: forward, cross-entropy, penalty, backward, SGD with momentum."""
    network = on_meta(network).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    images = torch.empty(batch, 3, 32, 32, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    of_batch = bool(getattr(penalty, "needs_batch", False))
    step = Step()
    for _ in range(2):
        optimizer.zero_grad()
        step = Step({name: Count() for name in ("forward", "penalty", "backward", "optimizer")})
        with step.phases["forward"]:
            x = images.detach().requires_grad_(of_batch)
            logits = network(x)
            loss = F.cross_entropy(logits, labels)
        with step.phases["penalty"]:
            if of_batch:
                loss = loss + penalty(network, x, labels, logits=logits)  # type: ignore[misc]
            elif penalty is not None:
                loss = loss + penalty(network)
        with step.phases["backward"]:
            loss.backward()
        with step.phases["optimizer"]:
            optimizer.step()
    return step


def count_refresh(network: nn.Module) -> Step:
    """Count the second of two refreshes of the spectral norms; the first may prepare."""
    network = on_meta(network)
    update_spectral_norm(network)
    with Count() as count:
        update_spectral_norm(network)
    return Step({"refresh": count})


def normalised_by_torch(network: nn.Module) -> nn.Module:
    """Give every layer torch's spectral normalisation."""
    for module in list(network.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            spectral_norm(module)
    return network


def both(network: nn.Module, *batch: Tensor, logits: Tensor) -> Tensor:
    """The default penalty and that on the input gradient."""
    return _CURVATURE(network) + _GRADIENT_NORM(network, *batch, logits=logits)


_CURVATURE, _GRADIENT_NORM = CurvaturePenalty(), GradientNormPenalty(1e-3)
both.needs_batch = True  # type: ignore[attr-defined]


def count_all(width: int, batch: int, gradient_norm: bool = False) -> dict[str, Step]:
    """All rows of the table."""
    plain, ours = resnet18(10, width), resnet18(10, width, low_curvature=True)
    rows = {
        "ReLU": count_step(plain, batch),
        "torch spectral_norm": count_step(normalised_by_torch(resnet18(10, width)), batch),
        "low curvature, no penalty": count_step(ours, batch),
        "low curvature": count_step(ours, batch, CurvaturePenalty()),
        "a refresh": count_refresh(ours),
    }
    if gradient_norm:
        rows["ReLU, gradient norm"] = count_step(plain, batch, GradientNormPenalty(1e-3))
        rows["low curvature, gradient norm"] = count_step(ours, batch, both)
    return rows


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--gradient-norm", action="store_true", help="also the penalty on the input gradient")
    parser.add_argument("--operations", action="store_true", help="also the operations of every row")
    options = parser.parse_args()
    rows = count_all(options.width, options.batch, options.gradient_norm)
    one = rows["ReLU"]
    title = f"width {options.width}, batch {options.batch}"
    print(f"| {title} | launches | ratio | traffic MB | ratio | by phase | estimate ms |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        phases = ", ".join(f"{phase} {count.total}" for phase, count in row.phases.items() if count.total)
        print(
            f"| {name} | {row.launches} | {row.launches / one.launches:.2f} | {row.traffic / 1e6:.0f} | "
            f"{row.traffic / one.traffic:.2f} | {phases} | {1e3 * row.estimate:.2f} |"
        )
    print(f"\nThe last column is an estimate, not a measurement: 5 us a launch, bandwidth and peak of one {GPU}.")
    if options.operations:
        for name, row in rows.items():
            for phase, count in row.phases.items():
                print(name, phase, dict(count.launches.most_common()), sep=": ")


if __name__ == "__main__":
    main()
