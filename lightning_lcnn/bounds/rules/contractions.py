"""Linear maps that use the entries of one constant several times, and maps that act on several inputs alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.bounds.rules.pieces import LayerBound, Number, Piece, Shape, log_of


@dataclass(frozen=True)
class Contraction(Piece):
    """A linear map whose matrix holds the entries of one constant tensor, each several times or not at all."""

    tensor: Callable[[], Tensor]
    function: Callable[[Tensor, Tensor], Tensor]  # (x of shape input, tensor) -> output, for one example
    norm: Callable[[Tensor], float]  # certified, of the float64 tensor
    matrix_of: Callable[[Tensor], Tensor]  # batch of matrices that holds every entry of a row and of a column
    shape: Shape  # of the input, as ``function`` takes it

    def log_slope(self) -> Number:
        magnitude = self.matrix_of(self.tensor()).abs()
        return log_of((magnitude.sum(-1).amax() * magnitude.sum(-2).amax()).clamp_min(1e-37).sqrt())

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        return LayerBound(self.norm(self.tensor().detach().cpu().double()))

    def linear_function(self, output_shape: Shape) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
        """For ``bounds.forward.linear_map``: (x of shape (H, …), transform of the coefficients) -> (H, …)."""
        tensor = self.tensor().detach().cpu().double()

        def function(x: Tensor, transform: Any) -> Tensor:
            coefficients = transform(tensor)
            one = lambda v: self.function(v.reshape(self.shape), coefficients).reshape(output_shape[1:])  # noqa: E731
            return one(x[0])[None] if len(x) == 1 else torch.vmap(one)(x)

        return function


@dataclass(frozen=True)
class Repeated(Piece):
    """A piece that acts on each of several inputs, whose dimension comes first, by itself: frames, tokens, patches."""

    piece: Piece

    def log_slope(self) -> Number:
        return self.piece.log_slope()

    def log_bend(self) -> Number | None:
        return self.piece.log_bend()

    def certify(self, input_shape: Shape, output_shape: Shape) -> LayerBound:
        """Jacobian block-diagonal; Σ_t M² |u_t|² |v_t|² ≤ M² for unit u and v."""
        return self.piece.certify((1, *input_shape[2:]), (1, *output_shape[2:]))
