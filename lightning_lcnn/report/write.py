"""Read, arrange, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lcnn._files import check_writable, written_whole
from lightning_lcnn.plots.grouping import Method, group_by_name
from lightning_lcnn.report.curves import perturbations, training
from lightning_lcnn.report.layers import layers
from lightning_lcnn.report.markup import Html
from lightning_lcnn.report.measures import largest_common_radius
from lightning_lcnn.report.method_notes import how_measured, settings
from lightning_lcnn.report.page import page
from lightning_lcnn.report.pictures import input_gradients
from lightning_lcnn.report.runs import Run, read_runs
from lightning_lcnn.report.summary import all_numbers, summary

_DEFAULT_RADIUS = 0.1


def write_report(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    title: str | None = None,
    networks: Mapping[str | Path, nn.Module] | None = None,
    trust: bool = False,
) -> Path:
    """Compare any number of trained networks on one self-contained HTML page.

    Tables and figures of accuracy, curvature, stability, accuracy under attack and certified bounds, layer by layer and
    over training; with ``images`` also the input gradients of the same images for each network. The first source is the
    baseline. Records of one name are seeds of one method. The page needs no network, and runs no code.

    Args:
        sources: evaluation.json files; run folders with an evaluation.json and, where there are, run.json, history.csv
            or Lightning's metrics.csv, and a network; folders of run folders; or, with ``images``, checkpoints and run
            folders that were not measured yet.
        output: The page, replaced if it is there.
        images: (N, C, H, W) in [0, 1] or uint8, for the pictures of input gradients.
        labels: (N,) class indices of ``images``.
        title: Of the page.
        networks: Networks by source, in evaluation mode, in place of those that the run folders hold.
        trust: Whether to load pickled networks, which runs code from the file. Checkpoints of `LitClassifier` load
            without.

    Returns:
        ``output`` as a path.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If there is no source, or one has no measures, a damaged file or a record of another schema.
        OSError: If ``output`` cannot be written. Nothing is left half written.
        ImportError: Without matplotlib, naming the extra.

    Source:
        Ours.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> record = {"schema": 1, "name": "standard", "accuracy": 0.9, "curvature": {"margin": 30.0}}
        >>> _ = (folder / "evaluation.json").write_text(json.dumps(record))
        >>> write_report([folder], folder / "report.html").name
        'report.html'
    """
    output = Path(output)
    _check(sources, output, images, labels)
    given = {Path(source): network for source, network in (networks or {}).items()}
    runs = read_runs([Path(source) for source in sources], images, labels, given, trust)
    methods = group_by_name([run.record for run in runs])
    content = [(heading, part) for heading, part in _sections(methods, runs, images, labels) if part]
    text = page(title or "Curvature report", _subtitle(methods, runs), content)
    with written_whole(output) as partial:
        partial.write_text(text, encoding="utf-8")
    return output


def _sections(
    methods: list[Method], runs: list[Run], images: Tensor | None, labels: Tensor | None
) -> list[tuple[str, Html | None]]:
    radius = float(largest_common_radius(methods, "gradient_change") or _DEFAULT_RADIUS)
    pictures = None
    if images is not None and labels is not None:
        pictures = input_gradients(runs, images, labels, radius)
    return [
        ("Summary", summary(methods)),
        ("Under perturbations", perturbations(methods)),
        ("Input gradients", pictures),
        ("Training", training(runs)),
        ("Layers", layers(methods, runs)),
        ("All numbers", all_numbers(methods)),
        ("Runs and settings", settings(runs)),
        ("How the numbers are found", how_measured(methods, runs)),
    ]


def _subtitle(methods: list[Method], runs: list[Run]) -> str:
    count = f"{len(runs)} trained networks" if len(runs) > 1 else "One trained network"
    if len(methods) == 1:
        return f"{count}, {methods[0].name}."
    return f"{count}, {len(methods)} methods; compared with {methods[0].name}."


def _check(sources: Sequence[str | Path], output: Path, images: Tensor | None, labels: Tensor | None) -> None:
    if isinstance(sources, str | Path):
        raise TypeError("`sources` must be a list of paths; wrap a single one in a list.")
    if not sources:
        raise ValueError("`sources` must hold at least one evaluation.json, run folder or checkpoint, got none.")
    if output.is_dir():
        raise IsADirectoryError(f"`output` must be a file, {output} is a folder; try {output / 'report.html'}.")
    check_writable(output.parent)  # before the work, not after it
    if (images is None) != (labels is None):
        raise ValueError("`images` and `labels` must be given together.")
    if images is None or labels is None:
        return
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or len(images) == 0 or len(images) != len(labels):
        shape = tuple(getattr(images, "shape", ()))
        raise ValueError(
            f"`images` must have shape (N, C, H, W) with one label each, got {shape} and {len(labels)} labels."
        )
