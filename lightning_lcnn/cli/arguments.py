"""What every command takes, and its help. Imports neither torch nor Lightning, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_lcnn.__about__ import __version__

PRESETS = Path(__file__).parent / "presets"
_CONFIG = ("--config", "-c")

# command: module with `run`, what it does
COMMANDS = {
    "fit": ("training", "train a network, from a preset or your own YAML file"),
    "validate": ("training", "run a checkpoint on the validation images"),
    "test": ("training", "run a checkpoint on the test images"),
    "convert": ("convert", "turn a trained network into its low-curvature form"),
    "evaluate": ("evaluate", "measure curvature, stability, accuracy under attack and certified bounds"),
    "report": ("report", "compare networks on one HTML page"),
}

HELP = """usage: lightning-lcnn COMMAND [options]

Low-curvature neural networks for PyTorch Lightning, version {version}.

commands:
{commands}

  lightning-lcnn COMMAND --help    what a command takes, with an example
  lightning-lcnn --version

Presets for --config: {presets}.
--debug, or the environment variable LCNN_DEBUG=1, shows where an error comes from.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
Example, without any download:

  lightning-lcnn fit --config digits --output outputs/digits
  lightning-lcnn evaluate outputs/digits
"""

EXAMPLES = {
    "fit": """Train a network. Everything can be in a YAML file (--config), on the command line, or both.

  lightning-lcnn fit --config digits --output outputs/digits
  lightning-lcnn fit --model LitClassifier --model.low_curvature true --data ImageFolder --data.folder DIR
  lightning-lcnn fit --model my_module.LitNet --data TorchvisionData --data.dataset CIFAR10
  lightning-lcnn fit --config outputs/digits/config.yaml --output outputs/digits --ckpt_path last   (go on)

Options of a class: --model.help LitClassifier, --data.help ImageFolder. All of a run: --print_config.""",
    "validate": """Loss, accuracy and metrics on the validation images.

  lightning-lcnn validate --config outputs/digits/config.yaml --ckpt_path outputs/digits/checkpoints/last.ckpt""",
    "test": """Loss, accuracy and metrics on the test images.

  lightning-lcnn test --config outputs/digits/config.yaml --ckpt_path outputs/digits/checkpoints/last.ckpt""",
}

TRAINING = """{examples}

