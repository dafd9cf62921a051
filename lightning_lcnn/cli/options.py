"""What several commands take: a network, data, and where to write."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from lightning_lcnn.checkpoints import LoadedClassifier, load_classifier
from lightning_lcnn.data import TORCHVISION, Digits, ImageData, ImageFolder, TorchvisionData

SOURCES: dict[str, type[ImageData]] = {cls.__name__: cls for cls in (Digits, ImageFolder, TorchvisionData)}


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser whose description stays as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(f"lightning-lcnn {command}", description=description, formatter_class=formatter)


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows all options)\n")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What it takes to load a network from anything."""
    group = parser.add_argument_group("network, where SOURCE does not say what it is")
    group.add_argument("--model", help="class of the LightningModule that wrote SOURCE, my_module.LitNet")
    group.add_argument(
        "--network", help="name of the network whose weights SOURCE holds: resnet18, torchvision/NAME, ..."
    )
    group.add_argument("--network_args", type=json.loads, default={}, help="its further arguments: '{\"width\": 16}'")
    group.add_argument("--num_classes", type=int, help="its number of classes (10)")
    group.add_argument("--image_shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of its images (3 32 32)")
    group.add_argument("--mean", type=float, nargs="+", help="subtracted from images in [0, 1] in front of the network")
    group.add_argument("--std", type=float, nargs="+", help="by which they are divided then")
    group.add_argument("--trust", action="store_true", help="load pickled objects, which runs code from the file")


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


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Images to measure on."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        help="digits, a data set of torchvision such as CIFAR10, or a folder of images; by "
        "default that of the run in SOURCE",
    )
    group.add_argument("--size", type=int, help="side to which images are scaled (that of the network, or 32)")
    group.add_argument("--root", default="data", help="folder of torchvision's data sets (data)")
    group.add_argument("--cache", default="outputs/cache", help="folder for decoded images (outputs/cache)")


def open_data(name: str | None, size: int, root: str, cache: str, run: Path) -> ImageData:
    """Data by name or folder, or those of a run folder's ``config.yaml``."""
    if name is None:
        return _data_of_run(run)
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


def _data_of_run(run: Path) -> ImageData:
    import yaml  # comes with lightning

    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"say on which images with --data: {run} has no config.yaml that names them.")
    given = (yaml.safe_load(config.read_text()) or {}).get("data") or {}
    place, _, name = str(given.get("class_path", "")).rpartition(".")
    if name not in SOURCES or not place.startswith("lightning_lcnn.data"):
        raise ValueError(f"say on which images with --data: {config} names {given.get('class_path')}.")
    return SOURCES[name](**given.get("init_args", {}))


def numbers(text: str) -> list[float]:
    """Comma-separated positive numbers."""
    found = [float(part) for part in text.split(",") if part.strip()]
    if not all(0 < number < math.inf for number in found):
        raise argparse.ArgumentTypeError(f"must be positive numbers, got {text}")
    return found


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
