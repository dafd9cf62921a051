"""Input gradients of the same images for each network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_lcnn.functional import saliency_under_noise
from lightning_lcnn.plots import gradient_grid
from lightning_lcnn.report.figures import figure_html
from lightning_lcnn.report.markup import Html, join, tag
from lightning_lcnn.report.numbers import percent
from lightning_lcnn.report.runs import Run

Pair = tuple[Tensor, Tensor]

_MOST_IMAGES = 8
_MOST_PICTURES = 80  # keeps the page small
_WORDS = (
    "Gradient of the logit margin of each network itself, red positive and blue negative; below it the same with noise "
    "of ℓ₂ norm {radius:g} on the image, on the same scale, and by how much it changed. First seed of each method."
)


def input_gradients(runs: Sequence[Run], images: Tensor, labels: Tensor, radius: float) -> Html | None:
    """The grid of pictures, or None where no run has a network."""
    networks: dict[str, nn.Module] = {}
    for run in runs:
        if run.network is not None:
            networks.setdefault(run.name, run.network)
    count = min(_MOST_IMAGES, max(2, _MOST_PICTURES // (1 + 2 * len(networks))))
    rows = one_of_each_class(labels, count)
    shown = images[rows].float() / (255 if images.dtype == torch.uint8 else 1)
    gradients, notes, noise = {}, [], torch.zeros(())
    for name, network in networks.items():
        try:
            gradients[name], noise = _gradients(network, shown, labels[rows], radius)
        except (ValueError, TypeError, RuntimeError) as error:
            notes.append(tag("p", f"{name}: no input gradients: {str(error).splitlines()[0]}", class_="soft"))
    if not gradients:
        return join(notes) or None
    words = _WORDS.format(radius=radius)
    alt = f"Input gradients of {count} images. {words} Mean changes: {'; '.join(_changes(gradients))}."
    figure = figure_html(gradient_grid(shown, gradients, shown + noise), "gradients", alt, words)
    return join([tag("div", figure, class_="wide"), *notes])


def one_of_each_class(labels: Tensor, count: int) -> list[int]:
    """Rows of the first image of each class, then of the second, and so on, at most ``count``.

    Example:
        >>> one_of_each_class(torch.tensor([3, 3, 0, 1, 1]), 4)
        [2, 3, 0, 4]
    """
    seen: dict[int, int] = {}
    ranked = []
    for row, label in enumerate(labels.tolist()):
        ranked.append((seen.get(label, 0), label, row))
        seen[label] = seen.get(label, 0) + 1
    return [row for _, _, row in sorted(ranked)[:count]]


def _gradients(network: nn.Module, images: Tensor, labels: Tensor, radius: float) -> tuple[Pair, Tensor]:
    """Gradients without and with noise, and the noise."""
    like = next((p for p in network.parameters() if p.is_floating_point()), images)
    result = saliency_under_noise(network, images.to(like), labels.to(like.device), radius)
    return (result.clean.float().cpu(), result.noisy.float().cpu()), result.noise.float().cpu()


def _changes(gradients: dict[str, Pair]) -> list[str]:
    return [
        f"{name} {percent(((noisy - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)).mean().item())}"
        for name, (clean, noisy) in gradients.items()
    ]
