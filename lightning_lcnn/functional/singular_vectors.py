"""Linear operators with their adjoints, and their largest singular value by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from lightning_lcnn._checks import check_int, check_non_negative
from lightning_lcnn.functional.lanczos import lanczos

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_INPUT = {1: conv_grad.conv1d_input, 2: conv_grad.conv2d_input, 3: conv_grad.conv3d_input}
_CONV_WEIGHT = {1: conv_grad.conv1d_weight, 2: conv_grad.conv2d_weight, 3: conv_grad.conv3d_weight}
# Vectors between two restarts: as much memory as 24 inputs of the layer. 12 need 1.5 times the products.
_SUBSPACE = 24


@dataclass(frozen=True)
class ConvGeometry:
    """How a zero-padded convolution slides: one entry for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output; entries below 1 mean that the kernel does not fit."""
        sizes = zip(input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


@dataclass(frozen=True)
class LinearOperator:
    """A linear map A(W) on unbatched tensors, linear in its weight W too."""

    apply: Callable[[Tensor], Tensor]  # v -> A v
    adjoint: Callable[[Tensor], Tensor]  # u -> Aᵀ u
    weight_gradient: Callable[[Tensor, Tensor], Tensor]  # (u, v) -> ∂⟨u, A(W) v⟩/∂W, shaped like W


def conv_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int | tuple[int, int]] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> ConvGeometry:
    """Normalise the arguments of a convolution to one entry for each spatial dimension.

    Args:
        kernel_size: one entry for each of the 1 to 3 spatial dimensions.
        stride: an integer for all dimensions, or one for each.
        padding: zeros on both sides as an integer, one entry for each dimension (an integer, or a pair
            ``(before, after)``), or torch's ``"same"`` and ``"valid"``.
        dilation: an integer for all dimensions, or one for each.
        groups: number of groups.

    Returns:
        The geometry.

    Raises:
        ValueError: when an argument has the wrong number of entries or ``padding`` is an unknown word.

    Example:
        >>> conv_geometry((4, 3), padding="same").padding
        ((1, 2), (1, 1))
    """
    kernel_size = tuple(kernel_size)
    rank = len(kernel_size)
    stride = _per_dimension("stride", stride, rank)
    dilation = _per_dimension("dilation", dilation, rank)
    if padding == "same":  # as torch: the odd zero goes behind
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        pairs = tuple((t // 2, t - t // 2) for t in totals)
    elif padding == "valid":
        pairs = ((0, 0),) * rank
    elif isinstance(padding, str):
        raise ValueError(f"`padding` must be 'same', 'valid', an integer or one entry per dimension, got {padding!r}.")
    else:
        entries = (padding,) * rank if isinstance(padding, int) else tuple(padding)
        if len(entries) != rank:
            raise ValueError(f"`padding` must have {rank} entries, one per spatial dimension, got {padding!r}.")
        pairs = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in entries)
    return ConvGeometry(kernel_size, stride, pairs, dilation, groups)


def conv_apply(weight: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Convolution without bias of a batch ``x`` of shape (B, C_in, *size)."""
    common, extra = _split_padding(geometry)
    x = F.pad(x, extra) if any(extra) else x
    convolve = _CONV[x.dim() - 2]
    return convolve(x, weight, None, geometry.stride, common, geometry.dilation, geometry.groups)


