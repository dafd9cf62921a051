"""The centered softplus as a module, and what activations with a learnable β have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int, check_positive
from lightning_lcnn.kernels.fused_softplus import softplus
from lightning_lcnn.kernels.layer_operators import softplus_of_log, takes_operators
from lightning_lcnn.kernels.modes import scalar, whole


class LearnableBeta(nn.Module):
    """Base of the activations that have a β of their own, stored as ``log_beta`` of shape (1,) or (C,)."""

    log_beta: Tensor
    num_channels: int | None

    def _create_beta(self, beta: float, learnable: bool, num_channels: int | None = None) -> None:
        check_positive("beta", beta)
        if num_channels is not None:
            check_int("num_channels", num_channels)
        self.num_channels = num_channels
        self._start = math.log(beta)
        log_beta = torch.full((1 if num_channels is None else num_channels,), self._start)
        if learnable:
            self.log_beta = nn.Parameter(log_beta)
        else:
            self.register_buffer("log_beta", log_beta)

    def reset_parameters(self) -> None:
        """Set β to its start value, for networks that are made on the meta device."""
        nn.init.constant_(self.log_beta, self._start)

    @property
    def learnable(self) -> bool:
        """Whether β is a parameter."""
        return isinstance(self.log_beta, nn.Parameter)

    @property
    def beta(self) -> Tensor:
        """β as a differentiable tensor of shape () or (C,), in at least float32."""
        log_beta = scalar(self.log_beta) if self.num_channels is None else whole(self.log_beta)
        return log_beta.to(torch.promote_types(log_beta.dtype, torch.float32)).exp()


class CenteredSoftplus(LearnableBeta):
    r"""Activation :math:`s(x; β) = \frac{1}{β} \log\frac{1 + e^{βx}}{2}` with learnable curvature.

    Slope below 1, curvature :math:`s'' \le β/4`. β is stored as ``log_beta``, of shape (1,) or (C,), so it stays
    positive under any optimizer and one step changes it by a factor, whatever its size. Keep ``log_beta`` out of weight
    decay (:func:`~lightning_lcnn.layers.lcnn_parameter_groups` does), which would pull β to 1.

    Args:
        beta: Start value of β. The default 5 bounds the curvature by 1.25; 1000 is ReLU to the eye.
        learnable: Whether β is a parameter; otherwise it is a buffer.
        num_channels: None for one β; C for one β per channel of an input (N, C, ...).
        inplace: Permits to overwrite the input, as ``nn.ReLU(inplace=True)`` does, and for the same memory, in training
            and without gradients; see :func:`~lightning_lcnn.functional.centered_softplus`.

    Raises:
        ValueError: If ``beta`` is not positive and finite or ``num_channels`` is below 1.

    Source:
        LCNN (Srinivas et al., 2022); β per channel and the logarithmic parameter are ours.

    Example:
        >>> activation = CenteredSoftplus(beta=5.0)
        >>> activation(torch.zeros(2, 3)).abs().max().item()
        0.0
        >>> round(activation.beta.item(), 4)
        5.0
    """

    def __init__(
        self, beta: float = 5.0, learnable: bool = True, num_channels: int | None = None, inplace: bool = False
    ) -> None:
        super().__init__()
        self._create_beta(beta, learnable, num_channels)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Apply s(x; β) elementwise; x is (N, C, ...) if β is per channel, else of any shape."""
        # evaluation with gradients measures curvature: keep relative accuracy and the cheaper second derivative
        inplace = self.inplace and (self.training or not torch.is_grad_enabled())
        if (
            self.num_channels is None
            and isinstance(x, Tensor)
            and x.device.type != "cpu"
            and takes_operators(x, self.log_beta)
        ):
            return softplus_of_log(x, self.log_beta, inplace)
        beta = self.beta
        if self.num_channels is not None:
            if x.ndim < 2 or x.shape[1] != self.num_channels:
                raise ValueError(
                    f"`x` must have {self.num_channels} channels in dimension 1 (num_channels), "
                    f"got shape {tuple(x.shape)}."
                )
            beta = beta.view(-1, *[1] * (x.ndim - 2))
        return softplus(x, beta, inplace)

    def extra_repr(self) -> str:
        """Start of the printed form: β now, or its mean over channels."""
        beta = self.beta.detach().mean()
        channels = "" if self.num_channels is None else f", num_channels={self.num_channels}"
        inplace = ", inplace=True" if self.inplace else ""
        return f"beta={beta:.4g}, learnable={self.learnable}{channels}{inplace}"
