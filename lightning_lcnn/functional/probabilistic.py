"""An upper bound of the input Hessian's norm that holds with a chosen probability."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._checks import check_choice, check_int
from lightning_lcnn.functional.hessian_operator import HVP_MODES, HessianOperator
from lightning_lcnn.functional.input_function import Adapter, InputFunction, measure
from lightning_lcnn.functional.lanczos import common_directions, lanczos
from lightning_lcnn.functional.outputs import Output


@dataclass(frozen=True, eq=False)
class ProbabilisticBoundResult:
    """Upper bounds of B Hessian norms, each of which fails with at most ``failure_probability``."""

    values: Tensor  # (B,) upper bound of ‖∇²f(x)‖₂; infinite where the products are too few
    estimate: Tensor  # (B,) Lanczos value from below; the truth lies between the two
    failure_probability: float  # per example, over the random start
    num_hvps: int


def lanczos_probabilistic_gap(num_steps: int, dimension: int, failure_probability: float) -> float:
    r"""Share of the spectrum's width that random-start Lanczos may miss at one end.

    With probability at least 1 - p over a start that is uniform on the sphere,
    λ_max - θ_max <= ε (λ_max - λ_min) for ε = tanh²(η/2), η = asinh(√(2n/π) / p) / (k - ½).

    Proof in short: θ_max < λ_max - ε·width forces, for the polynomial of degree k - 1 that is optimal for the weight
    1 - ε - x, the start's component along the top eigenvector below 1 / sinh((k - ½)η); the density of that component
    is at most √(n / 2π).

    Args:
        num_steps: k, products with the operator.
        dimension: n, unknowns.
        failure_probability: p.

    Returns:
        ε; 0 where k >= n.

    Source: Kuczyński and Woźniakowski (1992), theorem 4.2, in closed form (constant 1.60 in place of 1.648).

    Example:
        >>> print(f"{lanczos_probabilistic_gap(20, 3072, 1e-3):.4f}")
        0.0807
    """
    if num_steps >= dimension:
        return 0.0
    eta = math.asinh(math.sqrt(2 * dimension / math.pi) / failure_probability) / (num_steps - 0.5)
    return math.tanh(eta / 2) ** 2


def input_hessian_norm_probabilistic_bound(
    model: Callable[[Tensor], Any],
    x: Tensor,
    target: Tensor,
    output: str | Output = "margin",
    failure_probability: float = 1e-3,
    num_hvps: int = 40,
    *,
    hvp: str = "double_backward",
    adapter: Adapter | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> ProbabilisticBoundResult:
    """Upper bound of the input Hessian's norm at each example, valid with high probability.

    max(θ_max, -θ_min) + ε/(1 - 2ε)·(θ_max - θ_min), with ε of `lanczos_probabilistic_gap` at half the failure
    probability for each end

    Not a certificate: it holds for each example with probability 1 - ``failure_probability`` over the random start,
    at the point x only, and up to rounding. `bounds.network_bound` is the deterministic and global counterpart.
    All examples share one start, so over N examples the chance that any bound fails is at most N times as large.

    Args:
        model: module in evaluation mode, or any callable, that maps (B, …) to logits (B, K).
        x: (B, …), floating point.
        target: (B,) class indices.
        output: ``"margin"``, ``"loss"``, ``"logit"`` or a callable.
        failure_probability: in (0, 1), per example.
        num_hvps: 40 leave about 5 % between bound and estimate for 32 x 32 colour images at the default.
        hvp: kind of Hessian-vector product, as for `input_hessian_norm`.
        adapter: picks the logits out of what the model returns.
        batch_size: examples at a time.
        seed: of the private generator of the start.

    Returns:
        `ProbabilisticBoundResult` with ``values`` (B,) and ``estimate`` (B,).

    Raises:
        ValueError: if ``failure_probability`` is not in (0, 1); otherwise as `input_hessian_norm`.

    Source: Kuczyński and Woźniakowski (1992); the two-sided form is ours.

    Example:
        >>> def saddle(x):
        ...     return x**2
        >>> input_hessian_norm_probabilistic_bound(saddle, torch.tensor([[2.0, 1.0]]), torch.tensor([0])).values
        tensor([2.])
    """
    check_choice("hvp", hvp, HVP_MODES)
    check_int("num_hvps", num_hvps)
    if not 0 < failure_probability < 1:
        raise ValueError(f"`failure_probability` must lie in (0, 1), got {failure_probability!r}.")

    def bound(function: InputFunction, chunk: Tensor) -> ProbabilisticBoundResult:
        operator = HessianOperator(function, chunk, hvp)
        start = common_directions(chunk, 1, seed).expand(chunk.shape)
        krylov = lanczos(operator, start, num_hvps, seed=seed)
        gap = lanczos_probabilistic_gap(krylov.num_products, chunk[0].numel(), failure_probability / 2)
        width = krylov.largest - krylov.smallest
        slack = width * (gap / (1 - 2 * gap)) if gap < 0.5 else torch.full_like(width, torch.inf)
        return ProbabilisticBoundResult(krylov.norm + slack, krylov.norm, failure_probability, krylov.num_products)

    return measure(bound, model, x, target, output=output, adapter=adapter, batch_size=batch_size)
