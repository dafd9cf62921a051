"""From the options of several commands to a network and to data."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from lightning_lcnn.checkpoints import LoadedClassifier, load_classifier
from lightning_lcnn.data import TORCHVISION, Digits, ImageData, ImageFolder, TorchvisionData

SOURCES: dict[str, type[ImageData]] = {cls.__name__: cls for cls in (Digits, ImageFolder, TorchvisionData)}


def network_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that describe a network by its name."""
    given = {"num_classes": options.num_classes, "arguments": options.network_args or None}
    if options.image_shape:
        given["image_shape"] = tuple(options.image_shape)
    return {key: value for key, value in given.items() if value is not None}


def normalization(options: argparse.Namespace) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation where either is given."""
    if options.mean is None and options.std is None:
        return None
    return options.mean or [0.0], options.std or [1.0]


def load(options: argparse.Namespace) -> LoadedClassifier:
    """The classifier of SOURCE."""
    return load_classifier(
        options.source,
        trust=options.trust,
        model=options.model,
        network=options.network,
        normalize=normalization(options),
        **network_options(options),
    )


def open_data(name: str | None, size: int, root: str, cache: str, run: Path) -> ImageData:
    """Data by name or folder, or those of a run folder's ``config.yaml``."""
    if name is None:
        return _data_of_run(run, cache)
    if name.lower() == "digits":
        return Digits()
    for known in TORCHVISION:
        if name.lower() == known.lower():
            return TorchvisionData(known, root, size)
    if Path(name).is_dir():
        return ImageFolder(name, size, cache=cache)
    near = difflib.get_close_matches(name.lower(), ["digits", *(k.lower() for k in TORCHVISION)], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"`data` {name!r} is neither a folder nor digits nor one of {', '.join(TORCHVISION)}.{hint}")


def _data_of_run(run: Path, cache: str) -> ImageData:
    """What the configuration names; it is read where it is, and nothing is written where a file says."""
    import yaml  # comes with lightning

    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"say on which images with --data: {run} has no config.yaml that names them.")
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{config} is no plain YAML: {' '.join(str(error).split())[:300]}.") from error
    given = content.get("data") if isinstance(content, dict) else None
    described = given if isinstance(given, dict) else {"class_path": given}
    place, _, name = str(described.get("class_path", "")).rpartition(".")
    if name not in SOURCES or place not in ("lightning_lcnn.data", "lightning_lcnn.data.sources"):
        raise ValueError(f"say on which images with --data: {config} names {described.get('class_path')}.")
    kept_here: dict[str, dict[str, Any]] = {"ImageFolder": {"cache": cache}, "TorchvisionData": {"download": False}}
    try:
        return SOURCES[name](**{**(described.get("init_args") or {}), **kept_here.get(name, {})})
    except TypeError as error:
        raise ValueError(f"{config} does not describe {name}: {error}.") from error
