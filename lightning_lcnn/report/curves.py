"""Curves: over training, under perturbations, over images."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lightning_lcnn.plots import adversarial_curves, curvature_histograms, stability_curves, training_curves
from lightning_lcnn.plots.grouping import Method
from lightning_lcnn.plots.training import History
from lightning_lcnn.report.figures import figure_html, in_words, thinned
from lightning_lcnn.report.markup import Html, tag
from lightning_lcnn.report.measures import largest_common_radius
from lightning_lcnn.report.numbers import number
from lightning_lcnn.report.runs import Run

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
