"""Curves over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_lcnn._checks import import_extra
from lightning_lcnn.plots.style import legend_below, looks, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

History = Mapping[str, Sequence[float]]  # columns of equal length; NaN where a row has no value


@styled
def training_curves(
    histories: Sequence[tuple[str, History]], column: str, *, label: str | None = None, scale: str = "linear"
) -> Figure:
    """One column of training histories over epochs, or over steps where rows have no epoch of their own.

    Args:
        histories: Pairs of a name and the columns of its history.csv or metrics.csv; seeds of one name get one colour.
        column: Name of the column to draw. Histories without it are left out.
        label: Of the vertical axis, with its unit; the column's name by default.
        scale: ``"linear"`` or ``"log"``.

    Returns:
        A matplotlib Figure.

    Raises:
        ValueError: If no history has numbers in the column.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> history = {"epoch": [0, 1, 2], "lcnn/log_ratio": [5.0, float("nan"), 3.0]}
        >>> axes = training_curves([("LCNN", history)], "lcnn/log_ratio").axes[0]
        >>> [float(x) for x in axes.lines[0].get_xdata()]
        [0.0, 2.0]
    """
    drawn = [(name, history, rows) for name, history in histories if (rows := numbered_rows(history, column))]
    if not drawn:
        raise ValueError(f"`column` {column!r} has no numbers in any of the {len(histories)} histories.")
    clock = next((c for c in ("epoch", "step") if all(_counts(h, c, rows) for _, h, rows in drawn)), None)
    methods = list(dict.fromkeys(name for name, _ in histories))
    figure = new_figure(3.2, methods)
    axes = figure.subplots()
    style, known = looks(methods), set()
    for name, history, rows in drawn:
        x = [history[clock][row] for row in rows] if clock else rows
        look = style[name] | ({"marker": ""} if len(rows) > 25 else {})
        axes.plot(x, [history[column][row] for row in rows], label=None if name in known else name, **look)
        known.add(name)
    axes.xaxis.set_major_locator(import_extra("matplotlib.ticker", "plot").MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel=clock or "row of the history", ylabel=label or column, yscale=scale)
    if scale == "log":
        plain_numbers(axes.yaxis)
    legend_below(figure, axes)
    return figure


def numbered_rows(history: History, column: str) -> list[int]:
    """Rows in which a column has a finite number."""
    return [row for row, value in enumerate(history.get(column, ())) if math.isfinite(value)]


def _counts(history: History, column: str, rows: Sequence[int]) -> bool:
    """Whether a column is there in all of the rows and grows; several rows of one epoch are told apart by steps."""
    values = [history[column][row] for row in rows] if column in history else [math.nan]
    repeats = column == "step"  # two loggers may write at one step
    grows = all(a < b or (repeats and a == b) for a, b in pairwise(values))
    return grows and all(map(math.isfinite, values))
