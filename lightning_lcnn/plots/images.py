"""Per image: the distribution of the curvature, and input gradients with and without noise."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lcnn.plots.grouping import Record, group_by_name, is_number
from lightning_lcnn.plots.style import legend_below, looks, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 40
_SIDE = 96  # pixels of a picture; larger ones are averaged down to this
_LABEL = 1.35  # inches for the names of the rows


@styled
def curvature_histograms(records: Sequence[Record]) -> Figure:
    """Distribution of the margin's curvature over images, all seeds of a method together.

    Args:
        records: Evaluation records as `evaluate` returns them, with their ``curvature_values``.

    Returns:
        A matplotlib Figure with a logarithmic axis; values of zero are in the first bin.

    Raises:
        TypeError: If ``records`` is no sequence of dictionaries.
        ValueError: If it is empty, or no record has a positive value.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> figure = curvature_histograms([{"name": "standard", "curvature_values": [3.0, 30.0, 300.0]}])
        >>> figure.axes[0].get_xscale()
        'log'
    """
    methods = group_by_name(records)
    values = {m.name: [v for r in m.records for v in r.get("curvature_values") or [] if is_number(v)] for m in methods}
    positive = [value for found in values.values() for value in found if value > 0]
    if not positive:
        raise ValueError("`records` must hold positive curvature_values, got none.")
    low, high = math.log10(min(positive)), math.log10(max(positive)) + 1e-6
    edges = [10 ** (low + (high - low) * i / _BINS) for i in range(_BINS + 1)]
    figure = new_figure(3.2, list(values))
    axes = figure.subplots()
    style = looks(list(values))
    for name, found in values.items():
        weights = [100 / len(found)] * len(found)
        look = {"color": style[name]["color"], "weights": weights, "bins": edges}
        shown = [max(value, edges[0]) for value in found]
        axes.hist(shown, alpha=0.18, **look)
        axes.hist(shown, histtype="step", linewidth=1.5, label=name, linestyle=style[name]["linestyle"], **look)
    axes.set(xscale="log", xlabel="curvature of the margin, ‖∇²f‖ / ‖∇f‖ (per unit of ℓ₂ distance)")
    axes.set_ylabel("images (%)")
    plain_numbers(axes.xaxis)
    legend_below(figure, axes)
    return figure


@styled
def gradient_grid(
    images: Tensor, gradients: Mapping[str, tuple[Tensor, Tensor | None]], noisy_images: Tensor | None = None
) -> Figure:
    """Input gradients of the same images for each network, with and without noise.

    Channels are added. Red is positive, blue negative; the scale of each picture is that of the gradient without noise,
    also for the one with noise below it, under which its relative change stands, ‖∇f(x+δ) - ∇f(x)‖ / ‖∇f(x)‖.

    Args:
        images: (N, C, H, W) in [0, 1], shown in the first row.
        gradients: By name of the network, the gradients (N, C, H, W) without and with noise; None for no second row.
        noisy_images: (N, C, H, W), shown in the second row.

    Returns:
        A matplotlib Figure with one column per image.

    Raises:
        ValueError: If shapes differ or there is no image.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> import torch
        >>> x = torch.rand(2, 1, 4, 4)
        >>> len(gradient_grid(x, {"standard": (x, x + 0.1)}).axes)
        6
    """
    maps = [tensor for pair in (*gradients.values(), (noisy_images,)) for tensor in pair if tensor is not None]
    if images.ndim != 4 or len(images) == 0 or any(tensor.shape != images.shape for tensor in maps):
        shapes = sorted({tuple(tensor.shape) for tensor in maps})
        raise ValueError(
            f"`images` and `gradients` must have one shape (N, C, H, W), got {tuple(images.shape)} and {shapes}."
        )
    side = min(0.95, 8 / len(images))
    figure = new_figure(side * (1 + len(maps)) + 0.16 * len(gradients) + 0.1, width=_LABEL + side * len(images))
    grid = figure.subplots(1 + len(maps), len(images), squeeze=False)
    row = 0
    for label, pictures in (("image", images), ("with noise", noisy_images)):
        if pictures is not None:
            _row(grid[row], label, [_picture(_shrunk(image)) for image in pictures], cmap="gray", vmin=0, vmax=1)
            row += 1
    for name, (clean, noisy) in gradients.items():
        limits = [_limit(gradient) for gradient in clean]
        _maps(grid[row], _wrapped(name), clean, limits)
        if noisy is not None:
            row += 1
            _maps(grid[row], "with noise", noisy, limits)
            change = (noisy - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
            for axes, value in zip(grid[row], change.tolist(), strict=True):
                axes.set_xlabel(f"{100 * value:.0f} %" if math.isfinite(value) else "–", fontsize=8, labelpad=2)
        row += 1
    return figure


def _maps(row: Any, label: str, gradients: Tensor, limits: Sequence[float]) -> None:
    _row(row, label, [_shrunk(gradient.sum(0, keepdim=True))[0] for gradient in gradients])
    for axes, limit in zip(row, limits, strict=True):
        axes.images[0].set(cmap="RdBu_r", clim=(-limit, limit))


def _row(row: Sequence[Axes], label: str, pictures: Sequence[Tensor], **look: Any) -> None:
    row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axes, picture in zip(row, pictures, strict=True):
        axes.imshow(picture.detach().float().cpu().numpy(), interpolation="none", **look)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)


def _shrunk(picture: Tensor) -> Tensor:
    """(C, H, W), averaged down where a side is longer than can be seen."""
    height, width = picture.shape[1:]
    scale = _SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return picture if scale >= 1 else torch.nn.functional.adaptive_avg_pool2d(picture, size)


def _picture(image: Tensor) -> Tensor:
    """(H, W) or (H, W, 3)."""
    return image.permute(1, 2, 0).clamp(0, 1) if len(image) == 3 else image.mean(0)


def _limit(gradient: Tensor) -> float:
    """Largest magnitude but for the outermost half percent, which would make the rest pale."""
    magnitude = gradient.detach().float().sum(0).abs().flatten()
    return magnitude.quantile(0.995).item() or magnitude.max().item() or 1.0


def _wrapped(name: str, width: int = 18) -> str:
    return "\n".join(textwrap.fill(line, width) for line in name.splitlines())
