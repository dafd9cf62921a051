"""Penalty on the change of the loss's input gradient, the regulariser of CURE."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lcnn.functional.input_function import Adapter
from lightning_lcnn.functional.outputs import Output
from lightning_lcnn.functional.penalty_formulas import cure_direction, cure_penalty
from lightning_lcnn.penalties.curvature import Schedule
from lightning_lcnn.penalties.input_gradient import (
    BatchFunction,
    InputGradientPenalty,
    check_twice_differentiable,
    input_gradient,
)


class CurePenalty(InputGradientPenalty):
    r"""Mean over the batch of the squared change of the loss's input gradient along one direction.

    .. math:: λ \, \frac1B \sum_b \|\nabla ℓ_b(x_b + h z_b) - \nabla ℓ_b(x_b)\|_2^2, \quad
              z_b = \frac{\mathrm{sign} \nabla ℓ_b(x_b)}{\|\mathrm{sign} \nabla ℓ_b(x_b)\|_2}

    Independent of the batch size: ℓ is the loss of one example. The authors' code takes the gradient of the mean
    loss and no square, so its λ is of another scale; it also evaluates the network in evaluation mode, this penalty in
    the mode in which the network is. z is held constant.

    Args:
        weight: λ.
        step_size: h, in the units of the input's ℓ₂ norm.
        output: The scalar whose gradient is compared; the paper's is the loss.
        schedule: None, a number of warm-up steps, or a callable from step to factor; see :class:`Penalty`.
        adapter: Picks the logits out of what the network returns; None where it returns them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if the logits do not depend on x or the network cannot
            be differentiated twice.

    Source:
        CURE (Moosavi-Dezfooli et al., 2019).

    Example:
        >>> import torch
        >>> penalty = CurePenalty(weight=1.0, step_size=0.5, output=lambda logits, target: (logits**2).sum(1) / 2)
        >>> round(penalty(torch.nn.Identity(), torch.ones(2, 3), torch.tensor([0, 1])).item(), 4)  # Hessian 1
        0.25
    """

    name = "cure"

    def __init__(
        self,
        weight: float = 4.0,
        step_size: float = 1.5,
        output: str | Output = "loss",
        schedule: Schedule = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__(weight, output, step_size, schedule, adapter)

    def _value(self, function: BatchFunction, x: Tensor, logits: Any) -> Tensor:
        values, point = function.at(x, logits)
        check_twice_differentiable(function.passes.network, values, point)
        gradient = input_gradient(values, point, create_graph=True)
        shifted = (point + self.step_size * cure_direction(gradient)).detach().requires_grad_()
        return cure_penalty(input_gradient(function(shifted), shifted, create_graph=True), gradient)

    def __repr__(self) -> str:
        """Constructor call."""
        return (
            f"CurePenalty(weight={self.weight}, step_size={self.step_size}, output={self.output!r}, "
            f"schedule={self.schedule!r})"
        )
