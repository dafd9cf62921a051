"""Filtered power iteration of many operators at once: what lies between two products, as one operation for all.

The vectors of all operators lie one behind the other in one tensor; a table has start and length of each. Every
operation is one kernel, with one program for each operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.kernels.operators import operator

_HALF = 0.45  # of the present estimate of σ², as in ``filtered_power_iteration``


@lru_cache(maxsize=64)
def table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Start and length of vectors that lie one behind the other, (count, 2)."""
    rows = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32).to(device)


def _segments(vector: Tensor, places: Tensor) -> list[Tensor]:
    return [vector[start : start + length] for start, length in places.tolist()]


def _nonzero(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny)


def _unit_reference(vector: Tensor, more: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor]:
    vector = vector if more is None else vector + more
    pieces = _segments(vector, places)
    norms = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])
    units = [piece / _nonzero(norm) for piece, norm in zip(pieces, norms, strict=True)]
    return torch.cat(units), norms


def _first_reference(
    start: Tensor, product: Tensor, image: Tensor, places: Tensor, image_places: Tensor
) -> tuple[Tensor, Tensor]:
    half = torch.stack([_nonzero(_HALF * piece.square().sum()) for piece in _segments(image, image_places)])
    pieces = zip(_segments(start, places), _segments(product, places), half, strict=True)
    return torch.cat([p / h - s for s, p, h in pieces]), half


def _next_reference(
    before: Tensor, vector: Tensor, product: Tensor, half: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    scaled, following = [], []
    pieces = (_segments(t, places) for t in (before, vector, product))
    for b, v, p, h in zip(*pieces, half, strict=True):
        scale = _nonzero(torch.linalg.vector_norm(v))
        scaled.append(v / scale)
        following.append((2 * (p / h - v) - b) / scale)
    return torch.cat(scaled), torch.cat(following)


def _last_reference(back: Tensor, right: Tensor, norms: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    units, residuals = [], []
    for b, r, n in zip(_segments(back, places), _segments(right, places), norms, strict=True):
        value = torch.linalg.vector_norm(b)
        residuals.append(torch.linalg.vector_norm(b - n * r) / _nonzero(value))
        units.append(torch.where(value > 0, b / _nonzero(value), r))
    return torch.cat(units), torch.stack(residuals)


def _vector_and_numbers(first: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    places = next(t for t in others if isinstance(t, Tensor) and t.dtype == torch.int32)
    return torch.empty_like(first), first.new_empty(len(places))


def _two_vectors(first: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(first), torch.empty_like(first)


def _triton(name: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        from lightning_lcnn.kernels import triton_refresh

        return getattr(triton_refresh, name)(*arguments)

    return launch


unit = operator(
    "unit_vectors(Tensor vector, Tensor? more, Tensor places) -> (Tensor, Tensor)",
    _unit_reference,
    _vector_and_numbers,
    _triton("unit"),
)
_first = operator(
    "chebyshev_first(Tensor start, Tensor product, Tensor image, Tensor places, Tensor image_places)"
    " -> (Tensor, Tensor)",
    _first_reference,
    _vector_and_numbers,
    _triton("first"),
)
_next = operator(
    "chebyshev_next(Tensor before, Tensor vector, Tensor product, Tensor half, Tensor places) -> (Tensor, Tensor)",
    _next_reference,
    _two_vectors,
    _triton("following"),
)
_last = operator(
    "power_iteration_last(Tensor back, Tensor right, Tensor norms, Tensor places) -> (Tensor, Tensor)",
    _last_reference,
    _vector_and_numbers,
    _triton("last"),
)


def filtered_power_iterations(
    apply: Callable[[Tensor], list[Tensor]],
    adjoint: Callable[[list[Tensor]], list[Tensor]],
    cut: Callable[[Tensor], list[Tensor]],
    right: Tensor,
    perturbation: Tensor,
    sizes: tuple[Sequence[int], Sequence[int]],
    num_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``filtered_power_iteration`` of several operators whose vectors lie one behind the other.

    Args:
        apply: All v -> all A v, in pieces of any shapes.
        adjoint: All u in such pieces -> all Aᵀ u in pieces.
        cut: All u -> the same in pieces.
        right: Vectors of the last time; each starts as the unit vector of its sum with ``perturbation``.
        perturbation: What is added.
        sizes: Numbers of values of each v, and of each A v.
        num_iterations: Products with A and with Aᵀ, each, at least 1.

    Returns:
        All left and right vectors, and the relative residuals (count,).
    """
    places, images = (table(tuple(size), right.device) for size in sizes)
    vector, _ = unit(right, perturbation, places)
    if num_iterations > 1:
        image = apply(vector)
        before, (vector, half) = vector, _first(vector, _join(adjoint(image)), _join(image), places, images)
        for _ in range(num_iterations - 2):
            before, vector = _next(before, vector, _join(adjoint(apply(vector))), half, places)
        vector, _ = unit(vector, None, places)
    left, norms = unit(_join(apply(vector)), None, images)
    right, residuals = _last(_join(adjoint(cut(left))), vector, norms, places)
    return left, right, residuals


def _join(pieces: list[Tensor]) -> Tensor:
    """All pieces one behind the other."""
    return torch.cat([piece.reshape(-1) for piece in pieces])
