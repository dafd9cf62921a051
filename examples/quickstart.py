"""Train an ordinary and a low-curvature network on handwritten digits and compare them.

    python examples/quickstart.py

The 1,797 images of 8x8 pixels come with scikit-learn. Everything is written to --output (default outputs/quickstart):
TensorBoard curves of slope and curvature per layer, a table, and the picture comparison.png.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import matplotlib
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lcnn import CurvatureMonitor, LCNNMixin, lcnn_parameter_groups, to_low_curvature
from lightning_lcnn.bounds import NetworkBound, network_bound, trace
from lightning_lcnn.functional import (
    gradient_stability,
    input_gradient_norm,
    input_hessian_norm,
    logit_margin,
    normalized_curvature,
    projected_gradient_attack,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import SubFigure

RADII = (0.125, 0.25, 0.5, 0.75)  # ℓ₂, of images whose pixels lie in [0, 1] and whose mean norm is 2.9
SHOWN = 10  # digits in the picture
NOISE = 0.5  # ℓ₂ norm of the noise on them


class Digits(L.LightningModule):
    """An ordinary Lightning classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict:
        groups = lcnn_parameter_groups(self, weight_decay=5e-4)
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LowCurvatureDigits(LCNNMixin, Digits):
    """The same classifier; the mixin adds the curvature penalty to its training step."""


def make_network() -> nn.Module:
    """Three convolutions with batch norm and ReLU, and a linear head."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 16, 1), *block(16, 32, 2), *block(32, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 test images (1, 8, 8) in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)
    parts = train_test_split(images, torch.from_numpy(labels), test_size=360, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)


@dataclass
class Result:
    """What the table and the picture show of one network."""

    name: str
    seconds: float
    accuracy: float
    bound: NetworkBound
    estimate: tuple[float, float]  # slope and curvature by the recursion that the penalty lowers
    measures: dict[str, float] = field(default_factory=dict)
    curvature: Tensor = field(default_factory=lambda: torch.empty(0))
    changes: list[float] = field(default_factory=list)  # of the gradient, for noise of each radius
    attacked: list[float] = field(default_factory=list)  # accuracy, for attacks of each radius
    gradients: Tensor = field(default_factory=lambda: torch.empty(0))
    noisy_gradients: Tensor = field(default_factory=lambda: torch.empty(0))


def train(name: str, model: L.LightningModule, args: argparse.Namespace, data: tuple[TensorDataset, ...]) -> Result:
    """Fit and test through a Trainer, then measure on the test images."""
    low_curvature = isinstance(model, LCNNMixin)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(args.output, name=name, version=""),
        callbacks=[CurvatureMonitor()] if low_curvature else [],
        default_root_dir=args.output,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    start = time.perf_counter()
    trainer.fit(model, DataLoader(data[0], batch_size=64, shuffle=True, drop_last=True))
    seconds = time.perf_counter() - start
    (scores,) = trainer.test(model, DataLoader(data[1], batch_size=360), verbose=False)
    network = model.eval().network
    images, labels = data[1].tensors
    bound = network_bound(network, images[:1], method="tight" if low_curvature else "fast")
    estimate = (math.nan, math.nan)  # nothing is trained for it
    if low_curvature:
        surrogate = trace(network).surrogate()
        estimate = (surrogate.log_slope.exp().item(), surrogate.log_curvature.exp().item())
    result = Result(name, seconds, scores["test_accuracy"], bound, estimate)
    measure(result, network, images, labels)
    return result


def measure(result: Result, network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Curvature, gradient stability and accuracy under attack."""
    # A ReLU network has no Hessian where it counts; the usual stand-in replaces ReLU by a softplus of β = 1000.
    smooth = network
    if any(isinstance(module, nn.ReLU) for module in network.modules()):
        smooth = to_low_curvature(network, images[:1], beta=1000.0)
    result.curvature = normalized_curvature(smooth, images, labels).values
    result.measures = {
        "gradient norm of the margin": input_gradient_norm(network, images, labels).values.mean().item(),
        "Hessian norm of the margin": input_hessian_norm(smooth, images, labels).values.mean().item(),
        "normalised curvature": result.curvature.mean().item(),
    }
    for radius in RADII:
        result.changes.append(gradient_stability(smooth, images, labels, radius).values.mean().item())
        attacked = projected_gradient_attack(network, images, labels, radius)
        result.attacked.append((network(attacked).argmax(1) == labels).float().mean().item())
    shown = images[:SHOWN]
    noise = torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))
    noise *= NOISE / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    result.gradients = margin_gradient(network, shown, labels[:SHOWN])
    result.noisy_gradients = margin_gradient(network, shown + noise, labels[:SHOWN])


