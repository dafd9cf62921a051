"""One self-contained HTML page that compares trained networks."""

from lightning_lcnn.report.write import write_report

__all__ = ["write_report"]
