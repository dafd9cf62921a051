"""Data, network and schedule that all methods of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lcnn.data import class_names, load_split
from lightning_lcnn.models import resnet18

Options = dict[str, float | str]


@dataclass(frozen=True)
class Preset:
    """Data, network and schedule that all methods share."""

    network: str  # "digits" or "resnet18"
    width: int
    normalize: tuple[float, float]  # mean and standard deviation of the pixels
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    augment: bool
    limit_train: int | None
    validation: int  # images of the training set kept for choosing hyper-parameters
    precision: str
    stability_radii: tuple[float, ...]
    attack_radii: tuple[float, ...]
    examples: int  # for curvature and stability
    attack_examples: int
    options: dict[str, Options] = field(default_factory=dict)  # of a method, where they differ from its own defaults

    def make_network(self, num_classes: int) -> nn.Module:
        """The standard network, from which each method makes its own."""
        if self.network == "digits":
            from quickstart import make_network

            return make_network()
        return resnet18(num_classes, self.width)


CIFAR_RADII = {"stability_radii": (0.05, 0.1, 0.15), "attack_radii": (0.05, 0.1, 0.15, 0.25)}
PRESETS = {
    "digits": Preset(
        *("digits", 16, (0.0, 1.0), 30, 64, 0.1, 5e-4, False, None, 287, "32-true"),
        stability_radii=(0.125, 0.25, 0.5),
        attack_radii=(0.125, 0.25, 0.5, 0.75),
        examples=360,
        attack_examples=360,
    ),
    "cifar10-small": Preset(
        *("resnet18", 8, (0.5, 0.25), 12, 128, 0.1, 5e-4, True, 10_000, 2_000, "32-true"),
        examples=256,
        attack_examples=1000,
        options={"gradient-norm": {"gradient_weight": 0.003}},  # that of lcnn+gradient-norm
        **CIFAR_RADII,
    ),
    "cifar10-resnet18": Preset(
        *("resnet18", 64, (0.5, 0.25), 60, 128, 0.1, 5e-4, True, None, 5_000, "bf16-mixed"),
        examples=512,
        attack_examples=2000,
        **CIFAR_RADII,
    ),
}


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), uint8 or in [0, 1], and labels (N,)."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> Split:
        """On another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """What a comparison trains on, chooses hyper-parameters on, and reports on."""

    train: Split
    validation: Split
    test: Split

    @property
    def example(self) -> Tensor:
        """One input for the converter."""
        return torch.zeros(1, *self.train.images.shape[1:])

    @property
    def num_classes(self) -> int:
        """Classes of the training images."""
        return int(self.train.labels.max()) + 1


def load_data(preset: Preset, folder: Path | None, cache: Path, device: str) -> Data:
    """Read, split and move the images; seeds of the runs do not change the splits."""
    if preset.network == "digits":
        from quickstart import load_data as load_digits

        train, test = (Split(*part.tensors) for part in load_digits())
    elif folder is None:
        raise ValueError("this preset needs --data DIR with train/<class>/*.jpg and test/<class>/*.jpg")
    else:
        classes = class_names(folder / "train")
        train, test = (Split(*load_split(folder / split, classes, 32, cache)) for split in ("train", "test"))
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[: preset.validation], order[preset.validation :][: preset.limit_train]
    return Data(train[kept].to(device), train[held_out].to(device), test.to(device))
