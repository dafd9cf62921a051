"""What each layer does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lcnn.plots import layer_bars, values_over_layers
from lightning_lcnn.plots.grouping import Method, is_number
from lightning_lcnn.plots.layers import layer_values
from lightning_lcnn.plots.training import History
from lightning_lcnn.report.figures import figure_html
from lightning_lcnn.report.markup import Html, details, join, table, tag
from lightning_lcnn.report.numbers import number, percent
from lightning_lcnn.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
