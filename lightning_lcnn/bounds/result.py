"""What the bounds return."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRow:
    """One step of the network in the table of a bound.

    Args:
        name: module path, or path and function name.
        kind: class or function.
        slope: certified slope of the step alone.
        cumulative_slope: certified slope from the network's input to the step's output.
        curvature: what the step's own non-linearity adds to the network's curvature bound; infinite for a kink.
        share: its share of the network's curvature, between 0 and 1. Kinks share an infinite total equally.
        reason: why the curvature is infinite, or "".
    """

    name: str
    kind: str
    slope: float
    cumulative_slope: float
    curvature: float
    share: float
    reason: str = ""


@dataclass(frozen=True)
class NetworkBound:
    """Certified bounds of a network g, valid for every input.

    Args:
        slope: sup ‖Dg(x)‖₂ is at most this.
        curvature: sup over x and unit u, v of ‖D²g(x)[u, v]‖₂ is at most this, so it bounds the Hessian norm of every
            unit combination of outputs.
        layers: one row for each step that has a slope other than 1 or a curvature, in order.
        method: "fast" or "tight".
    """

    slope: float
    curvature: float
    layers: tuple[LayerRow, ...]
    method: str

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the curvature is infinite, one line for each step that makes it so."""
        return tuple(f"{row.name}: {row.reason}" for row in self.layers if row.reason)

    def __str__(self) -> str:
        """Aligned table with the totals above."""
        head = f"slope <= {self.slope:.6g}, curvature <= {self.curvature:.6g} (certified, method '{self.method}')"
        titles = ("layer", "kind", "slope", "cumulative", "curvature", "share")
        rows = [titles, *(_cells(row) for row in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
        lines = [
            "  ".join(_aligned(cell, w, i) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
        ]
        reasons = [f"infinite: {reason}" for reason in self.reasons[:5]]
        more = [f"... and {len(self.reasons) - 5} more"] if len(self.reasons) > 5 else []
        return "\n".join([head, *(line.rstrip() for line in lines), *reasons, *more])


def _cells(row: LayerRow) -> tuple[str, ...]:
    curvature = f"{row.curvature:.4g}" if row.curvature else ""
    share = f"{100 * row.share:.1f}%" if row.curvature else ""
    return row.name, row.kind, f"{row.slope:.4g}", f"{row.cumulative_slope:.4g}", curvature, share


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
