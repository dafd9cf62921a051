"""How each number was found, and the settings of every run."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lightning_lcnn.plots.grouping import Method
from lightning_lcnn.report.markup import Html, details, join, percent, table, tag
from lightning_lcnn.report.runs import Run

_HOW = (
    (
        "Certified: slope and curvature bounds, also layer by layer",
        "No input exceeds them: computed in float64 and inflated by 1e-6, for the network in evaluation mode. A "
        "curvature bound is infinite where a ReLU or max pooling is left.",
    ),
    (
        "Estimated: β, γ and the totals during training",
        "log C̄ and its kin follow from the slopes that training maintains by power iteration, which errs on the low "
        "side. They bound no single image's curvature.",
    ),
    (
        "Measured: accuracy, gradient norm, Hessian norm, curvature",
        "On test images, in evaluation mode. Hessian norms come from 20 steps of Lanczos per image, from below; the "
        "table says how many converged to 1 %. f is the logit margin (true class over the best other) or the loss.",
    ),
    (
        "Measured: gradient change and accuracy under attack",
        "Random noise of the given ℓ₂ norm, the same for every network; and an attack, projected gradient descent "
        "unless the settings name another. A stronger attack may leave less accuracy.",
    ),
)
_IMAGES = (
    "Number of images. A network with kinks (ReLU, max pooling) has no Hessian where it counts: its Hessian norm, "
    "curvature and gradient change are those of a smooth stand-in, everything else its own."
)


def how_measured(methods: Sequence[Method], runs: Sequence[Run]) -> Html:
    """What is proven, estimated and measured, on how many images, and what to know about single methods."""
    terms = [part for term, text in _HOW for part in (tag("dt", term), tag("dd", text))]
    rows = [
        [
            method.name,
            *(
                _distinct(method, key)
                for key in ("examples", "measured_examples", "attacked_examples", "stand_in_beta")
            ),
            percent(_mean(method, "converged", "margin")),
        ]
        for method in methods
    ]
    head = ["method", "test images", "measured", "attacked", "β of the stand-in", "Hessian norms converged"]
    caption = (
        "Number of images. A network with kinks (ReLU, max pooling) has no Hessian where it counts: its Hessian norm, "
    )
    caption += "curvature and gradient change are those of a smooth stand-in, everything else its own."
    notes = dict.fromkeys(note for run in runs for note in _notes(run))
    listed = [tag("ul", *(tag("li", note) for note in notes))] if notes else []
    return join([tag("dl", *terms), table(_IMAGES, head, rows), *listed])


def unequal_images(methods: Sequence[Method]) -> str | None:
    """A warning where not all networks were measured on as many images, and so perhaps not on the same."""
    for key, what in (("examples", "tested"), ("measured_examples", "measured"), ("attacked_examples", "attacked")):
        counts = {count for method in methods for count in method.numbers(key)}
        if len(counts) > 1:
            listed = ", ".join(f"{count:,.0f}" for count in sorted(counts))
            return f"Not all networks were {what} on the same number of images ({listed}): compare them with care."
    return None


def settings(runs: Sequence[Run]) -> Html:
    """Where each run comes from and with which settings; what all share stands once."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key != "method"))
    shared = [key for key in keys if len(runs) > 1 and len({run.settings.get(key) for run in runs}) == 1]
    own = [key for key in keys if key not in shared]
    places = _places([run.source for run in runs])
    rows = [
        [run.name, place, *(run.settings.get(key, "–") for key in own)] for run, place in zip(runs, places, strict=True)
    ]
    content = [table("Every run", ["run", "source", *own], rows, "text")]
    if shared:
        common = [[key, runs[0].settings[key]] for key in shared]
        content.append(details("Settings that all runs share", table("Settings", ["setting", "value"], common, "text")))
    return join(content)


def _places(paths: Sequence[Path]) -> list[str]:
    """Paths below the folder that all share: a page that is passed on need not tell where it was made."""
    absolute = [path.resolve() for path in paths]
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    return [str(path.relative_to(common)) for path in absolute]


def _notes(run: Run) -> list[str]:
    found = [f"{run.name}: {key}: {note}" for key, note in (run.record.get("notes") or {}).items()]
    reason = (run.record.get("certified") or {}).get("reason")
    if reason:
        found.append(f"{run.name}: no finite certified bound: {textwrap.shorten(str(reason), 300, placeholder=' …')}")
    return [*found, *(f"{run.name}: {note}" for note in run.notes)]


def _distinct(method: Method, key: str) -> str:
    """The values that occur; not their mean, which no network was measured with."""
    return " or ".join(f"{value:,.0f}" for value in sorted(set(method.numbers(key)))) or "–"


def _mean(method: Method, *path: str) -> float | None:
    spread = method.spread(*path)
    return None if spread is None else spread.mean
