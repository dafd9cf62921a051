"""Data modules of image folders, torchvision data sets and scikit-learn's digits."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from lightning_lcnn._checks import check_choice, check_int, import_extra
from lightning_lcnn.data.base import ImageData, Split
from lightning_lcnn.data.image_files import class_names, load_split, to_bytes

# name of torchvision's class: number of classes, whether mirrored images keep their meaning
TORCHVISION = {
    "CIFAR10": (10, True),
    "CIFAR100": (100, True),
    "EuroSAT": (10, True),
    "FashionMNIST": (10, True),
    "GTSRB": (43, False),
    "KMNIST": (10, False),
    "MNIST": (10, False),
    "STL10": (10, True),
    "SVHN": (10, False),
    "USPS": (10, False),
}
_GREY = ("FashionMNIST", "KMNIST", "MNIST", "USPS")


class ImageFolder(ImageData):
    """Any folder of images: ``DIR/train/<class>/*.jpg`` and perhaps ``DIR/test/<class>/`` or ``DIR/val/<class>/``.

    Grey, palette and CMYK images become RGB. Without a test folder a fifth of the training images, chosen by a fixed
    seed, becomes the test set.

    Args:
        folder: The folder.
        size: Side to which every image is scaled, bilinear.
        batch_size: Images per batch and process.
        validation: Fraction of the training images that is kept for validation.
        limit_train: Use at most so many training images, None for all.
        augment: Shift by up to an eighth of the size and mirror the training images at random.
        mirror: Whether augmentation mirrors.
        cache: Folder for the decoded images; next to the data it may not be writable.

    Raises:
        FileNotFoundError: If there is no ``train`` folder, or it holds no class folder with images.
        ValueError: If train and test have different classes, or an image cannot be decoded.

    Source:
        Ours.
    """

    def __init__(
        self,
        folder: str,
        size: int = 32,
        batch_size: int = 128,
        validation: float = 0.1,
        limit_train: int | None = None,
        augment: bool = True,
        mirror: bool = True,
        cache: str = "outputs/cache",
    ) -> None:
        check_int("size", size)
        self.folder, self.size, self.cache = Path(folder), size, Path(cache)
        self.classes = class_names(self.folder / "train")
        shape = (3, size, size)
        super().__init__(shape, len(self.classes), batch_size, validation, limit_train, augment, mirror)

    @property
    def has_test_images(self) -> bool:
        """Whether there is a folder ``test`` or ``val``."""
        return self._test_folder() is not None

    def prepare_data(self) -> None:
        """Decode on one process; the others read the cache."""
        for train in (True, False)[: 1 + self.has_test_images]:
            self.load(train)

    def load(self, train: bool) -> Split:
        """Images of the folder ``train``, or of ``test`` or else ``val``."""
        folder = self.folder / "train" if train else self._test_folder()
        if folder is None:
            raise FileNotFoundError(f"{self.folder} has neither a folder `test` nor `val`.")
        return load_split(folder, self.classes, self.size, self.cache)

    def _test_folder(self) -> Path | None:
        return next((self.folder / name for name in ("test", "val") if (self.folder / name).is_dir()), None)


class TorchvisionData(ImageData):
    """A data set of torchvision by the name of its class; needs the extra ``vision``.

    Args:
        dataset: Name of the class, such as ``"CIFAR10"`` or ``"MNIST"``.
        root: Folder that holds the data set, or to which it is downloaded.
        size: Side to which every image is scaled, bilinear.
        batch_size: Images per batch and process.
        validation: Fraction of the training images that is kept for validation.
        limit_train: Use at most so many training images, None for all.
        augment: Shift and mirror the training images at random.
        mirror: Whether augmentation mirrors; by default where that keeps the meaning.
        download: Whether to download what ``root`` lacks.

    Raises:
        ImportError: If torchvision is not installed.
        ValueError: If the name is not among those known here.
        RuntimeError: If the data are not in ``root`` and ``download`` is off.

    Source:
        Ours.
    """

    def __init__(
        self,
        dataset: str = "CIFAR10",
        root: str = "data",
        size: int = 32,
        batch_size: int = 128,
        validation: float = 0.1,
        limit_train: int | None = None,
        augment: bool = True,
        mirror: bool | None = None,
        download: bool = True,
    ) -> None:
        check_choice("dataset", dataset, TORCHVISION)
        check_int("size", size)
        self.dataset, self.root, self.size, self.download = dataset, root, size, download
        import_extra("torchvision", "vision")
        classes, mirrors = TORCHVISION[dataset]
        shape = (1 if dataset in _GREY else 3, size, size)
        mirror = mirrors if mirror is None else mirror
        super().__init__(shape, classes, batch_size, validation, limit_train, augment, mirror)

    def prepare_data(self) -> None:
        """Download on one process."""
        for train in (True, False):
            self._open(train)

    def load(self, train: bool) -> Split:
        """Training or test images, scaled."""
        grey = self.image_shape[0] == 1
        pairs = [(to_bytes(image, self.size, grey), int(label)) for image, label in self._open(train)]
        images, labels = zip(*pairs, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def _open(self, train: bool) -> Any:
        """The data set, whichever way its class asks for the split."""
        cls = getattr(import_extra("torchvision.datasets", "vision"), self.dataset)
        parameters = inspect.signature(cls).parameters
        arguments: dict[str, Any] = {"root": self.root, "download": self.download}
        if "train" in parameters:
            arguments["train"] = train
        elif "split" in parameters:
            arguments["split"] = "train" if train else "test"
        return cls(**arguments)


class Digits(ImageData):
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn; needs the extra ``data``, no download.

    Args:
        batch_size: Images per batch and process.
        validation: Fraction of the training images that is kept for validation.
        limit_train: Use at most so many training images, None for all.
        augment: Shift the training images by up to one pixel at random.

    Raises:
        ImportError: If scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak (1998), by way of scikit-learn.

    Example:
        >>> digits = Digits(batch_size=64)
        >>> digits.setup()
        >>> next(iter(digits.train_dataloader()))[0].shape
        torch.Size([64, 1, 8, 8])
    """

    def __init__(
        self, batch_size: int = 64, validation: float = 0.1, limit_train: int | None = None, augment: bool = False
    ) -> None:
        self._source = import_extra("sklearn.datasets", "data")
        super().__init__((1, 8, 8), 10, batch_size, validation, limit_train, augment, mirror=False)

    @property
    def has_test_images(self) -> bool:
        """No: a fifth is held out."""
        return False

    def load(self, train: bool) -> Split:
        """All digits."""
        pixels, labels = self._source.load_digits(return_X_y=True)
        images = torch.tensor(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        return images, torch.tensor(labels, dtype=torch.int64)
