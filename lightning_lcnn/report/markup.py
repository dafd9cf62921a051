"""Numbers, figures and pieces of HTML as the report shows them."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lightning_lcnn._checks import import_extra
from lightning_lcnn.plots.grouping import Method, Spread
from lightning_lcnn.plots.training import History, numbered_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_POINTS = 300  # per curve; more cannot be seen


class Html(str):
    """Text that is HTML and is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | int | None) -> Html:
    """One element with its children; ``class_`` and ``aria_label`` become ``class`` and ``aria-label``.

    Example:
        >>> tag("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: Iterable[str], separator: str = "") -> Html:
    """Children one after the other, each escaped unless it is HTML."""
    return Html(separator.join(c if isinstance(c, Html) else html.escape(c) for c in children))


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> Html:
    """A table that scrolls sideways by itself; the first cell of each row is its heading."""
    headings = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(cell_of(cell) for cell in row[1:])) for row in rows]
    parts = tag("caption", tag("span", caption)), tag("thead", headings), tag("tbody", *lines)
    inner = tag("table", *parts, class_=class_ or None)
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def cell_of(content: str) -> Html:
    """A data cell; content that is a cell already passes."""
    return content if isinstance(content, Html) and content.startswith("<td") else tag("td", content)


def details(summary: str, *children: str) -> Html:
    """Content that opens with a click, and is open in print."""
    return tag("details", tag("summary", summary), *children)


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits.

    Example:
        >>> number(0.012345), number(27.456), number(26300.0), number(1.234e9), number(None)
        ('0.0123', '27.5', '26,300', '1.23×10⁹', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    if 1000 <= abs(value) < 1e6:
        return f"{float(text):,.0f}"
    mantissa, exponent = text.split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_DIGITS)}"


def percent(value: float | None) -> str:
    """A fraction in percent with one decimal.

    Example:
        >>> percent(0.9866)
        '98.7 %'
    """
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def spread_text(spread: Spread | None, as_percent: bool = False) -> str:
    """Mean, and ± the standard deviation of several seeds.

    Example:
        >>> spread_text(Spread(0.987, 0.003, 5), as_percent=True)
        '98.7 ± 0.3 %'
    """
    if spread is None:
        return "–"
    if math.isnan(spread.deviation):
        return percent(spread.mean) if as_percent else number(spread.mean)
    if as_percent:
        return f"{100 * spread.mean:.1f} ± {100 * spread.deviation:.1f} %"
    return f"{number(spread.mean)} ± {number(spread.deviation, 2)}"


def against(value: float, baseline: float, points: bool = False) -> str:
    """A value relative to the baseline's, in points of percent or as a factor.

    Example:
        >>> against(1.0, 27.9), against(30.0, 20.0), against(0.986, 0.987, points=True)
        ('27.9× lower', '1.5× higher', '−0.1 points')
    """
    if points:
        difference = f"{100 * (value - baseline):+.1f}".replace("-", "−")
        return f"{difference} points" if difference not in ("+0.0", "−0.0") else "equal"
    if value <= 0 or baseline <= 0:
        return ""
    factor = number(max(value, baseline) / min(value, baseline))
    return "equal" if factor == "1" else f"{factor}× {'lower' if value < baseline else 'higher'}"


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
