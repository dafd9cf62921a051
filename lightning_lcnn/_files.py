"""Files: written whole or not at all, and read without running code from them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` to write to; it takes its place at the end, or is removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; NaN and infinity, which are no JSON, raise ``ValueError``."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_checkpoint(path: Path, trust: bool = False) -> Any:
    """Content of a file of ``torch.save``, on the CPU; of tensors and plain values only unless ``trust``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds other Python objects, which would run code, or is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # torch, zipfile and pickle each have their own
        if not trust and re.search("(?i)unsupported global|can only (create|build)", str(error)):
            raise ValueError(
                f"{path} holds more than tensors and plain values (a pickled module?). Loading it runs code from the "
                "file; where you trust whoever made it, allow that with --trust (trust=True)."
            ) from error
        if trust and isinstance(error, ImportError | AttributeError):
            raise ValueError(f"{path} needs code that cannot be imported here: {error}.") from error
        raise ValueError(f"{path} cannot be read: it is damaged or no file of torch.save.") from error


def weights_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds: a module, a Lightning checkpoint, or a state dict."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: neither a module, nor a state dict, nor a Lightning checkpoint.")
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` naming the folder if it cannot be made or written to, now and not after hours; make nothing."""
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another --output.") from error
