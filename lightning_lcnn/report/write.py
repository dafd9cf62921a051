"""The whole page: its frame, and the files it is written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lcnn.__about__ import __version__
from lightning_lcnn._files import check_writable, written_whole
from lightning_lcnn.checkpoints import device_of
from lightning_lcnn.plots.grouping import Method, group_by_name
from lightning_lcnn.report.markup import Html, join, tag
from lightning_lcnn.report.measures import all_numbers, largest_common_radius, summary
from lightning_lcnn.report.method_notes import how_measured, settings
from lightning_lcnn.report.runs import Run, read_runs
from lightning_lcnn.report.sections import input_gradients, layers, perturbations, training

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
    device: str = "auto",
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
        device: For networks that are loaded: "auto" is CUDA where there is one, and else the CPU.

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
    runs = read_runs([Path(source) for source in sources], images, labels, given, trust, device_of(device))
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
