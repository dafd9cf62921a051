"""Evaluation records grouped by method: records of one name are seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and how far they lie apart."""

    mean: float
    deviation: float  # sample standard deviation; NaN for one seed
    count: int


@dataclass(frozen=True)
class Method:
    """All records of one name."""

    name: str
    records: tuple[Record, ...]

    def numbers(self, *keys: str) -> list[float]:
        """The finite numbers at a path of keys, one for each record that has one."""
        found = (_at(record, keys) for record in self.records)
        return [float(value) for value in found if is_number(value)]

    def spread(self, *keys: str) -> Spread | None:
        """Mean and standard deviation at a path of keys, or None where no record has a number."""
        return spread(self.numbers(*keys))

    def curve(self, key: str) -> dict[str, Spread]:
        """Spread at every radius of a table like ``gradient_change``, by radius in increasing order."""
        radii = {radius for record in self.records for radius in (record.get(key) or {})}
        spreads = {radius: self.spread(key, radius) for radius in sorted(radii, key=float)}
        return {radius: value for radius, value in spreads.items() if value is not None}


def group_by_name(records: Sequence[Record]) -> list[Method]:
    """Records of one name together, in the order in which the names first come.

    Args:
        records: Evaluation records, dictionaries as `evaluate` returns them. An empty name becomes ``"network"``.

    Returns:
        One `Method` per name.

    Raises:
        TypeError: If ``records`` is no sequence of dictionaries.
        ValueError: If it is empty.

    Source:
        Ours.

    Example:
        >>> seeds = [{"name": "a", "accuracy": 0.5}, {"name": "a", "accuracy": 0.7}]
        >>> group_by_name(seeds)[0].spread("accuracy").count
        2
    """
    if isinstance(records, Mapping | str) or not all(isinstance(record, Mapping) for record in records):
        raise TypeError("`records` must be a list of evaluation records (dictionaries); wrap a single one in a list.")
    if not records:
        raise ValueError("`records` must hold at least one evaluation record, got none.")
    by_name: dict[str, list[Record]] = {}
    for record in records:
        name = str(record.get("name") or "network")
        # matplotlib hides names that begin with an underscore
        by_name.setdefault(f" {name}" if name.startswith("_") else name, []).append(record)
    return [Method(name, tuple(members)) for name, members in by_name.items()]


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation, or None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))


def is_number(value: Any) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at(record: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record
