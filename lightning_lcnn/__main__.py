"""``python -m lightning_lcnn``, the same as the command ``lightning-lcnn``."""

from __future__ import annotations

import sys

from lightning_lcnn.cli import main

if __name__ == "__main__":
    sys.exit(main())
