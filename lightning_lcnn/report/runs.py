"""From the paths that are given to records, settings, histories and networks."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._files import read_json
from lightning_lcnn.checkpoints import load_classifier
from lightning_lcnn.evaluation import SCHEMA, evaluate
from lightning_lcnn.plots.grouping import Record
from lightning_lcnn.plots.training import History

RECORD = "evaluation.json"
_TABLES = ("gradient_norm", "hessian_norm", "curvature", "median_curvature", "converged", "gradient_change")
_RADII = ("gradient_change", "adversarial_accuracy", "adversarial_standard_error")


@dataclass(frozen=True, eq=False)
class Run:
    """One trained network and what is known about it."""

    source: Path
    name: str
    record: Record
    settings: Mapping[str, str] = field(default_factory=dict)
    history: History = field(default_factory=dict)
    network: nn.Module | None = None
    notes: tuple[str, ...] = ()


def read_runs(
    sources: Sequence[Path],
    images: Tensor | None,
    labels: Tensor | None,
    networks: Mapping[Path, nn.Module],
    trust: bool,
    device: torch.device,
) -> list[Run]:
    """Every run of the sources; a folder without a record stands for the run folders in it."""
    runs = [
        _read(path, images, labels, networks.get(path) or networks.get(source), trust, device)
        for source in sources
        for path in _expanded(source)
    ]
    return [replace(run, record={**run.record, "name": run.name}) for run in runs]


def _expanded(source: Path) -> list[Path]:
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}.")
    if source.is_file() or (source / RECORD).is_file():
        return [source]
    inside = sorted({path.parent for path in source.rglob(RECORD)})
    # the usual baseline comes first
    return sorted(inside, key=lambda path: "standard" not in path.parts) or [source]


def _read(
    path: Path,
    images: Tensor | None,
    labels: Tensor | None,
    network: nn.Module | None,
    trust: bool,
    device: torch.device,
) -> Run:
    is_record = path.suffix == ".json"
    folder = path if path.is_dir() else path.parent if path.name == RECORD else None
    file = path if is_record else path / RECORD
    record = read_record(file) if file.is_file() else None
    notes: tuple[str, ...] = ()
    if network is None and (images is not None or record is None) and (folder is not None or not is_record):
        try:
            network = load_classifier(path if folder is None else folder, trust=trust).module.to(device)
        except (OSError, ValueError, ImportError) as error:
            if record is None and isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{path} holds no {RECORD}, and nothing to measure: {error}") from error
            if record is None and images is not None:
                raise
            notes = (f"no input gradients: {error}",)
    settings = _settings(folder / "run.json") if folder is not None else {}
    name = str((record or {}).get("name") or settings.get("method") or _name_of(path))
    if record is None:
        record = _measured(path, network, images, labels, name)
    history = read_history(folder) if folder is not None else {}
    return Run(path, name, record, settings, history, network, notes)


def _measured(
    path: Path, network: nn.Module | None, images: Tensor | None, labels: Tensor | None, name: str
) -> dict[str, Any]:
    if images is None or labels is None or network is None:
        raise ValueError(
            f"{path} holds no {RECORD}: run `lightning-lcnn evaluate {path}` first, or give the images to measure it "
            "on (--data, images=... and labels=...)."
        )
    return evaluate(network, images, labels, name=name)


def _name_of(path: Path) -> str:
    folder = path.resolve().parent if path.name == RECORD else path.resolve()
    return folder.stem if folder.is_file() else folder.name


def read_record(path: Path) -> dict[str, Any]:
    """An evaluation record, checked as far as the page needs it."""
    record = read_json(path)
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(f"{path} is no evaluation record: expected a JSON object with a `schema`.")
    if record["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {record['schema']!r}, this version reads {SCHEMA}; measure the network again with "
            "`lightning-lcnn evaluate`, or use the version that wrote it."
        )
    for key in (*_TABLES, *_RADII, "certified", "betas", "notes"):
        if not isinstance(record.get(key) or {}, dict):
            raise ValueError(f"{path}: `{key}` must be an object, got {type(record[key]).__name__}.")
    for key in _RADII:
        if not all(_is_radius(radius) for radius in record.get(key) or {}):
            raise ValueError(f"{path}: the keys of `{key}` must be radii, got {', '.join(record[key])}.")
    for key, member in (("layers", dict), ("curvature_values", int | float | None)):
        value = record.get(key) or []
        if not isinstance(value, list) or not all(isinstance(entry, member) for entry in value):
            raise ValueError(f"{path}: `{key}` must be a list of {'objects' if member is dict else 'numbers'}.")
    if not all(isinstance(layer.get("name"), str) for layer in record.get("layers") or []):
        raise ValueError(f"{path}: every one of `layers` must have a `name`.")
    return record


def read_history(folder: Path) -> dict[str, list[float]]:
    """Columns of history.csv or of Lightning's newest metrics.csv, NaN where a cell holds no number; {} without one."""
    files = [path for path in (folder / "history.csv", folder / "metrics.csv") if path.is_file()]
    files += sorted(folder.glob("*/**/metrics.csv"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not files:
        return {}
    try:
        with files[0].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{files[0]} cannot be read as a table: {error}.") from error
    return {str(column): [_float(row[column]) for row in rows] for column in (rows[0] if rows else ()) if column}


def _settings(path: Path) -> dict[str, str]:
    """run.json as a flat table of text."""
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    inner = content.pop("settings", {})
    return _flat({**(inner if isinstance(inner, dict) else {"settings": inner}), **content})


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = (
                f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
            )
            found[prefix + key] = text if len(text) <= 200 else text[:199] + "…"
    return found


def _text(value: Any, longest: int = 200) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _float(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def _is_radius(key: str) -> bool:
    return math.isfinite(_float(key))
