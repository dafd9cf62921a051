"""Which command, and what its errors look like."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lightning_lcnn.__about__ import __version__
from lightning_lcnn.cli.arguments import COMMANDS, help_text, parser_of, training_help, with_presets

SIGTERM_CODE = 128 + signal.SIGTERM
SIGINT_CODE = 128 + signal.SIGINT
# what a wrong argument raises before training, and during it
_ARGUMENT_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)
_TRAINING_ERRORS = (ValueError, OSError, ImportError)
# how jsonargparse wraps what a class raised
_WRAPPERS = (
    "Does not validate against any of the Union subtypes",
    "Call to compute_fn of link",
    "Problem with given class_path",
)
_PACKAGE = Path(__file__).resolve().parent.parent
_STANDARD = tuple(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib"))
_PYTHON, _USER = "Python", "the user"
# packages that check arguments on behalf of the user, and those whose errors are no fault in the user's code either
_CHECKING = {"lightning_lcnn", "lightning", "pytorch_lightning", "lightning_fabric"}
_INSTALLED = _CHECKING | {
    "jsonargparse",
    "lightning_utilities",
    "fsspec",
    "torch",
    "torchmetrics",
    "torchvision",
    "timm",
}
_INSTALLED |= {"numpy", "sklearn", "PIL", "yaml", "matplotlib", "safetensors", "huggingface_hub"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        0 when done, 1 after an error, 2 for wrong usage, 130 when interrupted, 143 when terminated.

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
    try:
        with _sigterm_ends():
            _run(command, rest)
    except SystemExit as end:
        code = _code(end)
    except KeyboardInterrupt:
        code = SIGINT_CODE
    except argparse.ArgumentTypeError as error:
        print(f"lightning-lcnn {command}: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        if one_line_says_it(error):
            print(f"lightning-lcnn {command}: error: {message_of(error)}", file=sys.stderr)
        else:
            traceback.print_exception(_unwrapped(error))
        return 1
    else:
        return 0
    if code == SIGINT_CODE:
        print(f"lightning-lcnn {command}: interrupted.", file=sys.stderr)
    return code


def _run(command: str, arguments: list[str]) -> None:
    training = COMMANDS[command][0] == "training"
    if training and {"-h", "--help"} & set(arguments):
        print(training_help(command))
        return
    if training:
        arguments = ["--help" if argument == "--help_all" else argument for argument in with_presets(arguments)]
    options = None if training else parser_of(command).parse_args(arguments)
    # modules of the user are found in the current folder, behind all that is installed: no file there replaces that
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with warnings.catch_warnings():
        # the images are in memory: workers would only copy them
        warnings.filterwarnings("ignore", ".*does not have many workers")
        # `fit` looks at its folder itself
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        # `test` and `validate` get Lightning's own checkpoint callback, which saves nothing
        warnings.filterwarnings("ignore", "The dirpath has changed")
        # Lightning's own use of torch
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
        if training:
            # not imported above: it brings torch
            importlib.import_module("lightning_lcnn._checks").import_extra("jsonargparse", "cli")
            importlib.import_module("lightning_lcnn.cli.training").run(command, arguments)
        else:
            importlib.import_module(f"lightning_lcnn.cli.{command}").run(options)


@contextmanager
def _sigterm_ends() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that half-written files go; ``fit`` leaves it to Lightning."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _code(end: SystemExit) -> int:
    """Exit code; Lightning ends with 1 after Ctrl+C and with an exception without a code after SIGTERM."""
    if isinstance(end.__context__, KeyboardInterrupt):
        return SIGINT_CODE
    if type(end).__name__ == "SIGTERMException":
        return SIGTERM_CODE
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def one_line_says_it(error: BaseException) -> bool:
    """Whether the error is about the arguments: from before training or from a check, and not from the user's code."""
    chain = _chain(error)
    frames = [frame for link in chain for frame, _ in traceback.walk_tb(link.__traceback__)]
    if any(_owner(frame.f_code.co_filename) == _USER for frame in frames):
        return False
    if any(type(link).__name__ == "MisconfigurationException" for link in chain):  # Lightning's own
        return True
    if not any(frame.f_code.co_name == "_run_subcommand" for frame in frames):
        return isinstance(error, _ARGUMENT_ERRORS)
    if str(error).startswith("Error(s) in loading state_dict"):
        return True
    raised_by = [_owner(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = [owner for owner in raised_by if owner != _PYTHON][-1:]
    return isinstance(error, _TRAINING_ERRORS) and set(last) <= _CHECKING


def _chain(error: BaseException) -> list[BaseException]:
    """The error and those that it followed from."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or link.__context__
    return found


def _owner(file: str) -> str:
    """Whose code a file is: an installed package that is known here, Python's, or the user's."""
    path = Path(file)
    if file.startswith("<"):
        return _PYTHON
    if _PACKAGE in path.parents:
        return "lightning_lcnn"
    installed = [parent for parent in path.parents if parent.name in ("site-packages", "dist-packages")]
    if installed:
        top = path.relative_to(installed[0]).parts[0].removesuffix(".py")
        return top if top in _INSTALLED else _USER
    return _PYTHON if any(folder in path.resolve().parents for folder in _STANDARD) else _USER


def _unwrapped(error: BaseException) -> BaseException:
    """The error itself, without what jsonargparse says about it."""
    while str(error).startswith(_WRAPPERS) and error.__cause__ is not None:
        error = error.__cause__
    return error


def message_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    error = _unwrapped(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    named = lines[0] if isinstance(error, ValueError | ImportError | OSError) else f"{type(error).__name__}: {lines[0]}"
    return named + (" (--debug shows more)" if len(lines) > 1 else "")
