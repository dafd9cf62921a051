"""What the tables show: each measure with its place in the record and which direction is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_lcnn.plots.grouping import Method
from lightning_lcnn.report.markup import Html, join, tag
from lightning_lcnn.report.numbers import against, number, percent, spread_text

HIGHER, LOWER, NEITHER = "higher is better", "lower is better", ""


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
