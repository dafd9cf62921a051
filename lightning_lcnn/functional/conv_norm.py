"""Certified upper bound of the norm of a zero-padded convolution.

Why it bounds. In one dimension y_j = Σ_t W_t x̃(s j + d t), where x̃ is the input with p zeros before and q behind.
Write x on a circle of N places, from place p on, zeros elsewhere. Where the circle is long enough that no read
wraps onto a place of x it does not mean, that is N ≥ n + p and N ≥ last read − p + 1, the m outputs are m rows of
the circulant operator C_N, provided that these rows are distinct, N/s ≥ m. So A = P C_N Q with a selection P and
an embedding Q, both of norm 1, and ‖A‖ ≤ ‖C_N‖. All dimensions are embedded at once, each with its own N.

The Fourier transform of the circle splits C_N into one matrix for each coarse frequency g < N/s: the symbols
Ŵ(f) = Σ_t W_t e^{2πi f d t / N} at the s aliases f = g + a N/s, side by side and divided by √s, of shape
c_out × c_in s for each group. ‖C_N‖ is the largest of their norms; −g has the conjugate matrix of g.

Where the stride leaves no overlap, s ≥ d (k − 1) + 1, different outputs read different inputs, and ‖A‖ is at most
the norm of the weight with that dimension folded into the input channels (1×1 kernels, patch embeddings).

Where the stride divides the dilation, the places r, r + d, r + 2d, … of the input are read together and by no
other output: d independent convolutions of stride and dilation 1, each of at most ⌈n/d⌉ places with at most ⌈p/d⌉
and ⌈q/d⌉ zeros beside them, hence all parts of the one that has exactly so many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lcnn.functional.singular_vectors import ConvGeometry, conv_apply, conv_geometry

# Covers the rounding of float64 (relative 1e-13 at 1000 channels) with a wide margin.
_INFLATION = 1 + 1e-6
# Largest dense block (0.2 s on one core) and largest set of blocks or symbols held at once, in numbers.
_DENSE_ENTRIES = 2**20
_CHUNK_ENTRIES = 2**22


def conv_norm_bound(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> float:
    """Certified upper bound of the operator norm of a zero-padded convolution.

    max over coarse frequencies g of ‖Ŵ(g)‖₂ on a circle that holds the padded input; exact where the operator is
    small enough for a dense matrix. Computed in float64 and inflated by 1e-6.

    Args:
        weight: shape ``(C_out, C_in / groups, *kernel_size)``, 1 to 3 spatial dimensions, any real dtype.
        input_size: spatial size of the input.
        stride: as in torch.
        padding: as in torch, or a pair (before, after) for each dimension.
        dilation: as in torch.
        groups: as in torch.

    Returns:
        A number that ‖conv(x) − conv(y)‖₂ / ‖x − y‖₂ never exceeds.

    Raises:
        ValueError: when shapes do not fit or the weight holds numbers that are not finite.

    Source:
        Ours; circulant embedding after Sedghi, Gupta and Long (2019), who treat circular padding.

    Example:
        >>> kernel = torch.tensor([1.0, -1.0, 1.0])
        >>> print(f"{conv_norm_bound(torch.outer(kernel, kernel)[None, None], (3, 3), padding=1):.3f}")
        5.828
    """
    geometry = conv_geometry(weight.shape[2:], stride, padding, dilation, groups)
    if len(input_size) != weight.dim() - 2 or min(geometry.output_size(input_size)) < 1:
        raise ValueError(
            f"`input_size` must hold {weight.dim() - 2} sizes that leave at least one output position, "
            f"got {tuple(input_size)} for a kernel of size {geometry.kernel_size}."
        )
    split_size, split = _without_dilation(input_size, geometry)
    with torch.device("cpu"):  # the user may have set another default
        weight, scale = _scaled(weight)
        largest = _norm(weight, input_size, geometry)
        if split != geometry:
            largest = min(largest, _norm(weight, split_size, split))
    return largest * scale * _INFLATION


def matrix_norm_bound(weight: Tensor) -> float:
    """Certified upper bound of the largest singular value of a matrix, in float64 and inflated by 1e-6.

    Args:
        weight: shape (out_features, in_features).

    Returns:
        The bound, exact up to the inflation.

    Raises:
        ValueError: when the weight holds numbers that are not finite.

    Source:
        Textbook: σ² is the largest eigenvalue of the Gram matrix.

    Example:
        >>> print(f"{matrix_norm_bound(torch.diag(torch.tensor([3.0, -4.0]))):.3f}")
        4.000
    """
    weight, scale = _scaled(weight)
    return largest_singular_value(weight[None]) * scale * _INFLATION


def largest_singular_value(matrices: Tensor, at_least: float = 0.0) -> float:
    """The largest singular value in a batch (B, rows, columns) of float64 or complex128 matrices, or ``at_least``."""
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mH if rows <= columns else matrices.mH @ matrices
    # Row sums bound an eigenvalue: what cannot beat the best so far needs no eigenvalues.
    upper = gram.abs().sum(-1).amax(-1)
    first = upper.argmax()
    best = max(at_least**2, _largest_eigenvalue(gram[first]))
    rest = gram[upper > best]
    return math.sqrt(max(best, _largest_eigenvalue(rest)) if len(rest) else best)


def _largest_eigenvalue(gram: Tensor) -> float:
    values = gram.real if gram.shape[-1] == 1 else torch.linalg.eigvalsh(gram)
    return values.max().item()


def _scaled(weight: Tensor) -> tuple[Tensor, float]:
    """The weight in float64 with largest entry 1, so that no square over- or underflows, and that entry."""
    weight = weight.detach().to("cpu", torch.float64)
    scale = weight.abs().max().item()
    if not math.isfinite(scale):
        raise ValueError("`weight` must hold finite numbers, got inf or nan.")
    return weight / (scale or 1.0), scale


def _norm(weight: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> float:
    blocks = _dense_blocks(weight, input_size, geometry)
    return _circular_norm(weight, input_size, geometry) if blocks is None else largest_singular_value(blocks)


def _without_dilation(input_size: Sequence[int], geometry: ConvGeometry) -> tuple[tuple[int, ...], ConvGeometry]:
    """A convolution of at least the same norm, without the dilations that the stride divides; see the top."""
    size, stride, padding = list(input_size), list(geometry.stride), list(geometry.padding)
    dilation = list(geometry.dilation)
    for i, (s, d) in enumerate(zip(geometry.stride, geometry.dilation, strict=True)):
        if d % s == 0:
            size[i], stride[i], dilation[i] = math.ceil(size[i] / d), 1, 1
            padding[i] = (math.ceil(padding[i][0] / d), math.ceil(padding[i][1] / d))
    split = ConvGeometry(geometry.kernel_size, tuple(stride), tuple(padding), tuple(dilation), geometry.groups)
    return tuple(size), split


def _dense_blocks(weight: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> Tensor | None:
    """One transposed matrix for each group, (groups, inputs, outputs), if that is small."""
    groups, channels = geometry.groups, weight.shape[1]
    inputs = channels * math.prod(input_size)
    outputs = weight.shape[0] // groups * math.prod(geometry.output_size(input_size))
    if inputs * outputs > _DENSE_ENTRIES or inputs * max(inputs, outputs) * groups > _CHUNK_ENTRIES:
        return None
    unit = torch.eye(inputs, dtype=weight.dtype).view(inputs, channels, *input_size)
    response = conv_apply(weight, torch.cat([unit] * groups, 1), geometry)
    return response.reshape(inputs, groups, outputs).transpose(0, 1)


def _circular_norm(weight: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> float:
    circles: list[_Circle] = []
    for axis in reversed(range(len(input_size))):
        k, s, d = geometry.kernel_size[axis], geometry.stride[axis], geometry.dilation[axis]
        if s > d * (k - 1):  # no overlap: fold the dimension into the input channels
            weight = weight.movedim(axis + 2, 2).flatten(1, 2)
        else:
            circles.insert(0, _Circle(_circle_size(axis, input_size, geometry), s, d, k))
    weight = weight.unflatten(0, (geometry.groups, -1))
    if not circles:
        return largest_singular_value(weight)
    taps = weight.flatten(3)
    per_frequency = taps[..., 0].numel() * math.prod(c.stride for c in circles)
    best = 0.0
    for part in _coarse_frequencies(circles).split(max(1, _CHUNK_ENTRIES // per_frequency)):
        best = largest_singular_value(_symbols(taps, circles, part), best)
    return best


@dataclass(frozen=True)
class _Circle:
    """One dimension of the circular grid."""

    size: int
    stride: int
    dilation: int
    taps: int


def _circle_size(axis: int, input_size: Sequence[int], geometry: ConvGeometry) -> int:
    """Smallest N that is divisible by the stride and holds the padded input; see the top of the file."""
    n, s, before = input_size[axis], geometry.stride[axis], geometry.padding[axis][0]
    outputs = geometry.output_size(input_size)[axis]
    last_read = s * (outputs - 1) + geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
    return s * math.ceil(max(n + before, last_read - before + 1, s * outputs) / s)


def _coarse_frequencies(circles: Sequence[_Circle]) -> Tensor:
    """One of every pair g, -g: (frequencies, dimensions)."""
    sizes = torch.tensor([circle.size // circle.stride for circle in circles])
    grid = torch.cartesian_prod(*map(torch.arange, sizes.tolist())).view(-1, len(circles))
    place = sizes.flip(0).cumprod(0).flip(0) // sizes
    return grid[(grid @ place) <= ((-grid % sizes) @ place)]


def _symbols(taps: Tensor, circles: Sequence[_Circle], frequencies: Tensor) -> Tensor:
    """Matrices of aliased symbols: (frequencies * groups, outputs, inputs * aliases), complex128."""
    phase = torch.zeros(len(frequencies), 1, 1, dtype=torch.float64)  # (frequency, alias, tap), in turns
    for circle, coarse in zip(circles, frequencies.unbind(1), strict=True):
        fine = coarse[:, None] + torch.arange(circle.stride) * (circle.size // circle.stride)
        reads = circle.dilation * torch.arange(circle.taps)
        turns = (fine[:, :, None] * reads % circle.size).double() / circle.size
        phase = (phase[:, :, None, :, None] + turns[:, None, :, None, :]).flatten(3).flatten(1, 2)
    waves = torch.polar(torch.full_like(phase, phase.shape[1] ** -0.5), 2 * math.pi * phase)
    return torch.einsum("fat,goit->fgoia", waves, taps.to(waves.dtype)).flatten(3).flatten(0, 1)
