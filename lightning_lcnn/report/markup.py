"""HTML that cannot be broken by what it shows: text is escaped unless it is `Html` already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


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
