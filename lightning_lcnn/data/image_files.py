"""Folders of image files as tensors: decoded once, cached as uint8."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn._checks import import_extra
from lightning_lcnn._files import written_whole

# by content, whatever the suffix: pillow would run Ghostscript for others
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def class_names(train: Path) -> list[str]:
    """Sorted names of the class folders.

    Args:
        train: Folder with one folder per class.

    Returns:
        The names.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no folder.

    Source:
        Ours.
    """
    if not train.is_dir():
        raise FileNotFoundError(
            f"the image folder must hold a folder `train` with one folder per class; {train} does not exist."
        )
    names = sorted(p.name for p in train.iterdir() if p.is_dir())
    if not names:
        raise FileNotFoundError(f"{train} holds no class folders; expected {train}/<class>/*.jpg.")
    return names


def load_split(folder: Path, classes: list[str], size: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Images and labels of one folder, from the cache where it is there.

    Args:
        folder: Holds one folder per class.
        classes: Their names; the position is the label.
        size: Side to which every image is scaled, bilinear.
        cache: Folder for the decoded images.

    Returns:
        Images (N, 3, size, size) uint8 and labels (N,).

    Raises:
        FileNotFoundError: If a class folder is missing or empty.
        ValueError: If there are further classes, or an image cannot be decoded.

    Source:
        Ours.
    """
    paths = [(p, i) for i, name in enumerate(classes) for p in image_paths(folder / name)]
    unknown = sorted({p.name for p in folder.iterdir() if p.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"{folder} has classes that the train folder lacks: {', '.join(unknown)}.")
    listing = "\n".join(f"{p.relative_to(folder)} {p.stat().st_size}" for p, _ in paths)
    key = hashlib.sha256(f"{folder.resolve()} {size}\n{listing}".encode()).hexdigest()[:16]
    file = cache / f"{folder.name}-{key}.pt"
    cached = _cached(file, len(paths), size) if file.exists() else None
    if cached is not None:
        return cached
    images = torch.stack([decode(p, size) for p, _ in paths])
    labels = torch.tensor([i for _, i in paths])
    with written_whole(file) as partial:
        torch.save((images, labels), partial)
    return images, labels


def _cached(file: Path, count: int, size: int) -> tuple[Tensor, Tensor] | None:
    """Content of a cache; None, after a warning that names it, where it is not what was written there."""
    try:
        images, labels = torch.load(file, map_location="cpu", weights_only=True)
        if images.dtype == torch.uint8 and images.shape == (count, 3, size, size) and labels.shape == (count,):
            return images, labels.long()
    except Exception:  # torch, zipfile and pickle each have their own, and what is unpacked may be anything
        pass
    warnings.warn(f"the cache {file} is damaged; the images are decoded again.")
    return None


def image_paths(folder: Path) -> list[Path]:
    """Sorted image files of one class folder and its subfolders; raises ``FileNotFoundError`` where there are none."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}).")
    return paths


def decode(path: Path, size: int) -> Tensor:
    """One image file as uint8 (3, size, size); raises ``ValueError`` naming the file where it is damaged."""
    pillow = import_extra("PIL.Image", "data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(path, formats=FORMATS) as image:
                return to_bytes(image, size)
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise ValueError(
            f"{path} is too large for an image, as a file that fills the memory would be: {error} Scale it down first."
        ) from error
    except (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} cannot be decoded as an image: {error}. Remove or replace it.") from error


def to_bytes(image: Any, size: int, grey: bool = False) -> Tensor:
    """A pillow image of any mode as uint8 (3 or 1, size, size), scaled bilinearly.

    16-bit grey keeps its upper eight bits: pillow's own conversion cuts it at 255, which turns it white.
    """
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image = image.convert("L" if grey else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), import_extra("PIL.Image", "data").Resampling.BILINEAR)
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, -1).permute(2, 0, 1).contiguous()
