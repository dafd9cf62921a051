"""``report``: networks side by side on one HTML page."""

from __future__ import annotations

import argparse
import sys

from torch import Tensor

from lightning_lcnn.cli.options import open_data
from lightning_lcnn.report import write_report


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    images, labels = _images(options)
    page = write_report(
        options.sources,
        options.output,
        images=images,
        labels=labels,
        title=options.title,
        trust=options.trust,
        device=options.device,
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
