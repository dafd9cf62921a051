"""The command ``lightning-lcnn``."""

from lightning_lcnn.cli.main import main

__all__ = ["main"]
