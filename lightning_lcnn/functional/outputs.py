"""Scalar outputs of a classifier, one per example, whose input derivatives are measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lcnn._checks import check_choice

Output = Callable[[Tensor, Tensor], Tensor]


def logit_margin(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of the target minus the best other logit.

    m = z_t - max_{j≠t} z_j, positive exactly where the prediction is right.

    The input measures hold the other class fixed at its choice for x itself, so that a change of rival beside x does
    not look like curvature.

    Args:
        logits: (B, K) with K >= 2.
        target: (B,) of int64.

    Returns:
        (B,). Differentiates as the difference of the two logits that are chosen at this point.

    Raises:
        ValueError: for fewer than two classes.

    Source: ours (LCNN measures the loss).

    Example:
        >>> logit_margin(torch.tensor([[1.0, 3.0, 2.5]]), torch.tensor([1]))
        tensor([0.5000])
    """
    if logits.shape[1] < 2:
        raise ValueError(f"the margin needs at least 2 classes, got logits of shape {tuple(logits.shape)}.")
    return target_logit(logits, target) - target_logit(logits, runner_up(logits, target))


def runner_up(logits: Tensor, target: Tensor) -> Tensor:
    """Class (B,) of the best logit other than the target's."""
    return logits.detach().scatter(1, target.unsqueeze(1), -torch.inf).argmax(1)


def per_example_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each example, with derivatives that stay accurate for confident examples.

    ℓ = (z_r - z_t) + log(1 + Σ_{j≠r} exp(z_j - z_r)) with r the largest logit: every 1 - p that appears in the
    derivatives is a sum of small exponentials and never a difference of numbers near one. The usual log-softmax
    loses 1 - p ≈ 1e-8 in float32 altogether.

    Args:
        logits: (B, K).
        target: (B,) of int64.

    Returns:
        (B,).

    Source: ours; LCNN measures this output.

    Example:
        >>> per_example_loss(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
        tensor([2.0612e-09])
    """
    top = logits.detach().argmax(1, keepdim=True)
    largest = logits.gather(1, top)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
    rest = torch.where(is_top, 0.0, (logits - largest).exp()).sum(1)
    gap = (largest - logits.gather(1, target.unsqueeze(1))).squeeze(1)
    # where the prediction is right, z_r - z_t would add 1 and -1 to a derivative of 1e-8 and round it away
    return torch.where(top.squeeze(1) == target, 0.0, gap) + torch.log1p(rest)


def target_logit(logits: Tensor, target: Tensor) -> Tensor:
    """Logit of the target.

    z_t

    Args:
        logits: (B, K).
        target: (B,) of int64.

    Returns:
        (B,).

    Source: ours.

    Example:
        >>> target_logit(torch.tensor([[1.0, 3.0]]), torch.tensor([1]))
        tensor([3.])
    """
    return logits.gather(1, target.unsqueeze(1)).squeeze(1)


OUTPUTS: dict[str, Output] = {"margin": logit_margin, "loss": per_example_loss, "logit": target_logit}


def resolve_output(output: str | Output) -> Output:
    """Look a named output up; a callable (logits, target) -> (B,) passes."""
    if isinstance(output, str):
        check_choice("output", output, OUTPUTS)
        return OUTPUTS[output]
    if not callable(output):
        raise TypeError(
            f"`output` must be one of {sorted(OUTPUTS)} or a callable (logits, target) -> (B,), got {output!r}."
        )
    return output
