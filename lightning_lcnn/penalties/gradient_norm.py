"""Penalty on the size of the input gradients."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice
from lightning_lcnn.functional._extra_pass import ExtraPasses
from lightning_lcnn.functional._graph_nodes import graph_nodes, kinks_of
from lightning_lcnn.functional.gradient_penalties import gradient_norm_penalty, gradient_norm_penalty_by_difference
from lightning_lcnn.functional.input_function import Adapter, unwrap
from lightning_lcnn.functional.outputs import Output
from lightning_lcnn.penalties.base import Schedule
from lightning_lcnn.penalties.input_gradient import InputGradientPenalty

GRADIENT_MODES = ("exact", "finite_difference")

_smooth: weakref.WeakKeyDictionary[nn.Module, tuple[int, ...]] = weakref.WeakKeyDictionary()


class GradientNormPenalty(InputGradientPenalty):
    r"""Mean over the batch of the squared norm of the input gradients.

    .. math:: λ \, \frac1B \sum_b \|\nabla_{x_b} F\|_2^2, \quad F = \sum_b f_b(x)

    Independent of the batch size. f is the cross-entropy of an example, its margin or the logit of its target. In
    training mode batch norm lets examples depend on each other; then this is the gradient of the sum F.

    ``"exact"`` differentiates twice. ``"finite_difference"`` computes the same value, but its gradient by the
    parameters from (F(x + εv) - F(x))/ε along the gradient v, for smooth networks: first derivatives only, so it also
    works under ``torch.compile``.

    Args:
        weight: λ.
        output: f, one of ``"loss"``, ``"margin"``, ``"logit"``, or a callable (logits, target) -> (B,).
        squared: False for the mean norm instead of the mean squared norm.
        mode: ``"exact"`` or ``"finite_difference"``.
        schedule: None, a number of warm-up steps, or a callable from step to factor; see :class:`Penalty`.
        step_size: Longest shift of an example in the finite difference, in the units of the input's ℓ₂ norm.
        adapter: Picks the logits out of what the network returns; None where it returns them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if the logits do not depend on x, if the network cannot
            be differentiated twice, or for finite differences if it has kinks.

    Source:
        Drucker and Le Cun (1992); finite differences after Finlay and Oberman (2019).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net, x, target = nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
        >>> penalty = GradientNormPenalty(weight=0.1, output="logit")
        >>> bool(torch.isclose(penalty(net, x, target), 0.1 * net.weight[target].square().sum(1).mean()))
        True
    """

    name = "gradient_norm"

    def __init__(
        self,
        weight: float = 1e-2,
        output: str | Output = "loss",
        squared: bool = True,
        mode: str = "exact",
        schedule: Schedule = None,
        step_size: float = 1e-2,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(weight, output, step_size, schedule, adapter)
        check_choice("mode", mode, GRADIENT_MODES)
        self.squared = squared
        self.mode = mode

    def _value(self, passes: ExtraPasses, x: Tensor, target: Tensor, logits: Any) -> Tensor:
        exact = self.mode == "exact"
        values, point = self._outputs_and_point(passes, x, target, logits)
        gradient = self._gradient(values, point, passes.network, create_graph=exact)
        if exact:
            return gradient_norm_penalty(gradient, self.squared)
        _check_smooth(values, passes.network, point)
        return gradient_norm_penalty_by_difference(
            lambda shifted: self._outputs(passes, shifted, target), x, values, gradient, self.step_size, self.squared
        )

    def __repr__(self) -> str:
        """Constructor call."""
        return (
            f"GradientNormPenalty(weight={self.weight}, output={self.output!r}, squared={self.squared}, "
            f"mode={self.mode!r}, schedule={self.schedule!r}, step_size={self.step_size})"
        )


def _check_smooth(values: Tensor, network: Any, x: Tensor) -> None:
    """Refuse networks with kinks, at the first step and when modules have changed."""
    modules = tuple(map(id, network.modules())) if isinstance(network, nn.Module) else ()
    if modules and _smooth.get(network) == modules:
        return
    nodes = graph_nodes(values)
    if any(node.name().startswith("CompiledFunction") for node in nodes):
        nodes = graph_nodes(_run_uncompiled(network, x))
    kinks = kinks_of(nodes)
    if kinks:
        raise ValueError(
            f"GradientNormPenalty(mode='finite_difference') needs a smooth network, and {type(network).__name__} has "
            f"kinks ({', '.join(kinks)}), across which a difference is no derivative. Use mode='exact', or convert the "
            "network with `to_low_curvature(model, example_input)`."
        )
    if modules:
        _smooth[network] = modules


def _run_uncompiled(network: Any, x: Tensor) -> Any:
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    with nullcontext() if set_stance is None else set_stance("force_eager"):
        return ExtraPasses(unwrap(network))(x)
