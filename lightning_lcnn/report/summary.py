"""The table of the main measures, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_lcnn.plots import accuracy_against_curvature
from lightning_lcnn.plots.grouping import Method
from lightning_lcnn.plots.style import looks
from lightning_lcnn.report.figures import figure_html, in_words
from lightning_lcnn.report.markup import Html, join, table, tag
from lightning_lcnn.report.measures import Measure, all_measures, main_measures
from lightning_lcnn.report.method_notes import unequal_images

_HINT = "Curvature is ‖∇²f‖ / ‖∇f‖, averaged over images: how fast the input gradient turns.{}"
_POINTS = "Up and to the left is better. Large markers are means, bars one standard deviation, small markers seeds."


def summary(methods: Sequence[Method]) -> Html:
    """One row per method, and accuracy against curvature."""
    seeds = max(len(method.records) for method in methods)
    hint = _HINT.format(" ± is the standard deviation over seeds." if seeds > 1 else "")
    warning = unequal_images(methods)
    content = [tag("p", hint), *([tag("p", tag("strong", warning))] if warning else [])]
    content += [_table_of_methods(methods, main_measures(methods))]
    curvature = ("curvature", "margin")
    if any(method.numbers("accuracy") and method.numbers(*curvature) for method in methods):
        pairs = zip(
            in_words(methods, "accuracy", as_percent=True, label="accuracy"),
            in_words(methods, *curvature, label="curvature", named=False),
            strict=True,
        )
        alt = f"Accuracy against curvature. {'; '.join(', '.join(pair) for pair in pairs)}."
        figure = accuracy_against_curvature([record for method in methods for record in method.records])
        content.append(figure_html(figure, "accuracy", alt, _POINTS))
    return join(content)


def all_numbers(methods: Sequence[Method]) -> Html:
    """One row per measure."""
    measures = [m for m in all_measures(methods) if any(method.spread(*m.path) for method in methods)]
    rows = [[measure.label, *(measure.cell(method, methods) for method in methods)] for measure in measures]
    return table(_caption(methods), ["measure", *(method.name for method in methods)], rows)


def _table_of_methods(methods: Sequence[Method], measures: Sequence[Measure]) -> Html:
    look = looks([method.name for method in methods])
    rows = [
        [_named(method, look[method.name]["color"]), *(measure.cell(method, methods) for measure in measures)]
        for method in methods
    ]
    return table(_caption(methods), ["method", *(_heading(measure) for measure in measures)], rows)


def _caption(methods: Sequence[Method]) -> str:
    if len(methods) == 1:
        return methods[0].name
    return (
        "★ best, or as far from the best as the spread over seeds (for one seed, the standard error of the images) "
        f"explains; none where all are. Small print: compared with {methods[0].name}."
    )


def _named(method: Method, colour: str) -> Html:
    swatch = tag("span", class_="swatch", style=f"background: {colour}")
    seeds = [tag("small", f"{len(method.records)} seeds")] if len(method.records) > 1 else []
    return join([swatch, method.name, *seeds])


def _heading(measure: Measure) -> Html:
    return join([measure.label, *([tag("small", measure.better)] if measure.better else [])])
