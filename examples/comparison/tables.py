"""Tables of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Value = Callable[[dict[str, Any]], float | None]


def columns(evaluation: dict[str, Any]) -> dict[str, tuple[Value, str]]:
    """What the table shows: a title, how to read it from an evaluation, and its format."""

    def at(*keys: str, factor: float = 1.0) -> Value:
        def read(record: dict[str, Any]) -> float | None:
            for key in keys:
                record = record[key]
            return None if record is None else factor * record

        return read

    table: dict[str, tuple[Value, str]] = {
        "accuracy %": (at("accuracy", factor=100), ".1f"),
        "C margin": (at("curvature", "margin"), ".3g"),
        "C loss": (at("curvature", "loss"), ".3g"),
        "‖∇‖ margin": (at("gradient_norm", "margin"), ".3g"),
        "‖∇²‖ margin": (at("hessian_norm", "margin"), ".3g"),
    }
    for radius in evaluation["gradient_change"]:
        table[f"∇ change % at {radius}"] = (at("gradient_change", radius, factor=100), ".1f")
    for radius in evaluation["adversarial_accuracy"]:
        table[f"attacked % at {radius}"] = (at("adversarial_accuracy", radius, factor=100), ".1f")
    table["certified curvature"] = (at("certified", "curvature"), ".2g")
    return table


def markdown(records: list[dict[str, Any]], timing: dict[str, float]) -> str:
    """Means with standard deviations over seeds, ratios to the standard network, and every run."""
    measured = [record for record in records if record["status"] == "finished"]
    if not measured:
        return "No run finished.\n"
    table = columns(measured[0]["evaluation"])
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in measured:
        groups.setdefault(record["settings"]["method"], []).append(record["evaluation"])
    head = ["method", "runs", *table, *(["time per step"] if timing else [])]
    lines = ["Mean ± standard deviation over seeds.", "", *_header(head)]
    for name, group in groups.items():
        cells = [spread([read(record) for record in group], form) for read, form in table.values()]
        lines.append(_row([name, str(len(group)), *cells, *([f"{timing[name]:.2f}×"] if name in timing else [])]))
    lines += ["", *_ratios(groups), "", "Every run:", "", *_header(["method", "seed", *table])]
    for record in records:
        cells = [record["settings"]["method"], str(record["settings"]["seed"])]
        if record["status"] == "finished":
            cells += [spread([read(record["evaluation"])], form) for read, form in table.values()]
        else:
            cells.append(record["status"])
        lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def spread(values: list[float | None], form: str) -> str:
    """Mean ± sample standard deviation; ∞ where a bound is infinite."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "∞"
    mean = format(statistics.mean(numbers), form)
    return mean if len(numbers) == 1 else f"{mean} ± {format(statistics.stdev(numbers), form.replace('3g', '2g'))}"


def _ratios(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    if "standard" not in groups:
        return []
    radius = list(groups["standard"][0]["gradient_change"])[1]
    keys = {
        "C margin": ("curvature", "margin"),
        "C loss": ("curvature", "loss"),
        f"∇ change at {radius}": ("gradient_change", radius),
    }
    lines = ["Standard network divided by method, ratios of means:", "", *_header(["method", *keys])]
    for name, group in groups.items():
        means = {
            title: [statistics.mean(record[a][b] for record in part) for part in (groups["standard"], group)]
            for title, (a, b) in keys.items()
        }
        lines.append(_row([name, *(f"{standard / own:.1f}×" for standard, own in means.values())]))
    return lines


def _header(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
