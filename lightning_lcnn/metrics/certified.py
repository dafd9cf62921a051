"""Share of examples whose classification is proven not to change within a radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_int, check_positive
from lightning_lcnn.bounds import MarginBounds, margin_bounds
from lightning_lcnn.bounds.measured import identity
from lightning_lcnn.functional.certificates import (
    exact,
    lipschitz_radius,
    rounded_down,
    second_order_dual_radius,
    taylor_radius,
)
from lightning_lcnn.functional.input_function import check_inputs, check_logits, check_model, logits_of, unwrap
from lightning_lcnn.kernels.preserved_state import measuring
from lightning_lcnn.metrics.base import MeasuringMetric
from lightning_lcnn.recording.untouched import evaluation_copy


class CertifiedAccuracy(MeasuringMetric):
    r"""Accuracy that is proven to hold in ℓ₂ balls around the examples. Experimental: names may change.

    .. math:: r(x) = \min_{j \ne t} \max\Big(\frac{m_j}{L_j},\ \frac{2 m_j}{g_j + \sqrt{g_j^2 + 2 K_j^- m_j}},\
              r^{dual}_j\Big)

    with the margin m_j = z_t - z_j to every other class j, its gradient norm g_j at x, and slope and curvature bounds
    L_j, K_j of :func:`lightning_lcnn.bounds.margin_bounds`. An example counts at radius ρ where it is classified right
    and r(x) >= ρ. Bounds, margins and radii are computed in float64, whatever the network's type, from the smaller
    of its own margin and that in float64; rounding in its forward at other points is no part of the proof. Expect
    something from shallow networks trained for it, and nothing from deep ones: without a finite curvature bound only
    the Lipschitz certificate remains. The bounds are computed again unless the same operations ran on the same numbers.

    Args:
        radii: the ρ, in units of the input, or of the pixels with ``normalization``.
        normalization: (mean, std) per channel of inputs that were normalised; the radius is then that of the input
            before it.
        dual_steps: values of η in the second-order dual, which costs 7 gradients of every margin each; 0 leaves it
            out.
        max_examples: examples per epoch and process.
        kwargs: of `torchmetrics.Metric`.

    Returns:
        A dictionary: ``clean_accuracy``, ``mean_radius`` (wrong examples count 0), and for each radius
        ``certified_accuracy_ρ`` and, from the Lipschitz certificate alone, ``lipschitz_accuracy_ρ``.

    Raises:
        TypeError: when an argument has the wrong type, or the model is no module.
        ValueError: when a radius is not positive, or `bounds.margin_bounds` refuses the model.

    Source:
        Certificates: see `functional.certificates`; the bounds per margin are ours.

    Example:
        >>> from lightning_lcnn.layers import CenteredSoftplus
        >>> metric = CertifiedAccuracy(radii=[0.1])
        >>> net = nn.Sequential(nn.Linear(2, 4), CenteredSoftplus(), nn.Linear(4, 3)).eval()
        >>> metric.update(net, torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> sorted(metric.compute())
        ['certified_accuracy_0.1', 'clean_accuracy', 'lipschitz_accuracy_0.1', 'mean_radius']
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    clean_correct: Tensor
    certified: Tensor
    lipschitz_certified: Tensor
    radius_sum: Tensor

    def __init__(
        self,
        radii: Sequence[float] = (0.1, 0.25, 0.5),
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        dual_steps: int = 8,
        max_examples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_examples, **kwargs)
        for radius in radii:
            check_positive("radii", radius)
        if not radii:
            raise ValueError("`radii` must name at least one radius, got none.")
        check_int("dual_steps", dual_steps, minimum=0)
        self.radii = sorted(float(radius) for radius in radii)
        self.normalization = normalization
        self.dual_steps = dual_steps
        self._bounds: tuple[Any, MarginBounds] | None = None
        self._add_counter("clean_correct")
        self._add_counter("certified", (len(self.radii),))
        self._add_counter("lipschitz_certified", (len(self.radii),))
        self._add_float("radius_sum")

    def _accumulate(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> None:
        check_inputs(x, target)
        network: Any = unwrap(model)
        check_model(network)
        if not isinstance(network, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, whose graph is bounded, got {type(network).__name__}.")
        with measuring(network, x):
            x, target = x.detach().clone(), target.clone()
            if self.normalization is not None:
                network = _Normalized(network, *self.normalization, x)
                x = network.undo(x)
            correct, lipschitz, radius = self._radii_of(network, x, target)
        limits = torch.tensor(self.radii, dtype=radius.dtype, device=x.device)
        device = self.num_examples.device
        self.clean_correct = self.clean_correct + correct.sum().to(device)
        self.certified = self.certified + (radius[:, None] >= limits).sum(0).to(device)
        self.lipschitz_certified = self.lipschitz_certified + (lipschitz[:, None] >= limits).sum(0).to(device)
        total = exact(self.radius_sum) + radius.sum().to(device)
        self.radius_sum = rounded_down(total, self.radius_sum.dtype)

    def _radii_of(self, network: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether right, the Lipschitz radius and the best one, each (B,), the radii in float64."""
        with torch.no_grad():
            logits = logits_of(network, x.clone(), None)  # a network may change its input in place
        check_logits(logits, target)
        correct = logits.argmax(1) == target
        bounds = self._margin_bounds(network, x)
        lipschitz, best = [], []
        with _exactly(network, x) as point:
            for other in range(logits.shape[1]):
                margins = _Margins(network, target, other, logits, point)
                first, second = _certify(margins, point, bounds, self.dual_steps)
                lipschitz.append(first)
                best.append(second)
        first, second = (torch.stack(found).amin(0).masked_fill(~correct, 0.0) for found in (lipschitz, best))
        return correct, first, second

    def _margin_bounds(self, network: nn.Module, x: Tensor) -> MarginBounds:
        """Kept from the last update where the same operations ran on the same numbers."""
        key = identity(network, x[:1])
        if key is None or self._bounds is None or self._bounds[0] != key:
            self._bounds = (key, margin_bounds(network, x[:1]))
        return self._bounds[1]

    def compute(self) -> dict[str, Tensor]:
        """Return all values, each of shape (); NaN where no example was measured."""
        result = {"clean_accuracy": self.clean_correct / self.num_examples}
        mean = exact(self.radius_sum) / self.num_examples
        result["mean_radius"] = rounded_down(mean, self.radius_sum.dtype)
        for i, radius in enumerate(self.radii):
            result[f"certified_accuracy_{radius:g}"] = self.certified[i] / self.num_examples
            result[f"lipschitz_accuracy_{radius:g}"] = self.lipschitz_certified[i] / self.num_examples
        return result


@contextmanager
def _exactly(network: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Let the network work in float64, and yield the input for it; in its own type where its code insists on one."""
    try:
        with evaluation_copy(network, double=True), torch.no_grad():
            in_double = network(x.double()).dtype == torch.float64
    except (RuntimeError, TypeError):
        in_double = False
    if in_double:
        with evaluation_copy(network, double=True):
            yield x.double()
    else:
        yield x


class _Margins:
    """x -> z_target - z_other in float64, for examples that may be selected; 0 where the target is that class.

    Lowered by what it has over the margin of the network in its own type, which is the one that users see.
    """

    def __init__(self, network: nn.Module, target: Tensor, other: int, logits: Tensor, point: Tensor) -> None:
        self.network, self.target, self.other = network, target, other
        with torch.no_grad():
            self._excess = (self._of(logits_of(network, point.clone(), None)) - self._of(logits)).clamp_min(0)

    def __call__(self, x: Tensor) -> Tensor:
        return self._of(logits_of(self.network, x.clone(), None)) - self._excess

    def _of(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        return logits.gather(1, self.target[:, None])[:, 0] - logits[:, self.other]


def _certify(margins: _Margins, x: Tensor, bounds: MarginBounds, dual_steps: int) -> tuple[Tensor, Tensor]:
    """Lipschitz radius and the largest of all, towards one other class, each (B,); infinite for the target itself."""
    pairs = (margins.target, margins.other)
    slope, negative, positive = (
        table.to(x.device)[pairs] for table in (bounds.slope, bounds.negative, bounds.positive)
    )
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        margin = margins(point)
        (gradient,) = torch.autograd.grad(margin.sum(), point)
    margin = margin.detach()
    lipschitz = lipschitz_radius(margin, slope)
    best = torch.maximum(lipschitz, taylor_radius(margin, gradient.double().flatten(1).norm(dim=1), negative))
    if dual_steps and bool((margin > 0).any()) and bool(negative.isfinite().all()):
        dual = second_order_dual_radius(margins, x, negative, positive, num_outer=dual_steps)
        best = torch.maximum(best, dual.double())
    same = margins.target == margins.other
    return lipschitz.masked_fill(same, torch.inf), best.masked_fill(same, torch.inf)


class _Normalized(nn.Module):
    """The network behind its normalisation, on pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float], x: Tensor) -> None:
        super().__init__()
        shape = (-1,) + (1,) * (x.dim() - 2)
        self.register_buffer("mean", torch.tensor(mean, dtype=x.dtype, device=x.device).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=x.dtype, device=x.device).view(shape))
        self.network = network
        self.training = network.training

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - self.mean) / self.std)

    def undo(self, x: Tensor) -> Tensor:
        """Pixels of normalised inputs."""
        return x * self.std + self.mean
