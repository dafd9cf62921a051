"""Mean, median, quantiles or all of the per-example values of a measure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.plot import plot_curve

from lightning_lcnn._checks import check_choice, check_int
from lightning_lcnn.functional.input_function import Adapter
from lightning_lcnn.functional.outputs import Output, resolve_output
from lightning_lcnn.metrics.base import MeasuringMetric

Reduction = str | float
_NAMED_REDUCTIONS = ("mean", "median", "none", "converged")


class PerExampleMetric(MeasuringMetric):
    """Reduces one value per example to a mean, median, quantile, or keeps them all.

    Args:
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable (logits, target) -> (B,).
        reduction: ``"mean"``, ``"median"``, a quantile in (0, 1), ``"none"`` for the values, ``"converged"`` for the
            share of converged examples (Hessian metrics); ``compute`` then returns a tensor. For a sequence of these it
            returns a dictionary with keys such as ``mean``, ``median``, ``q0.95``, ``values``.
        adapter: picks the logits out of what the model returns.
        batch_size: examples at a time, to bound memory.
        max_examples: examples per epoch and process.
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    is_iterative = False  # whether `_measure` returns convergence flags
    value_sum: Tensor
    num_converged: Tensor
    per_example: list[Tensor]

    def __init__(
        self,
        output: str | Output = "margin",
        *,
        reduction: Reduction | Sequence[Reduction] = "mean",
        adapter: Adapter | None = None,
        batch_size: int | None = None,
        max_examples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_examples, **kwargs)
        resolve_output(output)
        if batch_size is not None:
            check_int("batch_size", batch_size)
        self.output = output
        self.adapter = adapter
        self.batch_size = batch_size
        self.reduction = reduction
        self._reductions_wanted = (reduction,) if isinstance(reduction, str | float) else tuple(reduction)
        for wanted in self._reductions_wanted:
            self._check_reduction(wanted)
        self._keeps_values = any(wanted not in ("mean", "converged") for wanted in self._reductions_wanted)
        self._add_float("value_sum")
        self._add_counter("num_converged")
        if self._keeps_values:
            self.add_state("per_example", [], dist_reduce_fx="cat")

    @abstractmethod
    def _measure(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values (B,) and convergence flags (B,) where the measure has them."""

    def _accumulate(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> None:
        measured, converged = self._measure(model, x, target)
        values = self._as_state(measured)
        self.value_sum = self.value_sum + values.sum()
        if converged is not None:
            self.num_converged = self.num_converged + converged.sum().to(self.num_converged.device)
        if self._keeps_values:
            self.per_example = [*self.per_example, values]

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Reduce the epoch's values; NaN where no example was measured."""
        values = self._all_values() if self._keeps_values else self.value_sum
        reduced = {_key(wanted): self._reduce(wanted, values) for wanted in self._reductions_wanted}
        return next(iter(reduced.values())) if isinstance(self.reduction, str | float) else reduced

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the reduced value, several of them over time, or for ``"none"`` the share of examples below each value.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of such results; computed by default.
            ax: matplotlib axes.

        Returns:
            Figure and axes.
        """
        val = self.compute() if val is None else val
        if not (isinstance(val, Tensor) and val.numel() > 1):
            return self._plot(val, ax)
        ordered = val.flatten().sort().values
        share = torch.arange(1, len(ordered) + 1) / len(ordered)
        return plot_curve((ordered, share, share), ax=ax, label_names=(type(self).__name__, "share of examples below"))

    def _check_reduction(self, wanted: Any) -> None:
        if isinstance(wanted, str):
            check_choice("reduction", wanted, _NAMED_REDUCTIONS)
        elif not isinstance(wanted, float) or not 0 < wanted < 1:
            raise ValueError(f"`reduction` must be one of {_NAMED_REDUCTIONS} or a quantile in (0, 1), got {wanted!r}.")
        if wanted == "converged" and not self.is_iterative:
            raise ValueError(f"`reduction` = 'converged' has no meaning: {type(self).__name__} has no iteration.")

    def _all_values(self) -> Tensor:
        return dim_zero_cat(self.per_example) if len(self.per_example) else self.value_sum.new_empty(0)

    def _reduce(self, wanted: Reduction, values: Tensor) -> Tensor:
        if wanted == "mean":
            return self.value_sum / self.num_examples
        if wanted == "converged":
            return self.num_converged / self.num_examples
        if wanted == "none":
            return values
        if values.numel() == 0:
            return values.new_tensor(torch.nan)
        return torch.quantile(values, 0.5 if wanted == "median" else float(wanted))


def _key(reduction: Reduction) -> str:
    if reduction == "none":
        return "values"
    return reduction if isinstance(reduction, str) else f"q{reduction:g}"
