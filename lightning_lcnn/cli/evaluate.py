"""``evaluate``: all measures of one network."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lightning_lcnn._files import check_writable, write_json
from lightning_lcnn.checkpoints import device_of, read_about
from lightning_lcnn.cli.options import load, open_data
from lightning_lcnn.evaluation import evaluate


def run(options: argparse.Namespace) -> None:
    """Load, measure, write, print."""
    source = Path(options.source)
    output = Path(options.output) if options.output else source if source.is_dir() else Path("outputs") / stem(source)
    check_writable(output)
    device = device_of(options.device)
    loaded = load(options)
    size = options.size or (loaded.lit.image_shape[1] if loaded.lit else (options.image_shape or (3, 32, 32))[1])
    images = open_data(options.data, size, options.root, options.cache, source)
    images.setup("test")
    record = evaluate(
        loaded.module.to(device),
        *images.test_set.tensors,
        name=options.name or _name(output, stem(source) if source.is_file() else loaded.name),
        examples=options.examples,
        attack_examples=options.attack_examples,
        stability_radii=options.stability_radii,
        attack_radii=options.attack_radii,
        batch_size=options.batch_size,
        bound=None if options.bound == "none" else options.bound,
        progress=_progress,
    )
    write_json(output / "evaluation.json", record)
    if not (output / "run.json").exists():
        about = {"method": record["name"], "seed": None, "epochs": None, "seconds": None}
        checkpoint = str(loaded.file.resolve()) if loaded.file else None
        write_json(output / "run.json", {**about, "checkpoint": checkpoint})
    print(json.dumps(record, indent=2) if options.json else summary(record))
    print(f"written to {output / 'evaluation.json'}", file=sys.stderr)


def summary(record: dict[str, Any]) -> str:
    """The record's main numbers as aligned lines."""
    margin = {key: record[key]["margin"] for key in ("gradient_norm", "hessian_norm", "curvature")}
    rows = [
        ("network", record["name"]),
        ("accuracy", _percent(record["accuracy"])),
        ("gradient norm of the margin", _number(margin["gradient_norm"])),
        ("Hessian norm of the margin", _number(margin["hessian_norm"])),
        ("curvature of the margin", _number(margin["curvature"])),
        ("curvature of the loss", _number(record["curvature"]["loss"])),
        *((f"gradient change at {r}", _percent(v)) for r, v in record["gradient_change"].items()),
        *((f"accuracy under attack at {r}", _percent(v)) for r, v in record["adversarial_accuracy"].items()),
        ("certified slope", _number(record["certified"]["slope"])),
        ("certified curvature", _number(record["certified"]["curvature"])),
    ]
    if record["certified"]["reason"]:
        rows.append(("", record["certified"]["reason"]))
    rows += [(f"note on {key}", note) for key, note in record["notes"].items()]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def stem(source: Path) -> str:
    """Name of a file, ``RUN-last`` for ``RUN/checkpoints/last.ckpt``: every run has one."""
    in_run = source.parent.name == "checkpoints"
    return f"{source.resolve().parent.parent.name}-{source.stem}" if in_run else source.stem


def _name(output: Path, loaded: str) -> str:
    """The method that the run folder names, or what was loaded."""
    return str(read_about(output).get("method") or loaded)


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what:16} {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total:
        print(f"{what}: {total} images", file=sys.stderr)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
