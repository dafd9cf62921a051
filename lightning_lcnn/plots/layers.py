"""What each layer does: slope and curvature share as bars, β and γ as lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lcnn._checks import check_choice
from lightning_lcnn.plots.grouping import Method, Record, group_by_name, is_number
from lightning_lcnn.plots.style import legend_below, looks, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {"slope": "certified slope", "share": "share of the curvature bound (%)"}
_LABELS = 44  # of layers on one axis; more would overlap
_TOLERANCE = 1e-3  # slopes this close to 1 are not drawn
_LONGEST = 28  # letters of a layer's name


@styled
def layer_bars(records: Sequence[Record], quantity: str = "slope") -> Figure:
    """Certified slope of each layer, or its share of the network's curvature bound; one row of bars per method.

    Slopes are bars from 1 on a logarithmic axis: up amplifies, down contracts. Means over seeds. A method without
    numbers has no row: a network with ReLU or max pooling has no finite curvature bound to share.

    Args:
        records: Evaluation records as `evaluate` returns them; records of one name are seeds.
        quantity: ``"slope"`` or ``"share"``.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: If ``records`` is no sequence of dictionaries.
        ValueError: If it is empty, or for an unknown ``quantity``.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> layer = {"name": "conv1", "kind": "Conv2d", "slope": 2.0, "curvature": 0.0, "share": 0.0}
        >>> figure = layer_bars([{"name": "standard", "layers": [layer]}])
        >>> float(figure.axes[0].patches[0].get_height())
        1.0
    """
    check_choice("quantity", quantity, QUANTITIES)
    methods = group_by_name(records)
    found = {method.name: layer_values(method, quantity) for method in methods}
    style = looks(list(found))
    values = {name: heights for name, heights in found.items() if heights} or found
    names = _union(values.values())
    figure = new_figure(0.7 + 1.35 * len(values) + 0.06 * _longest(names), width=7.2)
    rows = figure.subplots(len(values), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (method, heights) in zip(rows, values.items(), strict=True):
        _bars(axes, names, heights, quantity, style[method]["color"])
        axes.set_title(method, loc="left")
    _name_layers(rows[-1], names)
    figure.supylabel(QUANTITIES[quantity], fontsize=10)
    return figure


def layer_values(method: Method, quantity: str) -> dict[str, float]:
    """Mean over seeds of each layer's slope, or of its share in percent, in the order of the network.

    Slopes of 1 and shares of 0 are left out. Shares of an infinite bound say nothing and are left out, too.
    """
    found: dict[str, list[float]] = {}
    base, tolerance = (1, _TOLERANCE) if quantity == "slope" else (0, 0)
    for record in method.records:
        layers = record.get("layers") or []
        if quantity == "share" and any(layer.get("curvature") is None for layer in layers):
            continue
        seen: dict[str, int] = {}
        for layer in layers:
            name = layer["name"].removeprefix("network.")  # of LitClassifier
            seen[name] = use = seen.get(name, 0) + 1
            value = layer.get(quantity)
            if is_number(value) and abs(value - base) > tolerance:
                name = name if use == 1 else f"{name} ({use})"
                found.setdefault(name, []).append(value if quantity == "slope" else 100 * value)
    return {name: statistics.fmean(values) for name, values in found.items()}


@styled
def values_over_layers(values: Sequence[tuple[str, Mapping[str, float]]], label: str) -> Figure:
    """A parameter such as β or γ over the layers, one line per network, on a logarithmic axis.

    Args:
        values: Pairs of a name and the positive values by layer; several of one name (seeds) get one colour.
        label: Of the vertical axis, with its unit.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: If there is nothing to draw.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> figure = values_over_layers([("LCNN", {"act1": 5.0, "act2": 3.0})], "β")
        >>> figure.axes[0].get_ylabel()
        'β'
    """
    drawn = [(name, series) for name, series in values if series]
    if not drawn:
        raise ValueError("`values` must hold at least one value, got none.")
    methods = list(dict.fromkeys(name for name, _ in values))
    names = _union(series for _, series in drawn)
    figure = new_figure(2.6 + 0.06 * _longest(names), methods, width=7.2)
    axes = figure.subplots()
    style, known = looks(methods), set()
    for name, series in drawn:
        places = [names.index(layer) for layer in series]
        axes.plot(places, list(series.values()), label=None if name in known else name, **style[name])
        known.add(name)
    axes.set(yscale="log", ylabel=label)
    plain_numbers(axes.yaxis)
    _name_layers(axes, names)
    legend_below(figure, axes)
    return figure


def _bars(axes: Axes, names: list[str], heights: Mapping[str, float], quantity: str, colour: Any) -> None:
    places = [names.index(name) for name in heights]
    base = 1 if quantity == "slope" else 0
    axes.bar(places, [height - base for height in heights.values()], bottom=base, color=colour, width=0.8)
    if quantity == "slope":
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.axhline(1, color="#7f7f7f", linewidth=0.8)
    if not heights:
        axes.text(0.5, 0.5, "no finite bound", ha="center", va="center", transform=axes.transAxes)
    axes.grid(False, axis="x")


def _name_layers(axes: Axes, names: list[str]) -> None:
    step = -(-len(names) // _LABELS) or 1
    axes.set_xticks(range(0, len(names), step), [_short(name) for name in names[::step]], rotation=90, fontsize=8)
    axes.set_xlabel("layer")
    axes.set_xlim(-0.7, max(len(names), 1) - 0.3)


def _union(parts: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for part in parts for name in part))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]


def _longest(names: Iterable[str]) -> int:
    return max((len(_short(name)) for name in names), default=0)
