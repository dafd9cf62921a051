"""What all data modules share: splits, loaders and augmentation of images in memory."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_lcnn._checks import check_int

Split = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64


class ImageData(LightningDataModule):
    """Base: loaders of (image in [0, 1], class index) from what a subclass returns of ``load``.

    Args:
        image_shape: (C, H, W) of every image.
        num_classes: Number of classes.
        batch_size: Images per batch and process.
        validation: Fraction of the training images that is kept for validation.
        limit_train: Use at most so many training images, None for all.
        augment: Shift by up to an eighth of the height and, with ``mirror``, mirror the training images at random.
        mirror: Whether augmentation mirrors.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``validation`` is outside [0, 1), or another argument out of range.

    Source:
        Ours.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        batch_size: int,
        validation: float,
        limit_train: int | None,
        augment: bool,
        mirror: bool,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size)
        if limit_train is not None:
            check_int("limit_train", limit_train)
        if not 0 <= validation < 1:
            raise ValueError(f"`validation` must be a fraction in [0, 1), got {validation!r}.")
        self.image_shape, self.num_classes = image_shape, num_classes
        self.batch_size, self.validation, self.limit_train = batch_size, validation, limit_train
        self.augment, self.mirror = augment, mirror

    @property
    def has_test_images(self) -> bool:
        """Whether the source keeps test images apart."""
        return True

    def load(self, train: bool) -> Split:
        """All training or all test images, the same on every process; test images only if there are some."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Split by a fixed seed; a fifth of the training images becomes the test set where there is none."""
        tests = stage in ("test", None)
        if tests and self.has_test_images:
            self.test_set = _Images(*self.load(train=False))
        if stage == "test" and self.has_test_images:
            return
        images, labels = self.load(train=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        if not self.has_test_images:
            held_out, order = order[: len(order) // 5], order[len(order) // 5 :]
            self.test_set = _Images(images[held_out], labels[held_out])
        count = round(self.validation * len(order))
        train = order[count:][: self.limit_train]
        self.train_set = _Images(images[train], labels[train])
        self.validation_set = _Images(images[order[:count]], labels[order[:count]])

    def train_dataloader(self) -> DataLoader:
        """Shuffled; without the last, smaller batch unless it is the only one."""
        whole = len(self.train_set) >= self.batch_size
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=whole, collate_fn=_as_it_is)

    def val_dataloader(self) -> Any:
        """The validation images; no loader where none were kept."""
        if len(self.validation_set) == 0:
            return []
        return DataLoader(self.validation_set, self.batch_size, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader:
        """The test images."""
        return DataLoader(self.test_set, self.batch_size, collate_fn=_as_it_is)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Bytes to [0, 1] on the device, and augmentation in training."""
        images, labels = batch
        images = images.float().div_(255)
        if self.augment and self.trainer is not None and self.trainer.training:
            images = shift_and_mirror(images, self.image_shape[1] // 8, self.mirror)
        return images, labels


class _Images(TensorDataset):
    """Fetches a batch in one indexing operation, twenty times faster than image by image."""

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[rows] for tensor in self.tensors)


def _as_it_is(batch: Any) -> Any:
    return batch


def shift_and_mirror(images: Tensor, shift: int, mirror: bool = True) -> Tensor:
    """Move each image by up to ``shift`` pixels, zeros entering, and mirror half of them.

    Args:
        images: (N, C, H, W).
        shift: Largest move in each direction.
        mirror: Whether to mirror.

    Returns:
        (N, C, H, W).

    Source:
        The usual augmentation of CIFAR.

    Example:
        >>> shift_and_mirror(torch.rand(2, 3, 8, 8), 1).shape
        torch.Size([2, 3, 8, 8])
    """
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (shift, shift, shift, shift))
    device = images.device
    top = torch.randint(0, 2 * shift + 1, (count, 1, 1), device=device)
    left = torch.randint(0, 2 * shift + 1, (count, 1, 1), device=device)
    rows = top + torch.arange(height, device=device).view(1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, -1).expand(count, 1, width)
    if mirror:
        columns = torch.where(torch.rand(count, 1, 1, device=device) < 0.5, columns.flip(-1), columns)
    columns = columns + left
    return padded[torch.arange(count, device=device).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2).contiguous()
