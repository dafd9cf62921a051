"""Further forward passes of a network in training that leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn.kernels.preserved_state import preserved_random_state


class ExtraPasses:
    """Calls of a network beside the one that trains it: same mode, batch statistics, buffers and random state kept.

    Batch norm normalises by the batch, as its mode says, and its running statistics and counter stay. Every pass starts
    from the random state in which the first one finds the generators, so all draw the same dropout masks, and the
    state is restored. ``drew`` tells whether a pass has drawn anything. The buffers of a callable that is no module
    cannot be found, and change as it changes them.
    """

    def __init__(self, network: Callable[..., Any]) -> None:
        self.network = network
        self.drew = False

    def __call__(self, x: Tensor) -> Any:
        """What the network returns for x."""
        with unchanged_buffers(self.network), preserved_random_state(x.device):
            before = _random_states(x.device)
            output = self.network(x.clone())  # networks may change their input in place
            after = _random_states(x.device)
        self.drew |= any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return output


@contextmanager
def unchanged_buffers(network: Any) -> Iterator[None]:
    """Let a network in training work on copies of its buffers.

    The copies are what the graphs of these passes refer to, so that restoring writes to no tensor that autograd has
    saved. Modules that name constant buffers in ``_constant_buffers`` keep these.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in network.modules() if isinstance(network, nn.Module) else ():
            if module.training:
                constant = getattr(module, "_constant_buffers", ())
                for name, buffer in module._buffers.items():
                    if buffer is not None and name not in constant:
                        kept.append((module._buffers, name, buffer))
        for buffers, name, buffer in kept:
            buffers[name] = buffer.detach().clone()
        yield
    finally:
        for buffers, name, buffer in kept:
            buffers[name] = buffer


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type in ("cuda", "xpu"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