def margin_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the logit margin by the image, what saliency maps show."""
    images = images.clone().requires_grad_()
    return torch.autograd.grad(logit_margin(network(images), labels).sum(), images)[0]


def table(results: list[Result]) -> str:
    """Rows of measures, one column per network."""
    rows = [("", *(r.name for r in results))]
    rows.append(("test accuracy", *(f"{100 * r.accuracy:.1f} %" for r in results)))
    rows.append(("training time", *(f"{r.seconds:.1f} s" for r in results)))
    for name in results[0].measures:
        rows.append((name, *(f"{r.measures[name]:.3g}" for r in results)))
    for i, radius in enumerate(RADII):
        rows.append((f"gradient change under noise, ℓ₂ {radius}", *(f"{100 * r.changes[i]:.1f} %" for r in results)))
    for i, radius in enumerate(RADII):
        rows.append((f"accuracy under attack, ℓ₂ {radius}", *(f"{100 * r.attacked[i]:.1f} %" for r in results)))
    rows.append(("training estimate of the slope", *(_number(r.estimate[0]) for r in results)))
    rows.append(("training estimate of the curvature", *(_number(r.estimate[1]) for r in results)))
    rows.append(("certified slope bound", *(f"{r.bound.slope:.4g}" for r in results)))
    rows.append(("certified curvature bound", *(f"{r.bound.curvature:.4g}" for r in results)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def picture(results: list[Result], images: Tensor, path: Path) -> None:
    """Curvature, gradient changes, accuracy under attack, and gradients of some digits with and without noise."""
    figure = plt.figure(figsize=(12, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    curvature, change, attack = top.subplots(1, 3)
    for result, colour in zip(results, ("tab:gray", "tab:blue"), strict=True):
        label = f"{result.name} (mean {result.curvature.mean():.2g})"
        values = result.curvature.clamp(min=0.03).log10()
        curvature.hist(values.numpy(), bins=40, range=(-1.5, 3), alpha=0.6, color=colour, label=label)
        style = {"marker": "o", "color": colour, "label": result.name}
        change.plot((0, *RADII), [0.0, *(100 * c for c in result.changes)], **style)
        attack.plot((0, *RADII), [100 * a for a in (result.accuracy, *result.attacked)], **style)
    curvature.set(xlabel="log₁₀ normalised curvature", ylabel="test images", title="Curvature")
    change.set(xlabel="norm of the noise (ℓ₂)", ylabel="relative change in %", title="Input gradient under noise")
    attack.set(xlabel="radius of the attack (ℓ₂)", ylabel="accuracy in %", title="Accuracy under attack")
    curvature.set_ylim(top=1.35 * curvature.get_ylim()[1])  # room for the legend
    for axes in (curvature, change, attack):
        axes.legend(frameon=False)
    gradient_maps(results, images, bottom)
    figure.savefig(path, dpi=110)


def gradient_maps(results: list[Result], images: Tensor, figure: SubFigure) -> None:
    """One column per digit, one row per network and noise."""
    rows = [("image", images)]
    for result in results:
        rows += [(f"{result.name}: gradient", result.gradients), ("with noise", result.noisy_gradients)]
    grid = figure.subplots(len(rows), len(images))
    for line, (label, maps) in zip(grid, rows, strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axes, image in zip(line, maps, strict=True):
            limit = image.abs().max().item()
            colours = {"cmap": "gray"} if label == "image" else {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            axes.imshow(image[0].numpy(), **colours)
            axes.set(xticks=[], yticks=[])


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # on images this small, more threads only wait for each other
    args.output.mkdir(parents=True, exist_ok=True)
    data = load_data()
    results = []
    for name, kind in (("standard", Digits), ("low-curvature", LowCurvatureDigits)):
        L.seed_everything(args.seed, verbose=False)
        network = make_network()
        if kind is LowCurvatureDigits:
            network = to_low_curvature(network, data[0].tensors[0][:1])
        results.append(train(name, kind(network), args, data))
    text = f"{table(results)}\n\nLayers of the low-curvature network\n{results[-1].bound}"
    print(f"\n{text}\n")
    (args.output / "table.txt").write_text(text + "\n")
    picture(results, data[1].tensors[0][:SHOWN], args.output / "comparison.png")
    print(f"Picture: {args.output / 'comparison.png'}\nCurves:  tensorboard --logdir {args.output}")


if __name__ == "__main__":
    main()
