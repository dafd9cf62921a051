"""What the penalties on input gradients share: the outputs at the batch, and their gradient by the input."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive
from lightning_lcnn.functional._extra_pass import ExtraPasses
from lightning_lcnn.functional._graph_nodes import graph_nodes, is_once_differentiable
from lightning_lcnn.functional.input_function import Adapter, logits_of
from lightning_lcnn.functional.outputs import Output, resolve_output
from lightning_lcnn.penalties.base import Penalty, Schedule
from lightning_lcnn.penalties.network import network_of

_twice_differentiable: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()


class InputGradientPenalty(Penalty):
    """Base of the penalties on the gradients of per-example outputs by the input.

    The gradient is that of the sum of the outputs over the batch: where batch norm in training mode lets examples
    depend on each other, that is what is differentiated.

    Args:
        weight: λ.
        output: The scalar of each example, ``"loss"``, ``"margin"``, ``"logit"``, or (logits, target) -> (B,).
        step_size: Length of a finite-difference step in the input, ℓ₂.
        schedule: See :class:`Penalty`.
        adapter: Picks the logits out of what the network returns; None where it returns them.
    """

    needs_batch: ClassVar[bool] = True
    uses_logits: ClassVar[bool] = True

    def __init__(
        self,
        weight: float,
        output: str | Output,
        step_size: float,
        schedule: Schedule = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        check_positive("step_size", step_size)
        self.output = output
        self.step_size = step_size
        self.adapter = adapter
        resolve_output(output)

    def terms(self, model: nn.Module | Callable[..., Any], *inputs: Tensor, logits: Any = None) -> dict[str, Tensor]:
        """Unweighted value under ``name``; x (B, ...), target (B,), and the logits for x where they are known."""
        x, target = _check_batch(inputs)
        passes = ExtraPasses(network_of(model))
        with torch.enable_grad():
            value = self._value(passes, x, target, logits)
            if passes.drew and logits is not None:  # dropout: a pass of our own cannot know the masks of the logits
                value = self._value(passes, x, target, None)
        return {self.name: value}

    def _value(self, passes: ExtraPasses, x: Tensor, target: Tensor, logits: Any) -> Tensor:
        raise NotImplementedError

    def _outputs(self, network: Callable[..., Any], x: Tensor, target: Tensor) -> Tensor:
        """Scalar outputs (B,) of a network at x, in at least float32."""
        logits = logits_of(network, x, self.adapter)
        values = resolve_output(self.output)(logits, target)
        if not isinstance(values, Tensor) or values.shape != (len(x),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"`output` must return one value per example, shape ({len(x)},), got {got}.")
        return values

    def _outputs_and_point(self, passes: ExtraPasses, x: Tensor, target: Tensor, logits: Any) -> tuple[Tensor, Tensor]:
        """Outputs at the batch, and the tensor by which to differentiate them."""
        if logits is None:
            point = x.detach().requires_grad_()
            return self._outputs(passes, point, target), point
        if not x.requires_grad:
            raise ValueError(
                "`x` must require a gradient and `logits` be computed from it: x = x.requires_grad_() before "
                "logits = model(x). Or leave `logits` away."
            )
        return self._outputs(lambda _: logits, x, target), x

    def _gradient(self, values: Tensor, point: Tensor, network: Any, create_graph: bool) -> Tensor:
        """Gradient (B, ...) of the sum of the values."""
        if create_graph:
            _check_twice_differentiable(values, network, type(self).__name__)
        if not values.requires_grad:
            return _independent()
        with torch.autocast(point.device.type, enabled=False):  # each operation keeps the type of its forward
            (gradient,) = torch.autograd.grad(
                values.sum(), point, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
        return _independent() if gradient is None else gradient


def _independent() -> Tensor:
    raise ValueError(
        "the logits do not depend on `x`, so they have no input gradient: do not detach or copy the input on its way "
        "to the network, and pass the very tensor that the network got."
    )


def _check_batch(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    if len(inputs) != 2 or not all(isinstance(item, Tensor) for item in inputs):
        kinds = [type(item).__name__ for item in inputs]
        raise TypeError(f"the penalty needs tensors `x` and `target`: penalty(model, x, target); got {kinds}.")
    x, target = inputs
    if not x.is_floating_point():
        raise TypeError(f"`x` must be floating point to be differentiated, got {x.dtype}; convert it first.")
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"`x` must have shape (examples, features, ...) and not be empty, got {tuple(x.shape)}.")
    if target.ndim == 0 or len(target) != len(x):
        raise ValueError(f"`target` must have one entry per example, {len(x)}, got shape {tuple(target.shape)}.")
    return x, target


def _check_twice_differentiable(values: Tensor, network: Any, penalty: str) -> None:
    """Refuse operations whose second derivative torch lacks, at the first step and when modules have changed."""
    modules = tuple(map(id, network.modules())) if isinstance(network, nn.Module) else ()
    if modules and _twice_differentiable.get(network) == modules:
        return
    names = sorted({node.name() for node in graph_nodes(values) if is_once_differentiable(node)})
    if names:
        raise ValueError(
            f"{penalty} differentiates the network twice, which {', '.join(names)} does not allow"
            f"{' (torch.compile)' if any(name.startswith('Compiled') for name in names) else ''}: do not compile the "
            "network, or use GradientNormPenalty(mode='finite_difference'), which needs first derivatives only."
        )
    if modules:
        _twice_differentiable[network] = modules
