"""What all figures share: colours, sizes, and the lazy import of matplotlib."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from lightning_lcnn._checks import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

# Okabe and Ito's colours for colour-blind readers, without yellow and black, which vanish on white or black pages.
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 5.6  # inches; letters of 10 points stay readable when a phone scales the figure to its width

_PARAMETERS = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "errorbar.capsize": 2.5,
    "text.parse_math": False,  # names of methods and layers may hold dollars
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Draw with the parameters above, and leave matplotlib's own as they were."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        with import_extra("matplotlib", "plot").rc_context(_PARAMETERS):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, names: Sequence[str] = (), width: float = WIDTH) -> Figure:
    """A figure of its own, outside pyplot's list: nothing to close, no window, no backend to choose.

    ``height`` in inches is that of the drawing; a legend of ``names`` below it comes on top.
    """
    rows = -(-len(names) // _legend_columns(names)) if names else 0
    size = (width, height + 0.2 * rows)
    return import_extra("matplotlib.figure", "plot").Figure(figsize=size, layout="constrained")


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and width of each name, by position; colours repeat after seven, with dashed lines."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3],
            "linewidth": 2.5 if i == 0 else 1.5,  # the first stays in sight where others lie on it
            "markersize": 7.5 if i == 0 else 5.0,
        }
        for i, name in enumerate(names)
    }


def legend_below(figure: Figure, axes: Axes) -> None:
    """The names of an axes' artists under the figure, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels))


def _legend_columns(names: Sequence[str]) -> int:
    widest = 0.07 * max(len(name) for name in names) + 0.5  # inches, with the marker
    return max(1, min(len(names), int(WIDTH / widest)))


def plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 of a decade or, of a short axis, at all."""
    ticker = import_extra("matplotlib.ticker", "plot")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(range(1, 10))
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
