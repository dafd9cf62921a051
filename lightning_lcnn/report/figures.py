"""Figures as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_lcnn._checks import import_extra
from lightning_lcnn.plots.grouping import Method
from lightning_lcnn.plots.training import History, numbered_rows
from lightning_lcnn.report.markup import Html, tag
from lightning_lcnn.report.numbers import spread_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 300  # per curve; more cannot be seen


def figure_html(figure: Figure, key: str, alt: str, caption: str) -> Html:
    """A figure with its caption; ``key`` is unique on the page, ``alt`` says in words what is to be seen."""
    width = figure.get_size_inches()[0]
    picture = tag("div", inline_svg(figure, key, alt), class_="picture", style=f"--width: {width:.1f}in")
    return tag("figure", picture, tag("figcaption", caption))


def inline_svg(figure: Figure, key: str, alt: str) -> Html:
    """The figure as an ``<svg>`` element without outside references; black becomes the colour of the text.

    Names inside (``id``) get the prefix ``key``: several figures share one page. Letters are drawn as shapes, so that
    they look the same everywhere.
    """
    file = io.StringIO()
    with import_extra("matplotlib", "plot").rc_context({"svg.fonttype": "path", "svg.hashsalt": key}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = re.sub(r"^.*?<svg[^>]*>", "", file.getvalue(), count=1, flags=re.DOTALL)
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("#000000", "currentColor")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", drawing)
    drawing = re.sub(r"\n\s*", "\n", drawing)
    width, height = 72 * figure.get_size_inches()
    opening = tag("svg", viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=alt)
    return Html(opening.removesuffix("</svg>") + drawing)


def in_words(
    methods: Sequence[Method], *path: str, label: str, as_percent: bool = False, named: bool = True
) -> list[str]:
    """What a figure shows, for those who do not see it: one phrase per method."""
    found = []
    for method in methods:
        phrase = f"{label} {spread_text(method.spread(*path), as_percent)}"
        found.append(f"{method.name}: {phrase}" if named else phrase)
    return found


def thinned(histories: Sequence[tuple[str, History]], column: str) -> list[tuple[str, History]]:
    """Histories reduced to the rows that have a number in the column, and of those to a few hundred."""
    found: list[tuple[str, History]] = []
    for name, history in histories:
        rows = numbered_rows(history, column)
        rows = rows[:: -(-len(rows) // _POINTS) or 1]
        kept = [c for c in (column, "epoch", "step") if c in history]
        found.append((name, {c: [history[c][row] for row in rows] for c in kept}))
    return found
