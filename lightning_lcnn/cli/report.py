"""``report``: networks side by side on one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_lcnn.cli.options import make_parser

DESCRIPTION = """Compare run folders and checkpoints on one self-contained HTML page.

  lightning-lcnn report outputs/standard outputs/low_curvature --output report.html"""


def run(command: str, arguments: Sequence[str]) -> None:
    """Write the page."""
    parser = make_parser(command, DESCRIPTION)
    parser.add_argument("sources", nargs="+", type=Path, help="run folders or checkpoints", metavar="SOURCE")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--data", help="images for the pictures: digits, a data set of torchvision, or a folder")
    parser.add_argument("--title", help="of the page")
    options = parser.parse_args(list(arguments))
    from lightning_lcnn.report import write_report

    page = write_report(options.sources, options.output, data=options.data, title=options.title)
    print(f"written to {page}")
