"""What TensorBoard shows beyond scalars; other loggers are passed over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

# Each chart shows all tags that match; a logger's prefix may stand before them.
_CHARTS = {
    "beta": ".*lcnn_beta/.*",
    "gamma": ".*lcnn_gamma/.*",
    "slope": ".*lcnn_slope/.*",
    "sigma": ".*lcnn_sigma/.*",
    "share of the curvature": ".*lcnn_share/.*",
    "network": ".*lcnn/log_(ratio|slope|curvature)",
}
_HISTOGRAMS = ("beta", "gamma")


def add_layout(loggers: Iterable[Any]) -> None:
    """One chart per quantity with a line per layer, in the tab CUSTOM SCALARS."""
    layout = {"low curvature": {title: ["Multiline", [tags]] for title, tags in _CHARTS.items()}}
    for writer in _writers(loggers):
        writer.add_custom_scalars(layout)


def add_histograms(loggers: Iterable[Any], numbers: Mapping[str, float], step: int) -> None:
    """Distribution over the layers of β and γ, as ``lcnn/beta`` and ``lcnn/gamma``."""
    for writer in _writers(loggers):
        for name in _HISTOGRAMS:
            values = torch.tensor([value for key, value in numbers.items() if key.startswith(f"lcnn_{name}/")])
            values = values[values.isfinite()]  # a histogram of anything else raises
            if len(values):
                writer.add_histogram(f"lcnn/{name}", values, step)


def _writers(loggers: Iterable[Any]) -> Iterator[Any]:
    """Summary writers of torch and tensorboardX, told by their methods: neither package need be there."""
    for logger in loggers:
        writer = getattr(logger, "experiment", None)
        if hasattr(writer, "add_custom_scalars") and hasattr(writer, "add_histogram"):
            yield writer
