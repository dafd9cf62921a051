"""``report``: networks side by side on one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lightning_lcnn.cli.options import add_data_options, make_parser, open_data
from lightning_lcnn.report import write_report

DESCRIPTION = """Compare run folders and checkpoints on one self-contained HTML page.

  lightning-lcnn report outputs/standard outputs/low_curvature --output report.html
  lightning-lcnn report outputs/standard outputs/low_curvature --data digits

The first source is the one to compare with; sources of one name are seeds. With images, the page also shows the input
gradients of each network, and networks without evaluation.json are measured."""


def run(command: str, arguments: Sequence[str]) -> None:
    """Write the page."""
    parser = make_parser(command, DESCRIPTION)
    parser.add_argument(
        "sources", nargs="+", type=Path, help="run folders, folders of them, evaluation.json files, checkpoints"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--trust", action="store_true", help="load pickled networks, which runs code from the file")
    add_data_options(parser)
    options = parser.parse_args(list(arguments))
    images, labels = _images(options)
    page = write_report(
        options.sources, options.output, images=images, labels=labels, title=options.title, trust=options.trust
    )
    print(f"written to {page}")


def _images(options: argparse.Namespace) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Test images of --data, or else of the first run that names its data."""
    run = next((source for source in options.sources if (source / "config.yaml").is_file()), None)
    if options.data is None and run is None:
        return None, None
    try:
        data = open_data(options.data, options.size or 32, options.root, options.cache, run or options.sources[0])
    except ValueError as error:
        if options.data is not None:
            raise
        print(f"no pictures of input gradients: {error}", file=sys.stderr)
        return None, None
    data.setup("test")
    images, labels = data.test_set.tensors
    return images, labels
