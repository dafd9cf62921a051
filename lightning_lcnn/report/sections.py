"""The sections of the page below its summary: curves, layers, pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lcnn.functional import saliency_under_noise
from lightning_lcnn.plots import (
    adversarial_curves,
    curvature_histograms,
    gradient_grid,
    layer_bars,
    stability_curves,
    training_curves,
    values_over_layers,
)
from lightning_lcnn.plots.grouping import Method, is_number
from lightning_lcnn.plots.layers import layer_values
from lightning_lcnn.plots.training import History
from lightning_lcnn.report.markup import (
    Html,
    details,
    figure_html,
    in_words,
    join,
    number,
    percent,
    table,
    tag,
    thinned,
)
from lightning_lcnn.report.measures import largest_common_radius
from lightning_lcnn.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Histories = Sequence[tuple[str, History]]
# What of a history is shown: pattern of the column, label of the axis (None: the column), scale, explanation.
_TRAINING = (
    (r"lcnn/log_ratio", "log C̄ (estimate)", "linear", "Bound of curvature over slope, which the penalty lowers."),
    (r"lcnn/log_curvature", "log of the curvature (estimate)", "linear", "Bound of the network's curvature."),
    (r"(?!lcnn)(?!.*hessian).*curvature.*", None, "log", "Curvature measured in training."),
    (r"(?!lcnn)(val.*acc.*|acc.*)", "accuracy", "linear", "Accuracy in training."),
    (r"(?!lcnn).*loss.*", None, "log", "Loss in training."),
)
_PERTURBATIONS = (
    (
        "gradient_change",
        stability_curves,
        "Change of the input gradient under random noise, ‖∇f(x+δ) - ∇f(x)‖ / ‖∇f(x)‖: lower is more stable.",
    ),
    (
        "adversarial_accuracy",
        adversarial_curves,
        "Accuracy under attack. Bars: standard deviation over seeds, or the standard error of the images for one seed.",
    ),
)
Layers = Mapping[str, float]
_BARS = {
    "slope": (
        "Certified slope of each layer: bars go up from 1 where it amplifies and down where it contracts. Layers of "
        "slope 1 are left out."
    ),
    "share": (
        "What each non-linearity adds to the certified curvature bound of its network. Networks with ReLU or max "
        "pooling have no finite bound and are left out."
    ),
}
_BETA = "β of each activation, whose second derivative is at most β / 4. Lower is smoother."
_GAMMA = "γ of each normalisation at the end of training; it limits the slope of its layer."
Pair = tuple[Tensor, Tensor]
_MOST_IMAGES = 8
_MOST_PICTURES = 80  # keeps the page small
_WORDS = (
    "Gradient of the logit margin of each network itself, red positive and blue negative; below it the same with noise "
    "of ℓ₂ norm {radius:g} on the image, on the same scale, and by how much it changed. First seed of each method."
)


def training(runs: Sequence[Run]) -> Html | None:
    """Curves of the histories, or None where no run has one."""
    histories = [(run.name, run.history) for run in runs]
    figures = []
    for i, (pattern, label, scale, words) in enumerate(_TRAINING):
        column = _column(pattern, histories)
        if column is not None:
            figures.append(_training_curve(histories, column, f"training{i}", label or column, scale, words))
    return tag("div", *figures, class_="pair") if figures else None


def perturbations(methods: Sequence[Method]) -> Html | None:
    """Stability and adversarial curves, and the curvature of single images."""
    records = [record for method in methods for record in method.records]
    figures = []
    for key, draw, words in _PERTURBATIONS:
        if any(method.curve(key) for method in methods):
            radius = largest_common_radius(methods, key)
            values = in_words(methods, key, radius, as_percent=True, label=f"at ℓ₂ {radius}") if radius else []
            figures.append(figure_html(draw(records), key, f"{words} {'; '.join(values)}.", words))
    if any(value and value > 0 for record in records for value in record.get("curvature_values") or []):
        words = "Curvature of single images, all seeds of a method together."
        alt = f"{words} {'; '.join(in_words(methods, 'median_curvature', 'margin', label='median'))}."
        figures.append(figure_html(curvature_histograms(records), "histogram", alt, words))
    return tag("div", *figures, class_="pair") if figures else None


def _training_curve(histories: Histories, column: str, key: str, label: str, scale: str, words: str) -> Html:
    drawn = thinned(histories, column)
    if any(value <= 0 for _, history in drawn for value in history.get(column, ())):
        scale = "linear"
    ends = [f"{name} ends at {number(history[column][-1])}" for name, history in drawn if history.get(column)]
    figure = training_curves(drawn, column, label=label, scale=scale)
    return figure_html(figure, key, f"{words} {'; '.join(ends)}.", f"{words} Column {column}.")


def _column(pattern: str, histories: Histories) -> str | None:
    """The shortest matching column in which some history has a number."""
    matching = {c for _, history in histories for c in history if re.fullmatch(pattern, c, re.IGNORECASE)}
    filled = [c for c in matching if any(map(math.isfinite, (v for _, h in histories for v in h.get(c, ()))))]
    return min(filled, key=lambda column: (len(column), column), default=None)


def layers(methods: Sequence[Method], runs: Sequence[Run]) -> Html | None:
    """Slope and curvature share as bars and as a table, β and γ; None where nothing is known."""
    values = {quantity: {m.name: layer_values(m, quantity) for m in methods} for quantity in _BARS}
    content = [_bars(methods, quantity, values[quantity]) for quantity in _BARS if any(values[quantity].values())]
    betas = [(run.name, _positive(run.record.get("betas") or {})) for run in runs]
    gammas = [(run.name, _positive(_last_values(run.history, "lcnn_gamma/"))) for run in runs]
    for key, symbol, series, words in (("beta", "β", betas, _BETA), ("gamma", "γ", gammas, _GAMMA)):
        if any(values_ for _, values_ in series):
            ranges = [f"{name}: {number(min(v.values()))} to {number(max(v.values()))}" for name, v in series if v]
            content.append(_wide(values_over_layers(series, symbol), key, f"{words} {'; '.join(ranges)}.", words))
    if not content:
        return None
    return join([*content, details("Table of the layers", _table(values["slope"], values["share"]))])


def _bars(methods: Sequence[Method], quantity: str, values: Mapping[str, Layers]) -> Html:
    show = number if quantity == "slope" else lambda value: percent(value / 100)
    largest = [
        f"{name}: largest {show(layers[top])} at {top}"
        for name, layers in values.items()
        if layers and (top := max(layers, key=layers.__getitem__))
    ]
    figure = layer_bars([record for method in methods for record in method.records], quantity)
    return _wide(figure, quantity, f"{_BARS[quantity]} {'; '.join(largest)}.", _BARS[quantity])


def _table(slopes: Mapping[str, Layers], shares: Mapping[str, Layers]) -> Html:
    names = list(dict.fromkeys(layer for part in (slopes, shares) for layers in part.values() for layer in layers))
    head = ["layer", *(title for name in slopes for title in (f"{name}: slope", f"{name}: share of the curvature"))]
    rows = []
    for layer in names:
        cells = [layer]
        for name in slopes:
            slope = slopes[name].get(layer, 1.0 if slopes[name] else math.nan)
            share = shares[name].get(layer, 0.0 if shares[name] else math.nan)
            cells += [number(slope), percent(share / 100)]
        rows.append(cells)
    return table("Certified slope of each layer and its share of the curvature bound, means over seeds.", head, rows)


def _last_values(history: History, prefix: str) -> dict[str, float]:
    """By layer, the last number of each column that starts with the prefix."""
    ends = {}
    for column, values in history.items():
        numbers = [value for value in values if math.isfinite(value)]
        if column.startswith(prefix) and numbers:
            ends[column.removeprefix(prefix)] = numbers[-1]
    return ends


def _positive(values: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix("network."): value for name, value in values.items() if is_number(value) and value > 0}


def _wide(figure: Figure, key: str, alt: str, words: str) -> Html:
    return tag("div", figure_html(figure, key, alt, words), class_="wide")


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
