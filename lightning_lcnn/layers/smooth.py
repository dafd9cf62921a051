"""Activations with a learnable β: SiLU, GELU and the like; smooth forms of PReLU, ELU, SELU and Hardswish."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive
from lightning_lcnn.kernels.modes import whole
from lightning_lcnn.layers.activation import CenteredSoftplus, LearnableBeta
from lightning_lcnn.layers.piecewise import PiecewiseSoftplus

# largest t σ(t) σ(-t), at t = 1.5434, rounded up
_LOGISTIC_MOMENT = 0.22388


class ScaledActivation(LearnableBeta):
    r"""Smooth activation with learnable curvature: :math:`y = f(βx)/β`.

    At β = 1 it is f itself, to the last bit. The slopes are those of f for every β and the curvature is β times that of
    f, so β is to SiLU, GELU, Mish or ELU what it is to the centered softplus: for β → 0 they become linear, and for
    β → ∞ ReLU, whose curvature is infinite.

    Args:
        activation: f, an elementwise map without kinks.
        beta: Start value of β.
        learnable: Whether β is a parameter; otherwise it is a buffer.

    Raises:
        ValueError: If ``beta`` is not positive and finite.

    Source:
        Ours.

    Example:
        >>> x = torch.linspace(-3.0, 3.0, 7)
        >>> torch.equal(ScaledActivation(nn.SiLU())(x), nn.SiLU()(x))
        True
    """

    def __init__(self, activation: nn.Module, beta: float = 1.0, learnable: bool = True) -> None:
        super().__init__()
        self._create_beta(beta, learnable)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Apply f(βx)/β elementwise."""
        beta = self.beta
        return self.activation(x * beta) / beta

    def extra_repr(self) -> str:
        """Start of the printed form: β now."""
        return f"beta={self.beta.item():.4g}, learnable={self.learnable}"


class SmoothPReLU(nn.Module):
    r"""Smooth PReLU :math:`y = w x + (1 - w)\, s(x; β)` with the learnable slope w of the negative side.

    For β → ∞ it is ``nn.PReLU``. Its slopes lie between w and 1, and its curvature is at most ``|1 - w|`` β/4. The
    parameter is called ``weight`` as in torch.

    Args:
        num_parameters: 1, or the number of channels of an input (N, C, ...).
        init: Start value of w.
        beta: Start value of β.
        learnable: Whether β is a parameter.

    Raises:
        ValueError: If ``beta`` is not positive and finite.

    Source:
        Ours.

    Example:
        >>> SmoothPReLU(init=0.25, beta=1e4)(torch.tensor([-2.0, 0.0, 2.0])).detach().round(decimals=3)
        tensor([-0.5000,  0.0000,  2.0000])
    """

    def __init__(self, num_parameters: int = 1, init: float = 0.25, beta: float = 5.0, learnable: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_parameters,), init))
        self.softplus = CenteredSoftplus(beta, learnable)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise; x is (N, C, ...) where w is per channel."""
        weight = self.weight if self.weight.numel() == 1 else self.weight.view(-1, *[1] * (x.ndim - 2))
        return weight * x + (1 - weight) * self.softplus(x)

    def slope_bound(self) -> Tensor:
        """Lipschitz constant for every β, ``max(|w|, 1)``, shape ()."""
        return whole(self.weight).abs().amax().clamp_min(1.0)

    def curvature_bound(self) -> Tensor:
        """Bound on the size of y″, shape (), differentiable in w and β."""
        return self.softplus.beta * ((1 - whole(self.weight)).abs().amax() / 4)


class SmoothELU(nn.Module):
    r"""ELU whose kink at 0 is rounded: :math:`y = λ\,\mathrm{ELU}(x; α) + λ(1-α)\,(s(x; β) - \max(x, 0))`.

    For β → ∞ it is λ ELU(α), with λ = 1.0507 and α = 1.6733 SELU, whose slope jumps at 0 by λ(1 - α); the second
    term takes that jump away. ELU with α = 1 has none: see :class:`ScaledActivation`.

    Args:
        alpha: α.
        scale: λ > 0.
        beta: Start value of β.
        learnable: Whether β is a parameter.

    Raises:
        ValueError: If ``scale`` or ``beta`` is not positive and finite.

    Source:
        Ours.

    Example:
        >>> x = torch.tensor([-2.0, 0.0, 2.0])
        >>> selu = SmoothELU(alpha=1.6732632, scale=1.0507010, beta=1e5)
        >>> bool((selu(x) - nn.SELU()(x)).abs().max() < 1e-5)
        True
    """

    def __init__(self, alpha: float = 1.0, scale: float = 1.0, beta: float = 5.0, learnable: bool = True) -> None:
        super().__init__()
        check_positive("scale", scale)
        self.alpha, self.scale = float(alpha), float(scale)
        self.softplus = CenteredSoftplus(beta, learnable)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        # equal to the formula above; with ELU(x; α) and max(x, 0) written out it would run two operations with kinks,
        # and every measure that looks for them would find them
        return self.scale * (self.alpha * F.elu(x) + (1 - self.alpha) * self.softplus(x))

    def curvature_bound(self) -> Tensor:
        """Bound on the size of y″, shape (), differentiable in β."""
        bend = self.softplus.beta * (abs(1 - self.alpha) / 4)
        opposed = self.alpha < 0 or self.alpha > 1  # the exponential bends one way, the rounded kink the other
        return self.scale * (bend.clamp_min(abs(self.alpha)) if opposed else bend + self.alpha)

    def extra_repr(self) -> str:
        """The constants of ELU."""
        return f"alpha={self.alpha:g}, scale={self.scale:g}"


class SmoothHardswish(nn.Module):
    r"""Smooth Hardswish :math:`y = x\,h(x; β)` with :math:`h = (s(x + 3; β) - s(x - 3; β))/6`, the smooth hard sigmoid.

    For β → ∞ it is ``nn.Hardswish``. For every β its slopes lie in [-1/2, 3/2], and its curvature is at most
    max(1/3, β/8 + 0.0374); docs/theory.md has the proof.

    Args:
        beta: Start value of β.
        learnable: Whether β is a parameter.

    Raises:
        ValueError: If ``beta`` is not positive and finite.

    Source:
        Ours.

    Example:
        >>> x = torch.tensor([-4.0, -1.0, 4.0])
        >>> bool((SmoothHardswish(beta=1e4)(x) - nn.Hardswish()(x)).abs().max() < 1e-5)
        True
    """

    def __init__(self, beta: float = 5.0, learnable: bool = True) -> None:
        super().__init__()
        self.gate = PiecewiseSoftplus((-3.0, 3.0), (1 / 6, -1 / 6), beta=beta, learnable=learnable)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function elementwise."""
        return x * self.gate(x)

    def curvature_ends(self) -> tuple[Tensor, Tensor]:
        """Bounds on y'' from below and above, each of shape (), differentiable in β."""
        beta = self.gate.softplus.beta
        return -(beta / 8 + _LOGISTIC_MOMENT / 6), torch.tanh(1.5 * beta) / 3

    def curvature_bound(self) -> Tensor:
        """Bound on the size of y″, shape (), differentiable in β."""
        low, high = self.curvature_ends()
        return torch.maximum(-low, high)
