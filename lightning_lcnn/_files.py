"""Files: written whole or not at all, and read without running code from them."""

from __future__ import annotations

import json
import os
import pickletools
import re
import tempfile
import zipfile
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


def read_json(path: Path) -> Any:
    """Content of a JSON file; raises ``ValueError`` naming the file where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the JSON or of its encoding
        raise ValueError(f"{path} is no valid JSON: {error}.") from error


def read_checkpoint(path: Path, trust: bool = False, way: str = "--trust (trust=True)") -> Any:
    """Content of a file of ``torch.save``, on the CPU; of tensors and plain values only unless ``trust``.

    Args:
        path: The file.
        trust: Whether to load other Python objects, which runs code from the file.
        way: How the user says so, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds other Python objects, is damaged, or a tensor holds NaN.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # torch, zipfile and pickle each have their own
        if not trust and re.search("(?i)unsupported global|can only (create|build)", str(error)) and _is_whole(path):
            raise ValueError(
                f"{path} holds more than tensors and plain values (a pickled module?). Loading it runs code from the "
                f"file; where you trust whoever made it, allow that with {way}."
            ) from error
        if trust and isinstance(error, ImportError | AttributeError):
            raise ValueError(f"{path} needs code that cannot be imported here: {error}.") from error
        raise ValueError(f"{path} cannot be read: it is damaged or no file of torch.save.") from error
    check_finite(content, path)
    return content


def _is_whole(path: Path) -> bool:
    """Whether a file of ``torch.save`` is as it was written, as far as its check sums and its pickle tell."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        with path.open("rb") as file:  # torch before 1.6, or pickle
            for _ in pickletools.genops(file):
                pass
    except Exception:  # whatever a broken file does to the parsers
        return False
    return True


def check_finite(content: Any, path: Path | str) -> None:
    """Raise ``ValueError`` naming the first weight that holds NaN, of a module, a checkpoint or a state dict."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    for name, value in weights.items() if isinstance(weights, Mapping) else ():
        if isinstance(value, Tensor) and _has_nan(value):
            raise ValueError(f"{path} holds NaN in {name}: its training has diverged, so there is nothing to use.")


def _has_nan(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    stored = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > stored:  # a small storage seen many times over, which could be made to fill the memory
        tensor = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (stored,), (1,))
    return bool(torch.isnan(tensor).any())


def weights_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds: a module, a Lightning checkpoint, or a state dict."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: neither a module, nor a state dict, nor a Lightning checkpoint.")
    return {str(key): value for key, value in weights.items() if isinstance(value, Tensor)}


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` naming the folder if it cannot be made or written to, now and not after hours; make nothing."""
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=present):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}); choose another --output.") from error