options:
  --config FILE         YAML, or the name of a preset: {presets}
  --output DIR          the run folder (outputs/run)
  --name NAME           of the run in tables (the folder's)
  --model CLASS         LitClassifier, or yours, my_module.LitNet
  --model.OPTION VALUE  an option of that class; --model.help CLASS lists them
  --data CLASS          ImageFolder, TorchvisionData, Digits, or yours, my_module.Data
  --data.OPTION VALUE   an option of that class; --data.help CLASS lists them
  --trainer.OPTION VALUE
                        of Lightning's Trainer: max_epochs (30), devices (auto), accelerator (auto), precision,
                        strategy, callbacks, logger ...
  --ckpt_path FILE      {checkpoint}
  --weights_only false  load pickled objects and whatever the checkpoint names, which runs code from the file
  --seed_everything N   seed of everything random (0)
  --print_config        print the whole configuration and end
  --help_all            every option of Lightning's, some 200 lines; imports torch and Lightning first
"""

CONVERT = """Turn a trained network into its low-curvature form, with its weights; then fine-tune it.

  lightning-lcnn convert outputs/standard --output converted.ckpt
  lightning-lcnn convert torchvision/resnet18 --num_classes 10 --output converted.ckpt
  lightning-lcnn convert weights.pt --network resnet18 --network_args '{"width": 16}' --output converted.ckpt
  lightning-lcnn convert lit.ckpt --model my_module.LitNet --output converted.pt

Writes a checkpoint of LitClassifier (for evaluate, validate and test, and for fit --model.weights), or, for a
LightningModule or a pickled module of yours, the converted module by torch.save (for evaluate --trust)."""

EVALUATE = """Measure a network: accuracy, curvature, gradient stability, accuracy under attack, certified bounds.

  lightning-lcnn evaluate outputs/digits
  lightning-lcnn evaluate outputs/cifar/checkpoints/last.ckpt --data DIR --output outputs/cifar
  lightning-lcnn evaluate lit.ckpt --model my_module.LitNet --data CIFAR10
  lightning-lcnn evaluate weights.pt --network resnet18 --network_args '{"width": 16}' --data DIR
  lightning-lcnn evaluate network.pt --trust --data digits

Writes evaluation.json and, where it is missing, run.json to --output. Radii are l2 norms, pixels lie in [0, 1]."""

REPORT = """Compare run folders and checkpoints on one self-contained HTML page.

  lightning-lcnn report outputs/standard outputs/low_curvature --output report.html
  lightning-lcnn report outputs/standard outputs/low_curvature --data digits

The first source is the one to compare with; sources of one name are seeds. With images, the page also shows the input
gradients of each network, and networks without evaluation.json are measured."""


def presets() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def with_presets(arguments: Sequence[str]) -> list[str]:
    """The arguments with the file of a preset in place of its name; a file of that name in the folder goes first.

    Raises:
        ArgumentTypeError: If ``--config`` has neither a file nor the name of a preset.
    """
    found = list(arguments)
    for i, start, value in _configs(arguments):
        found[i] = start + _file_of(value)
    return found


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that ``--config`` names, as far as they exist."""
    return [Path(value) for _, _, value in _configs(arguments) if Path(value).is_file()]


def _configs(arguments: Sequence[str]) -> list[tuple[int, str, str]]:
    """Where a ``--config`` has its value: position, what stands before it there, the value."""
    found = []
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option in _CONFIG:
            found.append((i, f"{option}=", value))
        elif i and arguments[i - 1] in _CONFIG:
            found.append((i, "", argument))
    return found


def _file_of(value: str) -> str:
    if not re.fullmatch(r"[\w-]+", value) or Path(value).is_file():
        return value
    if value in presets():
        return str(PRESETS / f"{value}.yaml")
    near = difflib.get_close_matches(value, presets(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"presets are {', '.join(presets())}."
    raise argparse.ArgumentTypeError(f"--config {value} is neither a file nor a preset: {hint}")


def help_text() -> str:
    """Overview of the commands."""
    lines = [f"  {name:9} {COMMANDS[name][1]}" for name in COMMANDS]
    return HELP.format(version=__version__, commands="\n".join(lines), presets=", ".join(presets())).rstrip()


def training_help(command: str) -> str:
    """What ``fit``, ``validate`` or ``test`` takes."""
    checkpoint = "go on from it; `last` is that of --output" if command == "fit" else "whose weights to run"
    return f"usage: lightning-lcnn {command} [options]\n\n" + TRAINING.format(
        examples=EXAMPLES[command], presets=", ".join(presets()), checkpoint=checkpoint
    )


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of ``convert``, ``evaluate`` or ``report``."""
    return _PARSERS[command](command)


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print it and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help shows all options)\n")


def _make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser whose description stays as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(f"lightning-lcnn {command}", description=description, formatter_class=formatter)


def _convert_parser(command: str) -> argparse.ArgumentParser:
    parser = _make_parser(command, CONVERT)
    parser.add_argument("source", help="run folder, checkpoint, or torchvision/NAME or timm/NAME", metavar="SOURCE")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--beta", type=float, default=10.0, help="start of every β (10)")
    parser.add_argument("--gamma", type=float, help="start of every γ (10, or the layer's own slope if larger)")
    parser.add_argument(
        "--max_pool", choices=["smooth", "average", "keep"], default="smooth", help="what max pooling becomes (smooth)"
    )
    _add_network_options(parser)
    return parser


def _evaluate_parser(command: str) -> argparse.ArgumentParser:
    parser = _make_parser(command, EVALUATE)
    parser.add_argument("source", help="run folder, checkpoint, or torchvision/NAME or timm/NAME", metavar="SOURCE")
    parser.add_argument("--output", help="folder for the results (SOURCE if it is a folder, else outputs/NAME)")
    parser.add_argument("--name", help="of the network in tables (the folder's or the file's)")
    _add_data_options(parser)
    parser.add_argument("--examples", type=positive, default=256, help="images for curvature and stability (256)")
    parser.add_argument("--attack_examples", type=positive, default=1000, help="images to attack (1000)")
    parser.add_argument("--stability_radii", type=numbers, default=[0.05, 0.1, 0.15], help="0.05,0.1,0.15")
    parser.add_argument("--attack_radii", type=numbers, default=[0.05, 0.1, 0.15, 0.25], help="0.05,0.1,0.15,0.25")
    parser.add_argument(
        "--bound", choices=["fast", "tight", "none"], default="fast", help="method of the bounds (fast)"
    )
    parser.add_argument("--batch_size", type=positive, default=128)
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the whole record in place of a summary")
    _add_network_options(parser)
    return parser


def _report_parser(command: str) -> argparse.ArgumentParser:
    parser = _make_parser(command, REPORT)
    parser.add_argument(
        "sources", nargs="+", type=Path, help="run folders, folders of them, evaluation.json files, checkpoints"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--trust", action="store_true", help="load pickled networks, which runs code from the file")
    _add_device(parser)
    _add_data_options(parser)
    return parser


_PARSERS: dict[str, Callable[[str], argparse.ArgumentParser]] = {
    "convert": _convert_parser,
    "evaluate": _evaluate_parser,
    "report": _report_parser,
}


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps ...; auto: cuda where there is one (auto)")


def _add_network_options(parser: argparse.ArgumentParser) -> None:
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


def _add_data_options(parser: argparse.ArgumentParser) -> None:
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
