"""Catch the forward pass that a training step makes, for penalties that differentiate it by its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class CapturedForward:
    """One call of a network."""

    network: nn.Module  # repeats the call for another input, with the same further arguments
    x: Tensor  # (B, ...) what the network got, requires a gradient
    logits: Any  # what it returned


class ForwardCapture:
    """Watches the network of a module for the length of a training step.

    The network gets a copy of its input that requires a gradient, so that no tensor of the batch or of the user's
    changes. Penalties then differentiate what the network has returned and spare a pass of their own. They take the
    gradient by what reaches the network, after whatever ``training_step`` does to the batch.

    Args:
        networks: To watch; the first that was called counts.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._networks = networks
        self._open: dict[nn.Module, list[tuple[nn.Module, Tensor]]] = {n: [] for n in self._networks}
        self._calls: list[tuple[nn.Module, CapturedForward]] = []
        self._handles: list[Any] = []

    @torch.compiler.disable
    def start(self) -> None:
        """Begin to watch."""
        for network in self._networks:
            self._handles += [
                network.register_forward_pre_hook(self._before, with_kwargs=True),
                network.register_forward_hook(self._after),
            ]

    @torch.compiler.disable
    def stop(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def last(self, examples: int) -> CapturedForward | None:
        """The last call for this number of examples, of the first network that was called.

        The last one: an attack inside the step calls the network before the pass that is trained.
        """
        for network in self._networks:
            for called, forward in reversed(self._calls):
                if called is network and len(forward.x) == examples:
                    return forward
        return None

    @torch.compiler.disable
    def _before(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = _input_place(args, kwargs)
        if place is None or not torch.is_grad_enabled():
            return None
        x = args[place] if isinstance(place, int) else kwargs[place]
        point = x if x.requires_grad else x.detach().requires_grad_()
        repeat = network if len(args) == 1 and not kwargs else _Repeat(network, args, kwargs, place)
        self._open[network].append((repeat, point))
        return _put(args, kwargs, place, point.clone())  # networks may change their input in place

    @torch.compiler.disable
    def _after(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open[network] and torch.is_grad_enabled():
            repeat, point = self._open[network].pop()
            self._calls.append((network, CapturedForward(repeat, point, output)))


class _Repeat(nn.Module):
    """A call with further arguments as a function of its input."""

    def __init__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str) -> None:
        super().__init__()
        self.network = network
        self._call = args, kwargs, place

    def forward(self, x: Tensor) -> Any:
        """What the network returns for another input."""
        args, kwargs = _put(*self._call, x)
        return self.network(*args, **kwargs)


def _input_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the first floating-point tensor of a call is."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, item in items:
        if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 1:
            return place
    return None


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | str, x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: x}
