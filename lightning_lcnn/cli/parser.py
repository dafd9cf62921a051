"""Help and errors of ``fit``, ``validate`` and ``test``."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli.options import SOURCES

_BASES: dict[str, type] = {"model": LightningModule, "data": LightningDataModule}


class TrainingParser(LightningArgumentParser):
    """Parser whose help starts with examples and whose errors are one line."""

    def format_help(self, *arguments: Any) -> str:
        """The description as it is written, then the options."""
        description, self.description = self.description or "", None
        try:
            options = super().format_help(*arguments)
        finally:
            self.description = description
        return f"{description}\n\n{options}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with 2."""
        print(f"lightning-lcnn: error: {_one_line(message)}", file=sys.stderr)
        sys.exit(2)


def _one_line(message: str) -> str:
    key = re.search(r'Parser key "(\w+)"', message)
    given = re.search(r"Given value: ([\w.]+)$", message.strip())
    if key and given and key[1] in _BASES:
        return unknown_class(key[1], given[1], message)
    refused = re.search(r"[Oo]ption '(\w+)' is not accepted", message)
    if refused:
        return unknown_option(refused[1])
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    return "; ".join(lines[:3]).replace(":;", ":") + (" ..." if len(lines) > 3 else "")


def unknown_option(name: str) -> str:
    """Message for an option that a class does not take, or that comes before its class is named."""
    classes: list[type] = [LitClassifier, *SOURCES.values()]
    known = {option for cls in classes for option in inspect.signature(cls).parameters}
    if name in known:
        return f"option {name!r} is not accepted here: name its class first, such as --model LitClassifier."
    near = difflib.get_close_matches(name, sorted(known), n=2)
    hint = f": did you mean {' or '.join(near)}?" if near else "."
    return f"option {name!r} is not accepted{hint} --model.help LitClassifier lists the options of a class."


def unknown_class(key: str, name: str, message: str) -> str:
    """Message for a class that cannot be found, with names like it."""
    module, _, last = name.rpartition(".")
    known = sorted(_names(_BASES[key])) if not module else sorted(vars(sys.modules.get(module, object)))
    near = difflib.get_close_matches(last, known, n=3, cutoff=0.5)
    prefix = f"{module}." if module else ""
    hint = f"did you mean {' or '.join(prefix + n for n in near)}? " if near else ""
    problem = re.search(r"Problem with given class_path.*?\n\s*(.+)", message)
    why = f" ({problem[1].strip()})" if problem else ""
    example = "my_module.LitNet" if key == "model" else "my_module.Data"
    return (
        f"--{key} {name} names no {_BASES[key].__name__}{why}: {hint}Yours need their import path, such as {example}."
    )


def _names(base: Any) -> set[str]:
    """Names of all classes below a base that are ours or the user's."""
    found = set()
    for cls in base.__subclasses__():
        found |= _names(cls)
        if not cls.__module__.startswith(("lightning.", "pytorch_lightning.")):
            found.add(cls.__name__)
    return found
