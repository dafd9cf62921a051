"""Metrics of input gradients and input Hessians: thin shells over `lightning_lcnn.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_lcnn._checks import check_choice, check_int, check_positive
from lightning_lcnn.functional import gradient_stability, input_gradient_norm, input_hessian_norm, normalized_curvature
from lightning_lcnn.functional.hessian_operator import HVP_MODES
from lightning_lcnn.functional.input_derivatives import HESSIAN_METHODS
from lightning_lcnn.functional.outputs import Output
from lightning_lcnn.metrics.per_example import PerExampleMetric


class InputGradientNorm(PerExampleMetric):
    """Norm of the input gradient, ‖∇_x f(x)‖₂.

    Args:
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable (logits, target) -> (B,).
        reduction: ``"mean"``, ``"median"``, a quantile in (0, 1), ``"none"``, or a sequence of these.
        adapter: picks the logits out of what the model returns.
        batch_size: examples at a time, to bound memory.
        max_examples: examples per epoch and process.
        kwargs: of `torchmetrics.Metric`.

    Returns:
        A scalar, the values, or a dictionary, as ``reduction`` says.

    Raises:
        As `functional.input_gradient_norm`.

    Source: LCNN paper.

    Example:
        >>> import torch
        >>> metric = InputGradientNorm()
        >>> metric.update(torch.nn.Identity(), torch.tensor([[0.2, 0.5]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(1.4142)
    """

    def _measure(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        result = input_gradient_norm(model, x, target, self.output, adapter=self.adapter, batch_size=self.batch_size)
        return result.values, None


class InputHessianNorm(PerExampleMetric):
    """Spectral norm of the input Hessian, ‖∇²_x f(x)‖₂, by Lanczos.

    Args:
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable (logits, target) -> (B,).
        method: ``"lanczos"`` or ``"power_iteration"``.
        num_hvps: Hessian-vector products per example.
        hvp: ``"double_backward"``, ``"forward_over_reverse"`` or ``"finite_difference"``.
        seed: of the private generator of the start vector's random part.
        reduction: as in `InputGradientNorm`, and ``"converged"`` for the share of converged examples.
        kwargs: ``adapter``, ``batch_size``, ``max_examples``, and those of `torchmetrics.Metric`.

    Returns:
        A scalar, the values, or a dictionary, as ``reduction`` says.

    Raises:
        As `functional.input_hessian_norm`.

    Source: quantity of the LCNN paper; the method is ours.

    Example:
        >>> import torch
        >>> metric = InputHessianNorm(reduction=["mean", "converged"])
        >>> metric.update(lambda x: x**2, torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        >>> print({name: round(value.item(), 4) for name, value in metric.compute().items()})
        {'mean': 2.0, 'converged': 1.0}
    """

    is_iterative = True

    def __init__(
        self,
        output: str | Output = "margin",
        method: str = "lanczos",
        num_hvps: int = 20,
        *,
        hvp: str = "double_backward",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(output, **kwargs)
        check_choice("method", method, HESSIAN_METHODS)
        check_choice("hvp", hvp, HVP_MODES)
        check_int("num_hvps", num_hvps)
        self.method = method
        self.num_hvps = num_hvps
        self.hvp = hvp
        self.seed = seed

    def _measure(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        result = input_hessian_norm(model, x, target, **self._arguments())
        return result.values, result.converged

    def _arguments(self) -> dict[str, Any]:
        names = ("output", "method", "num_hvps", "hvp", "adapter", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


class NormalizedCurvature(InputHessianNorm):
    """Curvature, ‖∇²_x f(x)‖₂ / ‖∇_x f(x)‖₂.

    Args:
        output: ``"margin"``, ``"loss"`` (as in the paper), ``"logit"`` or a callable (logits, target) -> (B,).
        method: ``"lanczos"`` or ``"power_iteration"``.
        num_hvps: Hessian-vector products per example.
        hvp: ``"double_backward"``, ``"forward_over_reverse"`` or ``"finite_difference"``.
        seed: of the private generator of the start vector's random part.
        reduction: as in `InputHessianNorm`.
        kwargs: ``adapter``, ``batch_size``, ``max_examples``, and those of `torchmetrics.Metric`.

    Returns:
        A scalar, the values, or a dictionary, as ``reduction`` says.

    Raises:
        As `functional.normalized_curvature`.

    Source: LCNN paper, definition 1, without its ε.

    Example:
        >>> import torch
        >>> metric = NormalizedCurvature()
        >>> metric.update(lambda x: x**2, torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.4472)
    """

    def _measure(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        result = normalized_curvature(model, x, target, **self._arguments())
        return result.values, result.hessian.converged


class GradientStability(PerExampleMetric):
    """Relative change of the input gradient under perturbations of a given ℓ₂ norm.

    ‖∇f(x + δ) - ∇f(x)‖₂ / ‖∇f(x)‖₂, ‖δ‖₂ = radius

    Args:
        radius: ℓ₂ norm of δ in the units of the input.
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable (logits, target) -> (B,).
        statistic: per example the ``"mean"`` over random δ or the ``"worst"`` found.
        num_samples: random perturbations.
        num_worst_steps: steps towards the worst one, with ``statistic="worst"``.
        hvp: kind of Hessian-vector product of these steps.
        seed: of the private generator.
        kwargs: ``reduction``, ``adapter``, ``batch_size``, ``max_examples``, and those of `torchmetrics.Metric`.

    Returns:
        A scalar, the values, or a dictionary, as ``reduction`` says.

    Raises:
        As `functional.gradient_stability`.

    Source: LCNN paper (random perturbations); the worst case is ours.

    Example:
        >>> import torch
        >>> metric = GradientStability(radius=0.5)
        >>> metric.update(lambda x: x**2, torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.1000)
    """

    def __init__(
        self,
        radius: float,
        output: str | Output = "margin",
        *,
        statistic: str = "mean",
        num_samples: int = 8,
        num_worst_steps: int = 5,
        hvp: str = "double_backward",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(output, **kwargs)
        check_positive("radius", radius)
        check_choice("statistic", statistic, ("mean", "worst"))
        check_int("num_samples", num_samples)
        check_int("num_worst_steps", num_worst_steps, minimum=0)
        check_choice("hvp", hvp, HVP_MODES)
        self.radius = radius
        self.statistic = statistic
        self.num_samples = num_samples
        self.num_worst_steps = num_worst_steps
        self.hvp = hvp
        self.seed = seed

    def _measure(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        names = ("radius", "output", "num_samples", "hvp", "adapter", "batch_size", "seed")
        arguments = {name: getattr(self, name) for name in names}
        worst = self.statistic == "worst"
        result = gradient_stability(model, x, target, num_worst_steps=self.num_worst_steps if worst else 0, **arguments)
        return result.worst if worst else result.values, None
