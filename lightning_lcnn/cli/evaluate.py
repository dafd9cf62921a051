"""``evaluate``: all measures of one network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_lcnn._files import check_writable, write_json
from lightning_lcnn.cli.options import (
    add_data_options,
    add_network_options,
    load,
    make_parser,
    numbers,
    open_data,
    positive,
)
from lightning_lcnn.evaluation import evaluate

DESCRIPTION = """Measure a network: accuracy, curvature, gradient stability, accuracy under attack, certified bounds.

  lightning-lcnn evaluate outputs/digits
  lightning-lcnn evaluate outputs/cifar/checkpoints/last.ckpt --data DIR --output outputs/cifar
  lightning-lcnn evaluate lit.ckpt --model my_module.LitNet --data CIFAR10
  lightning-lcnn evaluate weights.pt --network resnet18 --network_args '{"width": 16}' --data DIR
  lightning-lcnn evaluate network.pt --trust --data digits

Writes evaluation.json and, where it is missing, run.json to --output. Radii are l2 norms, pixels lie in [0, 1]."""


def run(command: str, arguments: Sequence[str]) -> None:
    """Load, measure, write, print."""
    options = _parser(command).parse_args(list(arguments))
    source = Path(options.source)
    output = Path(options.output) if options.output else source if source.is_dir() else Path("outputs") / stem(source)
    check_writable(output)
    loaded = load(options)
    size = options.size or (loaded.lit.image_shape[1] if loaded.lit else (options.image_shape or (3, 32, 32))[1])
    images = open_data(options.data, size, options.root, options.cache, source)
    images.setup("test")
    record = evaluate(
        loaded.module.to(options.device),
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


def _parser(command: str) -> argparse.ArgumentParser:
    parser = make_parser(command, DESCRIPTION)
    parser.add_argument("source", help="run folder, checkpoint, or torchvision/NAME or timm/NAME", metavar="SOURCE")
    parser.add_argument("--output", help="folder for the results (SOURCE if it is a folder, else outputs/NAME)")
    parser.add_argument("--name", help="of the network in tables (the folder's or the file's)")
    add_data_options(parser)
    parser.add_argument("--examples", type=positive, default=256, help="images for curvature and stability (256)")
    parser.add_argument("--attack_examples", type=positive, default=1000, help="images to attack (1000)")
    parser.add_argument("--stability_radii", type=numbers, default=[0.05, 0.1, 0.15], help="0.05,0.1,0.15")
    parser.add_argument("--attack_radii", type=numbers, default=[0.05, 0.1, 0.15, 0.25], help="0.05,0.1,0.15,0.25")
    parser.add_argument(
        "--bound", choices=["fast", "tight", "none"], default="fast", help="method of the bounds (fast)"
    )
    parser.add_argument("--batch_size", type=positive, default=128)
    parser.add_argument("--device", type=torch.device, default="cpu", help="cpu, cuda, mps ... (cpu)")
    parser.add_argument("--json", action="store_true", help="print the whole record in place of a summary")
    add_network_options(parser)
    return parser


def stem(source: Path) -> str:
    """Name of a file, ``RUN-last`` for ``RUN/checkpoints/last.ckpt``: every run has one."""
    in_run = source.parent.name == "checkpoints"
    return f"{source.resolve().parent.parent.name}-{source.stem}" if in_run else source.stem


def _name(output: Path, loaded: str) -> str:
    """The method that the run folder names, or what was loaded."""
    file = output / "run.json"
    return str(json.loads(file.read_text()).get("method") or loaded) if file.is_file() else loaded


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what:16} {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total:
        print(f"{what}: {total} images", file=sys.stderr)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
