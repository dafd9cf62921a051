"""Old place of the source editor, kept for networks that 0.1 pickled whole: their files name it."""

from lightning_lcnn.conversion.rewriting.editor import Method
from lightning_lcnn.conversion.rewriting.editor import rebuilt as _new

__all__ = ["Method", "_new"]
