"""Smooth counterparts of piecewise linear activations other than ReLU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_lcnn.layers.activation import CenteredSoftplus


class PiecewiseSoftplus(nn.Module):
    r"""Sum of centered softplus functions, one for each kink of a piecewise linear activation.

    .. math:: f(x) = a + m x + \sum_j c_j\, s(x - t_j; β)

    For β → ∞ it is the function with slope m on the left that changes its slope by :math:`c_j` at
    :math:`t_j`: ReLU6 has t = (0, 6), c = (1, -1); LeakyReLU has m = 0.01, t = (0,), c = (0.99,). For every β
    its slope stays within those of the pieces, and its curvature is at most β/4 times the larger of
    the sum of positive and the sum of negative :math:`c_j`. All terms share one β.

    Args:
        kinks: The t_j.
        changes: The c_j, as many.
        slope: m, the slope left of all kinks.
        offset: a.
        beta: Start value of β.
        learnable: Whether β is a parameter.

    Raises:
        ValueError: If there is no kink, or ``changes`` has another length, or β is out of range.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> relu6 = PiecewiseSoftplus(kinks=(0.0, 6.0), changes=(1.0, -1.0), beta=1e4)
        >>> relu6(torch.tensor([2.0, 9.0])).detach().round(decimals=3)
        tensor([2., 6.])
    """

    def __init__(
        self,
        kinks: Sequence[float],
        changes: Sequence[float],
        slope: float = 0.0,
        offset: float = 0.0,
        beta: float = 5.0,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        if not kinks or len(kinks) != len(changes):
            raise ValueError(f"`changes` must have one entry for each kink, got {changes!r} for {kinks!r}.")
        if list(kinks) != sorted(kinks):
            raise ValueError(f"`kinks` must be in ascending order, got {kinks!r}.")
        self.kinks, self.changes = tuple(kinks), tuple(changes)
        self.slope, self.offset = slope, offset
        self.softplus = CenteredSoftplus(beta, learnable)

    def forward(self, x: Tensor) -> Tensor:
        """Apply f elementwise."""
        terms = [change * self.softplus(x - kink) for kink, change in zip(self.kinks, self.changes, strict=True)]
        if self.slope:
            terms.append(self.slope * x)
        total = sum(terms[1:], terms[0])
        return total + self.offset if self.offset else total

    def slope_bound(self) -> float:
        """Lipschitz constant for every β: the steepest of the pieces."""
        return max(abs(self.slope + sum(self.changes[:count])) for count in range(len(self.kinks) + 1))

    def curvature_bound(self) -> Tensor:
        """Bound on the size of f″, shape (), differentiable in β."""
        rising = sum(change for change in self.changes if change > 0)
        return self.softplus.beta * (max(rising, rising - sum(self.changes)) / 4)

    def extra_repr(self) -> str:
        """Kinks, changes of slope, and the line that they start from."""
        return f"kinks={self.kinks}, changes={self.changes}, slope={self.slope:g}, offset={self.offset:g}"
