"""What a conversion changed and what it left alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One module that was replaced."""

    name: str  # path in the model
    before: str  # class
    after: str  # class
    note: str = ""  # where its scale went, what γ it got


@dataclass(frozen=True)
class Kept:
    """One module or operation that was left as it is."""

    name: str  # path of the module
    what: str  # class of the module, or operation and place of a functional call
    reason: str
    smooth: bool = True  # False: a kink remains here, and with it infinite curvature


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`to_low_curvature` did; ``print`` shows it as a table.

    Example:
        >>> print(ConversionReport((Change("act", "ReLU", "CenteredSoftplus"),), ()))
        changed  act  ReLU  CenteredSoftplus
        1 changed, 0 left alone, 0 of them with kinks
    """

    changed: tuple[Change, ...]  # in the order of the model's modules
    kept: tuple[Kept, ...]

    @property
    def kinks(self) -> tuple[Kept, ...]:
        """What was left alone and has infinite curvature."""
        return tuple(row for row in self.kept if not row.smooth)

    def __str__(self) -> str:
        rows = [("changed", row.name, row.before, row.after, row.note) for row in self.changed]
        rows += [("kept" if row.smooth else "kink", row.name, row.what, row.reason, "") for row in self.kept]
        widths = [max(len(row[i]) for row in rows) for i in range(5)] if rows else []
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{len(self.changed)} changed, {len(self.kept)} left alone, {len(self.kinks)} of them with kinks"
        return "\n".join([*lines, total])