def conv_adjoint(weight: Tensor, y: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """Exact adjoint of :func:`conv_apply` on inputs of shape (B, C_in, *input_size)."""
    common, extra = _split_padding(geometry)
    rank = len(input_size)
    padded = [n + extra[2 * (rank - 1 - i)] + extra[2 * (rank - 1 - i) + 1] for i, n in enumerate(input_size)]
    shape = (y.shape[0], weight.shape[1] * geometry.groups, *padded)
    x = _CONV_INPUT[rank](shape, weight, y, geometry.stride, common, geometry.dilation, geometry.groups)
    return F.pad(x, [-p for p in extra]) if any(extra) else x


def conv_weight_gradient(y: Tensor, x: Tensor, weight_shape: Sequence[int], geometry: ConvGeometry) -> Tensor:
    """Gradient of ⟨y, conv(x, W)⟩ with respect to W: the rank-one operator y xᵀ pulled back on the weight."""
    common, extra = _split_padding(geometry)
    x = F.pad(x, extra) if any(extra) else x
    gradient = _CONV_WEIGHT[x.dim() - 2]
    return gradient(x, weight_shape, y, geometry.stride, common, geometry.dilation, geometry.groups)


def conv_operator(weight: Tensor, input_size: Sequence[int], geometry: ConvGeometry) -> LinearOperator:
    """The convolution by ``weight`` on unbatched inputs (C_in, *input_size)."""
    copies = _copies(weight, geometry.output_size(input_size))
    return LinearOperator(
        apply=lambda v: conv_apply(weight, v[None], geometry)[0],
        adjoint=lambda u: conv_adjoint(weight, u.expand(copies, *u.shape), input_size, geometry)[0],
        weight_gradient=lambda u, v: conv_weight_gradient(u[None], v[None], weight.shape, geometry),
    )


def _copies(weight: Tensor, output_size: Sequence[int]) -> int:
    """Two images on the CPU where the output is one pixel, for an adjoint that is equal to the last bit at every run.

    Torch leaves a single small image to a matrix product of MKL (``use_mkldnn`` in its Convolution.cpp), which for one
    column splits the sum between threads and adds in the order in which they finish: with 512 channels it differed
    between runs on Intel's code path, and with it seeded fits and resumes. Two images go to oneDNN.
    """
    return 2 if weight.device.type == "cpu" and math.prod(output_size) == 1 else 1


def matrix_operator(weight: Tensor) -> LinearOperator:
    """The product by the matrix ``weight`` of shape (out_features, in_features)."""
    return LinearOperator(
        apply=lambda v: weight @ v,
        adjoint=lambda u: weight.T @ u,
        weight_gradient=lambda u, v: u[:, None] * v,
    )


def _per_dimension(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    entries = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(entries) != rank:
        raise ValueError(f"`{name}` must be an integer or have {rank} entries, got {value!r}.")
    return entries


def _split_padding(geometry: ConvGeometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the convolution pads itself, and the rest as F.pad takes it (last dimension first)."""
    common = tuple(min(pair) for pair in geometry.padding)
    pairs = zip(reversed(geometry.padding), reversed(common), strict=True)
    return common, tuple(side - c for pair, c in pairs for side in pair)


@dataclass(frozen=True)
class SingularTriplet:
    """Estimate of the largest singular value; ``value`` never exceeds it (up to rounding)."""

    value: Tensor  # (), σ = ⟨left, A right⟩
    left: Tensor  # output shape, unit norm (zero where A is zero)
    right: Tensor  # input shape, unit norm
    residual: Tensor  # (), relative residual of the pair
    iterations: int  # products with A and with Aᵀ, each


def power_iteration(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    num_iterations: int = 1,
) -> SingularTriplet:
    """A fixed number of power iterations, without host synchronisation.

    u = A v / ‖A v‖, then v = Aᵀu / ‖Aᵀu‖, and σ = ‖Aᵀu‖. The residual ‖Aᵀu − ‖Av‖ v‖ / σ is that of the pair
    before its last half-step, which is known without another product.

    Args:
        apply: v -> A v.
        adjoint: u -> Aᵀ u.
        start: unit vector of any shape that ``apply`` takes; kept where the operator is zero.
        num_iterations: at least 1.

    Returns:
        The triplet, with σ at most the operator norm.

    Raises:
        ValueError: when ``num_iterations`` is below 1.

    Source:
        Golub and Van Loan, Matrix Computations, 4th ed., section 8.6 (textbook method).

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 1.0]))
        >>> start = torch.tensor([0.6, 0.8])
        >>> print(f"{power_iteration(A.mv, A.T.mv, start, num_iterations=10).value:.4f}")
        3.0000
    """
    check_int("num_iterations", num_iterations)
    right, left, value, residual = start, start, start, start
    for _ in range(num_iterations):
        image = apply(right)
        norm = torch.linalg.vector_norm(image)
        left = image / _nonzero(norm)
        back = adjoint(left)
        value = torch.linalg.vector_norm(back)
        residual = torch.linalg.vector_norm(back - norm * right) / _nonzero(value)
        right = torch.where(value > 0, back / _nonzero(value), right)
    return SingularTriplet(value, left, right, residual, num_iterations)


def filtered_power_iteration(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    num_iterations: int = 5,
) -> SingularTriplet:
    r"""Power iteration behind a Chebyshev filter, without host synchronisation: for a slowly changing operator.

    With :math:`c = 0.9\,\|A v\|^2 / 2` the filter is :math:`T_{k-1}(A^\top A / c - 1)\, v`, by its recurrence. It damps
    singular values below :math:`\sqrt{0.9}` of the present estimate and raises those above by far more than powers do,
    7 instead of 1.7 times at :math:`k = 5`. One power iteration follows. When a layer's second singular value
    overtakes its first, plain powers take hundreds of steps to notice.

    Args:
        apply: v -> A v.
        adjoint: u -> Aᵀ u.
        start: unit vector of any shape that ``apply`` takes; kept, up to its sign, where the operator is zero.
        num_iterations: k, products with A and with Aᵀ, each; at least 1, which is :func:`power_iteration`.

    Returns:
        The triplet, with σ at most the operator norm.

    Raises:
        ValueError: when ``num_iterations`` is below 1.

    Source:
        Saad, Numerical Methods for Large Eigenvalue Problems, section 7.4 (Chebyshev iteration); the use is ours.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 2.7, 1.0]))
        >>> start = torch.tensor([0.1, 0.99, 0.1])
        >>> print(f"{filtered_power_iteration(A.mv, A.T.mv, start / start.norm(), num_iterations=10).value:.2f}")
        3.00
        >>> print(f"{power_iteration(A.mv, A.T.mv, start / start.norm(), num_iterations=10).value:.2f}")
        2.81
    """
    check_int("num_iterations", num_iterations)
    if num_iterations == 1:
        return power_iteration(apply, adjoint, start)
    image = apply(start)
    half = _nonzero(0.45 * image.square().sum())
    before, vector = start, adjoint(image) / half - start
    for _ in range(num_iterations - 2):
        scale = _nonzero(torch.linalg.vector_norm(vector))  # no overflow where the estimate is far off
        before, vector = before / scale, vector / scale
        before, vector = vector, 2 * (adjoint(apply(vector)) / half - vector) - before
    vector = vector / _nonzero(torch.linalg.vector_norm(vector))
    triplet = power_iteration(apply, adjoint, vector)
    return SingularTriplet(triplet.value, triplet.left, triplet.right, triplet.residual, num_iterations)


def largest_singular_triplet(
    apply: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float = 1e-3,
    max_iterations: int = 240,
) -> SingularTriplet:
    """Iterate to convergence by restarted Lanczos on AᵀA, 24 vectors at a time.

    Convolutions have clusters of nearly equal singular values, where plain power iteration needs hundreds
    of steps. Stops when the residual ‖AᵀAv − σ²v‖ / σ² is at most ``tolerance``.

    Args:
        apply: v -> A v.
        adjoint: u -> Aᵀ u.
        start: non-zero vector of any shape that ``apply`` takes.
        tolerance: for the relative residual of σ². At 1e-3 σ of convolutions with random filters was within
            5e-5 of its limit for inputs of 32² to 224² (ours, measured).
        max_iterations: products with A and with Aᵀ, each.

    Returns:
        The triplet, with σ at most the operator norm.

    Raises:
        ValueError: when an argument is out of range or the operator returns numbers that are not finite.

    Source:
        Saad, Numerical Methods for Large Eigenvalue Problems, chapter 6 (explicitly restarted Lanczos).

    Example:
        >>> A = torch.diag(torch.arange(1.0, 101.0))
        >>> triplet = largest_singular_triplet(A.mv, A.T.mv, torch.ones(100))
        >>> print(f"{triplet.value:.2f}")
        100.00
    """
    check_non_negative("tolerance", tolerance)
    check_int("max_iterations", max_iterations)
    right, done, converged = start, 0, False
    residual = start.new_tensor(float("inf"))
    while done < max_iterations and not converged:
        steps = min(_SUBSPACE, max_iterations - done)
        result = lanczos(lambda v: adjoint(apply(v[0]))[None], right[None], steps)
        right, residual = result.vector[0], (result.largest_residual / _nonzero(result.largest))[0]
        if not torch.isfinite(residual):
            raise ValueError("The linear operator returned numbers that are not finite; look at the layer's weight.")
        done += result.num_products
        converged = bool(residual <= tolerance)
    image = apply(right)
    value = torch.linalg.vector_norm(image)
    return SingularTriplet(value, image / _nonzero(value), right, residual, done)


def _nonzero(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny)
