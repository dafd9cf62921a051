"""A logger that keeps one CSV file per run, over interruptions."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from torch import Tensor
from typing_extensions import override

from lightning_lcnn._files import written_whole


class History(Logger):
    """Writes ``history.csv``: a row for every call, columns ``step``, ``epoch`` and whatever is logged.

    A resumed run continues the file; rows of steps that are done again are replaced. (Lightning's CSVLogger deletes the
    file of the run that it resumes.)

    Args:
        folder: Where the file is.

    Source:
        Ours.

    Example:
        >>> import tempfile
        >>> history = History(tempfile.mkdtemp())
        >>> history.log_metrics({"loss": 0.5}, step=3)
        >>> print(history.file.read_text())
        step,loss
        3,0.5
        <BLANKLINE>
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.file = self.folder / "history.csv"
        self._columns: list[str] | None = None

    @property
    @override
    def name(self) -> str:
        """Nothing: the folder is the run's own."""
        return ""

    @property
    @override
    def version(self) -> str:
        """Nothing."""
        return ""

    @property
    @override
    def log_dir(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    @override
    def save_dir(self) -> str:
        """The folder."""
        return str(self.folder)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is in a file of its own."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": step, **{key: v.item() if isinstance(v, Tensor) else v for key, v in metrics.items()}}
        if self._columns is None:
            self._continue(step)
        columns: list[str] = self._columns or []
        new = [key for key in row if key not in columns]
        if new:
            rows = _read(self.file)
            self._columns = columns = columns + new
            self._rewrite(rows)
        with self.file.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _continue(self, step: int | None) -> None:
        """Take over the rows of earlier steps."""
        rows = [row for row in _read(self.file) if step is None or int(row["step"] or 0) < step]
        self._columns = list(rows[0]) if rows else []
        if rows:
            self._rewrite(rows)
        else:
            self.file.unlink(missing_ok=True)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with written_whole(self.file) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns or [])
            writer.writeheader()
            writer.writerows(rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
