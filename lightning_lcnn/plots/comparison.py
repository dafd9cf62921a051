"""Methods compared: accuracy against curvature, and what perturbations do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_lcnn._checks import check_choice
from lightning_lcnn.plots.grouping import Method, Record, Spread, group_by_name
from lightning_lcnn.plots.style import legend_below, looks, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def accuracy_against_curvature(
    records: Sequence[Record], *, output: str = "margin", statistic: str = "curvature"
) -> Figure:
    """Accuracy over curvature, one point per method: up and to the left is better.

    A large marker is the mean over seeds, its bars one standard deviation, small markers the seeds. The axis of the
    curvature is logarithmic; methods without a curvature or an accuracy are left out.

    Args:
        records: Evaluation records as `evaluate` returns them; records of one name are seeds.
        output: ``"margin"`` or ``"loss"``, whose curvature.
        statistic: ``"curvature"`` (mean over images) or ``"median_curvature"``.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: If ``records`` is no sequence of dictionaries.
        ValueError: If it is empty, or for an unknown ``output`` or ``statistic``.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> record = {"name": "standard", "accuracy": 0.9, "curvature": {"margin": 30.0}}
        >>> figure = accuracy_against_curvature([record])
        >>> figure.axes[0].get_xscale()
        'log'
    """
    check_choice("output", output, ("margin", "loss"))
    check_choice("statistic", statistic, ("curvature", "median_curvature"))
    methods = group_by_name(records)
    figure, axes, style = _canvas(methods)
    for method in methods:
        _point(axes, method, (statistic, output), style[method.name])
    axes.set(xscale="log", ylabel="test accuracy (%)")
    axes.set_xlabel(f"{_CURVATURES[statistic]} of the {output}, ‖∇²f‖ / ‖∇f‖ (per unit of ℓ₂ distance)")
    plain_numbers(axes.xaxis)
    legend_below(figure, axes)
    return figure


def _canvas(methods: Sequence[Method]) -> tuple[Figure, Axes, dict[str, dict[str, Any]]]:
    names = [method.name for method in methods]
    figure = new_figure(3.6, names)
    return figure, figure.subplots(), looks(names)


_CURVATURES = {"curvature": "mean curvature", "median_curvature": "median curvature"}


def _point(axes: Axes, method: Method, path: tuple[str, str], look: dict[str, Any]) -> None:
    pairs = [
        (curvature[0], 100 * accuracy[0])
        for seed in (Method(method.name, (record,)) for record in method.records)
        if (curvature := seed.numbers(*path)) and (accuracy := seed.numbers("accuracy")) and curvature[0] > 0
    ]
    if not pairs:
        return
    curvatures, accuracies = zip(*pairs, strict=True)
    look = {**look, "linestyle": "none"}
    mean = statistics.fmean(curvatures), statistics.fmean(accuracies)
    if len(pairs) > 1:
        right, up = statistics.stdev(curvatures), statistics.stdev(accuracies)
        left = min(right, mean[0] - min(curvatures) / 2)  # a logarithmic axis has no room below zero
        axes.errorbar(*mean, xerr=[[left], [right]], yerr=up, color=look["color"], fmt="none")
        axes.plot(curvatures, accuracies, alpha=0.45, **{**look, "markersize": 3.5})
    axes.plot(*mean, label=method.name, **{**look, "markersize": 8})


@styled
def stability_curves(records: Sequence[Record]) -> Figure:
    """Relative change of the input gradient under random noise of growing length: lower is more stable.

    Lines are means over seeds, bars one standard deviation.

    Args:
        records: Evaluation records as `evaluate` returns them; records of one name are seeds.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: If ``records`` is no sequence of dictionaries.
        ValueError: If it is empty.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> record = {"name": "standard", "gradient_change": {"0.05": 0.1, "0.1": 0.2}}
        >>> axes = stability_curves([record]).axes[0]
        >>> [float(y) for y in axes.lines[0].get_ydata()]
        [0.0, 10.0, 20.0]
    """
    methods = group_by_name(records)
    figure, axes, style = _canvas(methods)
    for method in methods:
        still = Spread(0.0, math.nan, 1)
        _curve(axes, method, {"0": still} | method.curve("gradient_change"), style[method.name])
    axes.set(xlabel="ℓ₂ norm of the noise (pixels in [0, 1])", ylabel="change of the gradient (%)")
    axes.set_ylim(bottom=0)
    legend_below(figure, axes)
    return figure


@styled
def adversarial_curves(records: Sequence[Record]) -> Figure:
    """Accuracy under attacks of growing ℓ₂ radius: higher is more robust.

    Lines are means over seeds, bars one standard deviation; with one seed, the standard error over the attacked images.

    Args:
        records: Evaluation records as `evaluate` returns them; records of one name are seeds.

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError: If ``records`` is no sequence of dictionaries.
        ValueError: If it is empty.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> record = {"name": "standard", "accuracy": 0.9, "adversarial_accuracy": {"0.1": 0.5}}
        >>> axes = adversarial_curves([record]).axes[0]
        >>> [float(y) for y in axes.lines[0].get_ydata()]
        [90.0, 50.0]
    """
    methods = group_by_name(records)
    figure, axes, style = _canvas(methods)
    for method in methods:
        curve = method.curve("adversarial_accuracy")
        if len(method.records) == 1:
            errors = method.curve("adversarial_standard_error")
            curve = {r: replace(v, deviation=errors[r].mean) if r in errors else v for r, v in curve.items()}
        clean = method.spread("accuracy")
        _curve(axes, method, ({"0": clean} if clean else {}) | curve, style[method.name])
    axes.set(xlabel="ℓ₂ radius of the attack (pixels in [0, 1])", ylabel="accuracy under attack (%)")
    axes.set_ylim(bottom=0)
    legend_below(figure, axes)
    return figure


def _curve(axes: Axes, method: Method, curve: dict[str, Spread], look: dict[str, Any]) -> None:
    if len(curve) < 2:  # nothing but the point without perturbation
        return
    radii = [float(radius) for radius in curve]
    means = [100 * value.mean for value in curve.values()]
    bars = [0.0 if math.isnan(value.deviation) else 100 * value.deviation for value in curve.values()]
    axes.plot(radii, means, label=method.name, **look)
    if any(bars):
        axes.errorbar(radii, means, yerr=bars, fmt="none", color=look["color"], alpha=0.7)
