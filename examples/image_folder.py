"""Images of a folder as tensors in memory: decoded once, cached as uint8, augmented in batches.

    DIR/train/<class>/*.jpg      and      DIR/test/<class>/*.jpg   (or DIR/val/...)

Without a test folder a fifth of the training images, chosen by a fixed seed, becomes the test set.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class ImageFolder(L.LightningDataModule):
    """Train, validation and test loaders of (image in [0, 1] of shape (3, size, size), class index).

    Args:
        data: The folder.
        size: Side to which every image is scaled, bilinear.
        batch_size: Images per batch and process.
        validation: Fraction of the training images that is kept for validation.
        limit_train: Use at most so many training images, None for all.
        augment: Shift by up to an eighth of the size and mirror the training images at random.
        cache: Folder for the decoded images; next to the data it may not be writable.

    Raises:
        FileNotFoundError: If there is no ``train`` folder, or it holds no class folder with images.
        ValueError: If train and test have different classes, or an image cannot be decoded.
    """

    def __init__(
        self,
        data: str | Path,
        size: int = 32,
        batch_size: int = 128,
        validation: float = 0.1,
        limit_train: int | None = None,
        augment: bool = True,
        cache: str | Path = "outputs/cache",
    ) -> None:
        super().__init__()
        self.data, self.size, self.batch_size = Path(data), size, batch_size
        self.validation, self.limit_train, self.augment = validation, limit_train, augment
        self.cache = Path(cache)
        self.classes = class_names(self.data / "train")

    def prepare_data(self) -> None:
        """Decode on one process; the others read the cache."""
        for split in self._splits():
            load_split(self.data / split, self.classes, self.size, self.cache)

    def setup(self, stage: str) -> None:
        """Split by a fixed seed, the same on every process."""
        splits = [load_split(self.data / s, self.classes, self.size, self.cache) for s in self._splits()]
        images, labels = splits[0]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        if len(splits) == 1:
            held_out, order = order[: len(order) // 5], order[len(order) // 5 :]
            splits.append((images[held_out], labels[held_out]))
        count = round(self.validation * len(order))
        train = order[count:][: self.limit_train]
        self.train_set = TensorDataset(images[train], labels[train])
        self.validation_set = TensorDataset(images[order[:count]], labels[order[:count]])
        self.test_set = TensorDataset(*splits[1])

    def train_dataloader(self) -> DataLoader:
        """Shuffled, without the last, smaller batch."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """The validation images."""
        return DataLoader(self.validation_set, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """The test images."""
        return DataLoader(self.test_set, self.batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Bytes to [0, 1] on the device, and augmentation in training."""
        images, labels = batch
        images = images.float().div_(255)
        if self.augment and self.trainer is not None and self.trainer.training:
            images = shift_and_mirror(images, self.size // 8)
        return images, labels

    def _splits(self) -> list[str]:
        return ["train", *[s for s in ("test", "val") if (self.data / s).is_dir()][:1]]


def shift_and_mirror(images: Tensor, shift: int) -> Tensor:
    """Move each image by up to ``shift`` pixels, zeros entering, and mirror half of them."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (shift, shift, shift, shift))
    device = images.device
    top = torch.randint(0, 2 * shift + 1, (count, 1, 1), device=device)
    left = torch.randint(0, 2 * shift + 1, (count, 1, 1), device=device)
    rows = top + torch.arange(height, device=device).view(1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, -1).expand(count, 1, width)
    columns = torch.where(torch.rand(count, 1, 1, device=device) < 0.5, columns.flip(-1), columns) + left
    return padded[torch.arange(count, device=device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2).contiguous()


def class_names(train: Path) -> list[str]:
    """Sorted names of the class folders."""
    if not train.is_dir():
        raise FileNotFoundError(f"`data` must hold a folder `train` with one folder per class; {train} does not exist.")
    names = sorted(p.name for p in train.iterdir() if p.is_dir())
    if not names:
        raise FileNotFoundError(f"{train} holds no class folders; expected {train}/<class>/*.jpg.")
    return names


def load_split(folder: Path, classes: list[str], size: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) uint8 and labels (N,) of one folder, from the cache where it is there."""
    paths = [(p, i) for i, name in enumerate(classes) for p in image_paths(folder / name)]
    unknown = sorted({p.name for p in folder.iterdir() if p.is_dir()} - set(classes))
    if unknown:
        raise ValueError(f"{folder} has classes that the train folder lacks: {', '.join(unknown)}.")
    listing = "\n".join(f"{p.relative_to(folder)} {p.stat().st_size}" for p, _ in paths)
    key = hashlib.sha256(f"{folder.resolve()} {size}\n{listing}".encode()).hexdigest()[:16]
    file = cache / f"{folder.name}-{key}.pt"
    if file.exists():
        return torch.load(file)
    images = torch.stack([decode(p, size) for p, _ in paths])
    labels = torch.tensor([i for _, i in paths])
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")  # renamed when whole, so that an interrupted run leaves no broken cache
    torch.save((images, labels), partial)
    partial.rename(file)
    return images, labels


def image_paths(folder: Path) -> list[Path]:
    """Sorted image files of one class folder."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}).")
    return paths


def decode(path: Path, size: int) -> Tensor:
    """One image as uint8 (3, size, size), grey and palette images as RGB."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be decoded as an image: {error}. Remove or replace it.") from error
