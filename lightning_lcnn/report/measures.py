"""What the tables show: each measure with its place in the record and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lcnn.plots import accuracy_against_curvature
from lightning_lcnn.plots.grouping import Method
from lightning_lcnn.plots.style import looks
from lightning_lcnn.report.markup import (
    Html,
    against,
    figure_html,
    in_words,
    join,
    number,
    percent,
    spread_text,
    table,
    tag,
)
from lightning_lcnn.report.method_notes import unequal_images

HIGHER, LOWER, NEITHER = "higher is better", "lower is better", ""
_HINT = "Curvature is ‖∇²f‖ / ‖∇f‖, averaged over images: how fast the input gradient turns.{}"
_POINTS = "Up and to the left is better. Large markers are means, bars one standard deviation, small markers seeds."


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation record."""

    label: str
    path: tuple[str, ...]
    better: str = NEITHER
    as_percent: bool = False

    def cell(self, method: Method, methods: Sequence[Method]) -> Html:
        """Mean and spread, a star for the best, and below it the comparison with the first method."""
        spread = method.spread(*self.path)
        if spread is None:
            return tag("td", "none" if self.path[0] == "certified" else spread_text(None))
        text = spread_text(spread, self.as_percent)
        parts: list[str] = [text]
        if spread.count < len(method.records):
            parts.append(tag("small", f"{spread.count} of {len(method.records)} runs"))
        if method in self._best(methods):
            parts[0] = tag("strong", text, tag("span", " ★", role="img", aria_label="best"))
        baseline = methods[0].spread(*self.path)
        if baseline is not None and method is not methods[0]:
            points = self.as_percent and self.better == HIGHER
            parts.append(tag("small", against(spread.mean, baseline.mean, points)))
        return tag("td", join(parts))

    def _best(self, methods: Sequence[Method]) -> list[Method]:
        """The methods with the best mean or within the uncertainty of the difference; none where all are."""
        means = {m.name: found.mean for m in methods if (found := m.spread(*self.path)) is not None}
        if not self.better or len(means) < 2:
            return []
        best = (max if self.better == HIGHER else min)(means, key=means.__getitem__)
        errors = {m.name: self._uncertainty(m) for m in methods}
        near = [
            m
            for m in methods
            if m.name in means and self._as_good(means[m.name], means[best], math.hypot(errors[m.name], errors[best]))
        ]
        return near if len(near) < len(means) else []

    def _as_good(self, value: float, best: float, error: float) -> bool:
        """Whether two means differ by no more than the error of their difference, or than the digits that are shown."""
        shown = percent if self.as_percent else number
        return abs(value - best) <= error or shown(value) == shown(best)

    def _uncertainty(self, method: Method) -> float:
        """Standard deviation over seeds; of one seed the standard error of an accuracy, for anything else 0."""
        spread = method.spread(*self.path)
        if spread is None or spread.count > 1:
            return 0.0 if spread is None else spread.deviation
        images = {"accuracy": "examples", "adversarial_accuracy": "attacked_examples"}.get(self.path[0])
        count = method.spread(images) if images else None
        share = min(1.0, max(0.0, spread.mean))
        return math.sqrt(share * (1 - share) / count.mean) if count and count.mean > 0 else 0.0


def all_measures(methods: Sequence[Method]) -> list[Measure]:
    """Every measure, with the radii that the records have."""
    found = [Measure("test accuracy", ("accuracy",), HIGHER, True)]
    for output in ("margin", "loss"):
        found += [
            Measure(f"gradient norm of the {output}", ("gradient_norm", output)),
            Measure(f"Hessian norm of the {output}", ("hessian_norm", output)),
            Measure(f"curvature of the {output}, mean", ("curvature", output), LOWER),
            Measure(f"curvature of the {output}, median", ("median_curvature", output), LOWER),
            Measure(f"Hessian norms of the {output} that converged", ("converged", output), NEITHER, True),
        ]
    found += [
        Measure(f"gradient change under noise, ℓ₂\u00a0{radius}", ("gradient_change", radius), LOWER, True)
        for radius in _radii(methods, "gradient_change")
    ]
    found += [
        Measure(f"accuracy under attack, ℓ₂\u00a0{radius}", ("adversarial_accuracy", radius), HIGHER, True)
        for radius in _radii(methods, "adversarial_accuracy")
    ]
    return [
        *found,
        Measure("certified slope", ("certified", "slope"), LOWER),
        Measure("certified curvature", ("certified", "curvature"), LOWER),
    ]


def main_measures(methods: Sequence[Method]) -> list[Measure]:
    """The columns of the summary: of each kind of perturbation the largest radius that all methods have."""
    found = [
        Measure("test accuracy", ("accuracy",), HIGHER, True),
        Measure("curvature of the margin", ("curvature", "margin"), LOWER),
        Measure("gradient norm of the margin", ("gradient_norm", "margin")),
    ]
    for key, label, better in (
        ("gradient_change", "gradient change under noise", LOWER),
        ("adversarial_accuracy", "accuracy under attack", HIGHER),
    ):
        radius = largest_common_radius(methods, key)
        if radius is not None:
            found.append(Measure(f"{label}, ℓ₂\u00a0{radius}", (key, radius), better, True))
    certified = Measure("certified curvature", ("certified", "curvature"), LOWER)
    return found + [certified] * any(method.spread(*certified.path) is not None for method in methods)


def largest_common_radius(methods: Sequence[Method], key: str) -> str | None:
    """The largest radius at which every method that has any was measured."""
    curves = [curve for method in methods if (curve := method.curve(key))]
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return max(common, key=float, default=None)


def _radii(methods: Sequence[Method], key: str) -> list[str]:
    return sorted({radius for method in methods for radius in method.curve(key)}, key=float)


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
