"""Base of the penalties: weight, schedule, and how a value is computed under autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int, check_non_negative

Schedule = int | Callable[[int], float] | None


class Penalty:
    """Base of the penalties: a weight, its schedule over steps, and the value as a 0-d tensor with a graph.

    A subclass sets ``name`` (under which it is logged) and defines :meth:`terms`. One that differentiates the network
    at the data sets ``needs_batch = True`` and is then called as ``penalty(model, x, target)``; its network runs under
    the caller's autocast. With ``uses_logits = True`` its ``terms`` also takes ``logits``; see :meth:`evaluate`.

    Args:
        weight: Factor λ >= 0 of the penalty in the loss.
        schedule: None: λ is constant. An integer n: λ grows linearly over the first n optimizer steps. A callable:
            maps the optimizer step (0, 1, ...) to a factor of λ; use a function that can be pickled under spawn.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``weight`` is negative or not finite, or an integer ``schedule`` is below 1.

    Source:
        Ours.

    Example:
        >>> class WeightSize(Penalty):
        ...     name = "weight_size"
        ...     def terms(self, model):
        ...         return {"weight_size": sum(p.square().sum() for p in model.parameters())}
        >>> WeightSize(weight=0.5)(nn.Linear(1, 1)).ndim
        0
    """

    name: ClassVar[str]
    needs_batch: ClassVar[bool] = False
    uses_logits: ClassVar[bool] = False

    def __init__(self, weight: float, schedule: Schedule = None) -> None:
        check_non_negative("weight", weight)
        if schedule is not None and not callable(schedule):
            check_int("schedule", schedule)
        self.weight = weight
        self.schedule = schedule

    def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        """Unweighted penalty under the key ``name``, and what else should be logged, each 0-d with a graph."""
        raise NotImplementedError

    def __call__(
        self, model: nn.Module, *inputs: Tensor, step: int | None = None, logits: Tensor | None = None
    ) -> Tensor:
        """Weighted penalty, 0-d; the arguments are those of :meth:`evaluate`."""
        return self.evaluate(model, *inputs, step=step, logits=logits)[0]

    def evaluate(
        self, model: nn.Module, *inputs: Tensor, step: int | None = None, logits: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted penalty and its detached parts: the terms, and the weighted value as ``<name>_penalty``.

        Args:
            model: The network, or a module around it.
            inputs: ``x`` and ``target`` for a penalty that needs the batch.
            step: Number of optimizer steps done, needed by a schedule.
            logits: What the network has returned for ``x``, for a penalty that ``uses_logits`` and can then spare its
                own forward pass. ``x`` must be what the logits were computed from, and require a gradient.

        Returns:
            0-d tensor with a graph, and a dict of 0-d tensors without.
        """
        factor = self.current_weight(step)
        known = {} if logits is None else {"logits": logits}
        with self._precision(model):
            terms = self.terms(model, *inputs, **known)
            value = factor * terms[self.name]
        parts = {key: term.detach() for key, term in terms.items()}
        return value, {**parts, f"{self.name}_penalty": value.detach()}

    def _precision(self, model: nn.Module) -> AbstractContextManager[object]:
        """No autocast for functions of the parameters; a network at the batch runs as the caller runs it."""
        if self.needs_batch:
            return nullcontext()
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return torch.autocast(device.type, enabled=False)  # exp and log of β in bfloat16 keep two digits

    def current_weight(self, step: int | None = None) -> float:
        """λ at an optimizer step, λ·min(1, (step + 1)/n) for an integer schedule n."""
        if self.schedule is None:
            return self.weight
        if step is None:
            raise ValueError(
                "A penalty with a `schedule` needs the optimizer step: call penalty(model, step=...); LCNNMixin and "
                "the penalty callback pass it."
            )
        if callable(self.schedule):
            return self.weight * float(self.schedule(step))
        return self.weight * min(1.0, (step + 1) / self.schedule)
