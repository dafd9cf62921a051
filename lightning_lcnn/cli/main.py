"""Which command, and what its errors look like."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import warnings
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_lcnn.__about__ import __version__
from lightning_lcnn._checks import import_extra

# command: module with `run(command, arguments)`, what it does
COMMANDS = {
    "fit": ("training", "train a network; YAML presets are in examples/configs"),
    "validate": ("training", "run a checkpoint on the validation images"),
    "test": ("training", "run a checkpoint on the test images"),
    "convert": ("convert", "turn a trained network into its low-curvature form"),
    "evaluate": ("evaluate", "measure curvature, stability, accuracy under attack and certified bounds"),
    "report": ("report", "compare networks on one HTML page"),
}
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MisconfigurationException)
# how jsonargparse wraps what a class raised
_WRAPPERS = (
    "Does not validate against any of the Union subtypes",
    "Call to compute_fn of link",
    "Problem with given class_path",
)

HELP = """usage: lightning-lcnn COMMAND [options]

Low-curvature neural networks for PyTorch Lightning, version {version}.

commands:
{commands}

  lightning-lcnn COMMAND --help    what a command takes, with an example
  lightning-lcnn --version

--debug, or the environment variable LCNN_DEBUG=1, shows where an error comes from.
Exit codes: 0 done, 1 failed, 2 wrong usage. Example, without any download:

  lightning-lcnn fit --config examples/configs/digits.yaml --output outputs/digits
  lightning-lcnn evaluate outputs/digits
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        0 when done, 1 after an error, 2 for wrong usage, 130 when interrupted.

    Source:
        Ours.

    Example:
        >>> main(["--version"]) == 0
        lightning-lcnn ...
        True
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("LCNN_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help", "--version"):
        print(f"lightning-lcnn {__version__}" if command == "--version" else help_text())
        return 0
    if command not in COMMANDS:
        print(f"lightning-lcnn: error: no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # modules of the user
    try:
        with warnings.catch_warnings():
            # the images are in memory: workers would only copy them
            warnings.filterwarnings("ignore", ".*does not have many workers")
            # `fit` looks at its folder itself
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            # `test` and `validate` get Lightning's own checkpoint callback, which saves nothing
            warnings.filterwarnings("ignore", "The dirpath has changed")
            # Lightning's own use of torch
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
            if COMMANDS[command][0] == "training":
                import_extra("jsonargparse", "cli")
            module = importlib.import_module(f"lightning_lcnn.cli.{COMMANDS[command][0]}")
            module.run(command, rest)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        print(f"lightning-lcnn {command}: interrupted.", file=sys.stderr)
        return 130
    except (*USER_ERRORS, pickle.UnpicklingError) as error:
        if debug:
            raise
        print(f"lightning-lcnn {command}: error: {message_of(error)}", file=sys.stderr)
        return 1
    return 0


def help_text() -> str:
    """Overview of the commands."""
    lines = [f"  {name:9} {COMMANDS[name][1]}" for name in COMMANDS]
    return HELP.format(version=__version__, commands="\n".join(lines)).rstrip()


def message_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    while str(error).startswith(_WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, pickle.UnpicklingError):
        return (
            "the checkpoint holds more than tensors and plain values, and loading it runs code from the file; where "
            "you trust whoever made it, allow that with --weights_only false."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    named = lines[0] if isinstance(error, ValueError | ImportError | OSError) else f"{type(error).__name__}: {lines[0]}"
    return named + (" (--debug shows more)" if len(lines) > 1 else "")
