"""What the penalties on input gradients share: the outputs at the batch, and their gradient by the input."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive
from lightning_lcnn.functional.hessian_operator import graph_nodes, is_once_differentiable
from lightning_lcnn.functional.input_function import Adapter, logits_of
from lightning_lcnn.functional.outputs import Output, logit_margin, resolve_output, runner_up, target_logit
from lightning_lcnn.kernels.modes import is_sharded, without_autocast
from lightning_lcnn.penalties.curvature import Penalty, Schedule, network_of
from lightning_lcnn.recording.extra_passes import ExtraPasses


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
        resolve_output(output)
        self.output = output
        self.step_size = step_size
        self.adapter = adapter

    def terms(self, model: Any, *inputs: Tensor, logits: Any = None) -> dict[str, Tensor]:
        """Unweighted value under ``name``; x (B, ...), target (B,), and the logits for x where they are known."""
        x, target = _check_batch(inputs, named_output=isinstance(self.output, str))
        if logits is not None and not x.requires_grad:
            raise ValueError(
                "`x` must require a gradient and `logits` be computed from it: x = x.requires_grad_() before "
                "logits = model(x). Or leave `logits` away."
            )
        network = network_of(model, compiled=True)
        _refuse_shards(network)
        passes = ExtraPasses(network)
        with torch.enable_grad():
            value = self._value(self._function(passes, target), x, logits)
            if passes.drew and logits is not None:  # dropout: a pass of our own cannot know the masks of the logits
                value = self._value(self._function(passes, target), x, None)
        return {self.name: value}

    def _function(self, passes: ExtraPasses, target: Tensor) -> BatchFunction:
        return BatchFunction(passes, target, resolve_output(self.output), self.adapter)

    def _value(self, function: BatchFunction, x: Tensor, logits: Any) -> Tensor:
        raise NotImplementedError


class BatchFunction:
    """x -> output(logits(x), target), (B, ...) to (B,), for one batch.

    The margin keeps the rival class of the first call: it would otherwise jump in its gradient where the rival changes.
    """

    def __init__(self, passes: ExtraPasses, target: Tensor, output: Output, adapter: Adapter | None) -> None:
        self.passes = passes
        self.target = target
        self.output = output
        self.adapter = adapter

    def __call__(self, x: Tensor, logits: Any = None) -> Tensor:
        """Outputs (B,), of the given logits or of a pass."""
        logits = logits_of(self.passes if logits is None else lambda _: logits, x, self.adapter)
        if self.output is logit_margin and logits.shape[1] > 1:
            rival = runner_up(logits, self.target)
            self.output = lambda logits, target: target_logit(logits, target) - target_logit(logits, rival)
        values = self.output(logits, self.target)
        if not isinstance(values, Tensor) or values.shape != (len(x),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"`output` must return one value per example, shape ({len(x)},), got {got}.")
        return values

    def at(self, x: Tensor, logits: Any = None) -> tuple[Tensor, Tensor]:
        """Outputs, and the tensor by which to differentiate them: x itself where the logits are known."""
        point = x if logits is not None else x.detach().requires_grad_()
        return self(point, logits), point


def input_gradient(values: Tensor, point: Tensor, create_graph: bool) -> Tensor:
    """Gradient (B, ...) of the sum of the values by the point; the graph of the values stays."""
    gradient = None
    if values.requires_grad:
        with without_autocast(point.device):  # each operation keeps the type of its forward
            (gradient,) = torch.autograd.grad(
                values.sum(), point, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
    if gradient is None:
        raise ValueError(
            "the logits do not depend on `x`, so they have no input gradient: do not detach or copy the input on its "
            "way to the network, and pass the very tensor that the network got."
        )
    return gradient


class OncePerNetwork:
    """A check of a network's graph that is made at the first step, and again when its modules have changed."""

    def __init__(self, check: Callable[[Any, Tensor, Tensor], None]) -> None:
        self.check = check
        self._passed: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()

    def __call__(self, network: Any, values: Tensor, point: Tensor) -> None:
        """Check, unless this network has passed."""
        modules = tuple(map(id, network.modules())) if isinstance(network, nn.Module) else None
        if modules is not None and self._passed.get(network) == modules:
            return
        self.check(network, values, point)
        if modules is not None:
            self._passed[network] = modules


def _refuse_once_differentiable(network: Any, values: Tensor, point: Tensor) -> None:
    """Refuse operations whose second derivative torch lacks: it would raise in backward, or return zeros."""
    names = sorted({node.name() for node in graph_nodes(values) if is_once_differentiable(node)})
    if names:
        compiled = " (torch.compile)" if any(name.startswith("Compiled") for name in names) else ""
        raise ValueError(
            f"this penalty differentiates the network twice, which {', '.join(names)}{compiled} does not allow: do not "
            "compile the network, or use GradientNormPenalty(mode='finite_difference'), which needs first derivatives "
            "only."
        )


check_twice_differentiable = OncePerNetwork(_refuse_once_differentiable)


def _refuse_shards(network: Any) -> None:
    """Refuse what FSDP2 manages: a graph that is kept refers to weights that are freed, and torch crashes."""
    if isinstance(network, nn.Module) and is_sharded(network):
        raise ValueError(
            f"the weights of {type(network).__name__} are sharded (FSDP2) and gone by the time a kept graph is "
            "differentiated: penalties on input gradients need strategy='ddp'. CurvaturePenalty works in shards."
        )


def _check_batch(inputs: tuple[Any, ...], named_output: bool) -> tuple[Tensor, Tensor]:
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
    if named_output and (target.ndim != 1 or target.is_floating_point()):
        raise TypeError(
            f"`target` must hold class indices, shape (B,), got {target.dtype} {tuple(target.shape)}; for others "
            "pass output=lambda logits, target: ... with one value per example."
        )
    return x, target
