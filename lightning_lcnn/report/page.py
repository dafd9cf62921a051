"""The frame of the page: head, style, contents."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lcnn.__about__ import __version__
from lightning_lcnn.report.markup import Html, join, tag

# The browser itself refuses whatever would need the network or run code.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c62; --line: #d9d9de; --page: #fff; --panel: #f5f5f7;
  --mark: #e8f3ec; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e9; --soft: #a2a2aa; --line: #3c3c42; --page: #17171a;
  --panel: #212125; --mark: #1d3327; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 62rem; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
p, ul, dl { max-width: 46rem; }
a { color: inherit; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; }
.soft, figcaption, caption, small { color: var(--soft); }
.scroll { overflow-x: auto; margin: .8rem 0; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; font-size: .875rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; min-width: 5.5rem; }
th:first-child { text-align: left; min-width: 9.5rem; max-width: 18rem; overflow-wrap: anywhere; position: sticky;
  left: 0; background: var(--page); }
table.text th { text-align: left; }
table.text td { text-align: left; white-space: normal; overflow-wrap: break-word; max-width: 20rem; }
tbody th { font-weight: 500; }
td small, th small { display: block; font-weight: 400; }
td:has(strong) { background: var(--mark); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .5em; }
figure { margin: 1.2rem 0; }
.picture { overflow-x: auto; }
.picture svg { display: block; width: 100%; max-width: calc(var(--width) * 1.25); height: auto; fill: currentColor;
  stroke-linejoin: round; stroke-linecap: butt; }
.wide svg { min-width: 34rem; }
figcaption { font-size: .875rem; max-width: 46rem; margin-top: .3rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin-left: 0; }
@media (min-width: 60rem) { .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; } }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --panel: #fff; --mark: #eee; color-scheme: light; }
  body { max-width: none; font-size: 10pt; }
  nav { display: none; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll, .picture { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .2rem .4rem; min-width: 0 !important; white-space: normal; }
  details::details-content { content-visibility: visible; display: block; }
}
"""


def page(title: str, subtitle: str, sections: Sequence[tuple[str, Html]]) -> Html:
    """The whole document; sections are pairs of a heading and the content."""
    anchors = [f"section-{i}" for i in range(len(sections))]
    links = [
        tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, (heading, _) in zip(anchors, sections, strict=True)
    ]
    body = [
        tag("section", tag("h2", heading, id=anchor), content)
        for anchor, (heading, content) in zip(anchors, sections, strict=True)
    ]
    head = join(
        [
            Html('<meta charset="utf-8">'),
            Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            tag("title", title),
            tag("style", Html(STYLE)),
        ],
        "\n",
    )
    main = tag(
        "main",
        tag("h1", title),
        tag("p", subtitle, class_="soft"),
        tag("nav", tag("ul", *links), aria_label="Contents"),
        *body,
        tag("p", f"Written by lightning-lcnn {__version__}.", class_="soft"),
    )
    return Html(f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', main), lang='en')}\n")
