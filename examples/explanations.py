"""Saliency maps of a standard and a low-curvature network, with and without small noise on the image.

    python examples/explanations.py
    python examples/explanations.py --data DIR --standard outputs/standard --low-curvature outputs/low_curvature

Without --data, both networks are trained on scikit-learn's handwritten digits, which takes a minute. With it, they are
run folders or checkpoints, and DIR holds train/<class>/*.jpg and perhaps test/<class>/. Explanations: the gradient of
the logit margin and, where Captum is installed (pip install "lightning-lcnn[explain]"), its Saliency and
IntegratedGradients of the logit. A table and one picture per explanation go to --output.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from quickstart import Digits, LowCurvatureDigits, make_network
from quickstart import load_data as load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lcnn import to_low_curvature
from lightning_lcnn.checkpoints import load_classifier
from lightning_lcnn.data import ImageFolder
from lightning_lcnn.functional import cosine_agreement, saliency_under_noise, top_k_agreement
from lightning_lcnn.metrics import GradientStability
from lightning_lcnn.plots import gradient_grid

NOISES = 4  # random perturbations per image
TOP = 0.1  # share of the entries that counts as most important

Explanation = Callable[[Tensor, Tensor], Tensor]  # images, labels -> one map per image


@dataclass
class Agreement:
    """How far the explanations of an image with and without noise agree; means over images and noises."""

    change: float  # ‖map with noise - map‖ / ‖map‖
    cosine: float
    top: float  # common share of the most important entries

    def __str__(self) -> str:
        return (
            f"change {100 * self.change:.0f} %\ncosine {self.cosine:.2f}\ntop {100 * TOP:.0f} %: {100 * self.top:.0f} %"
        )


def train_networks(epochs: int, seed: int) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Both networks of the quickstart, and the test images."""
    train, test = load_digits()
    networks = {}
    for name, kind in (("standard", Digits), ("low-curvature", LowCurvatureDigits)):
        L.seed_everything(seed, verbose=False)
        network = make_network()
        model = kind(network if kind is Digits else to_low_curvature(network, train.tensors[0][:1]))
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True, drop_last=True))
        networks[name] = model.eval().network
    return networks, *test.tensors


def load_networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Trained networks from files, and test images of the folder."""
    sources = {"standard": args.standard, "low-curvature": args.low_curvature}
    networks = {name: load_classifier(source, trust=args.trust).module for name, source in sources.items()}
    data = ImageFolder(str(args.data), args.size, cache=str(args.output / "cache"))
    data.setup("test")
    images, labels = data.test_set.tensors
    return networks, images.float() / 255, labels


def captum_explanations(network: nn.Module) -> dict[str, Explanation]:
    """Captum's maps of the logit of the true class; none where Captum is not installed."""
    try:
        from captum.attr import IntegratedGradients, Saliency
    except ImportError:
        return {}
    saliency, integrated = Saliency(network), IntegratedGradients(network)

    def absolute_gradient(images: Tensor, labels: Tensor) -> Tensor:
        return saliency.attribute(images.clone().requires_grad_(), target=labels).detach()

    def integrated_gradients(images: Tensor, labels: Tensor) -> Tensor:
        return integrated.attribute(images, baselines=0.0, target=labels, n_steps=32).detach()

    return {"Saliency": absolute_gradient, "IntegratedGradients": integrated_gradients}


def explanation_pairs(
    network: nn.Module, images: Tensor, labels: Tensor, radius: float, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every explanation of the images without and with noise of the given norm, the same noise for all."""
    result = saliency_under_noise(network, images, labels, radius, seed=seed)
    pairs = {"gradient": (result.clean, result.noisy)}
    for name, explain in captum_explanations(network).items():
        pairs[name] = explain(images, labels), explain(images + result.noise, labels)
    return pairs


def measure(network: nn.Module, images: Tensor, labels: Tensor, radius: float) -> dict[str, Agreement]:
    """Agreement of each explanation with itself under noise."""
    collected: dict[str, list[Tensor]] = {}
    for seed in range(NOISES):
        for name, (clean, noisy) in explanation_pairs(network, images, labels, radius, seed).items():
            change = (noisy - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
            row = torch.stack([change, cosine_agreement(clean, noisy), top_k_agreement(clean, noisy, TOP)])
            collected.setdefault(name, []).append(row.mean(dim=1))
    return {name: Agreement(*torch.stack(rows).mean(dim=0).tolist()) for name, rows in collected.items()}


def table(
    networks: dict[str, nn.Module], images: Tensor, labels: Tensor, radii: list[float]
) -> tuple[str, dict[str, dict[str, Agreement]]]:
    """Rows of explanations and radii; and, by network, the agreement at the last radius, which the pictures show."""
    names = list(networks)
    lines = [f"{'':46}" + "".join(f"{name:>16}" for name in names)]

    def add(label: str, cells: list[str]) -> None:
        lines.append(f"{label:46}" + "".join(f"{cell:>16}" for cell in cells))

    accuracies = [(network(images).argmax(1) == labels).float().mean().item() for network in networks.values()]
    add(f"accuracy on these {len(images)} images", [f"{100 * value:.1f} %" for value in accuracies])
    for radius in radii:
        metrics = {name: GradientStability(radius) for name in names}
        for name, network in networks.items():
            metrics[name].update(network, images, labels)
        add(f"GradientStability, ℓ₂ {radius:g}", [f"{100 * metrics[n].compute().item():.1f} %" for n in names])
        found = {name: measure(network, images, labels, radius) for name, network in networks.items()}
        for explanation in found[names[0]]:
            rows = [found[name][explanation] for name in names]
            add(f"{explanation}, ℓ₂ {radius:g}: change", [f"{100 * row.change:.1f} %" for row in rows])
            add("    cosine", [f"{row.cosine:.3f}" for row in rows])
            add(f"    common part of the top {100 * TOP:.0f} %", [f"{100 * row.top:.1f} %" for row in rows])
    return "\n".join(lines), found


def draw(
    networks: dict[str, nn.Module],
    images: Tensor,
    labels: Tensor,
    radius: float,
    found: dict[str, dict[str, Agreement]],
    folder: Path,
) -> None:
    """One picture per explanation, the means of the table beside the maps."""
    pairs = {name: explanation_pairs(network, images, labels, radius) for name, network in networks.items()}
    for explanation in next(iter(pairs.values())):
        maps = {f"{name}\n{found[name][explanation]}": pairs[name][explanation] for name in networks}
        noise = saliency_under_noise(next(iter(networks.values())), images, labels, radius).noise
        figure = gradient_grid(images, maps, images + noise)
        figure.savefig(folder / f"{explanation}.png", dpi=100)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; handwritten digits by default")
    parser.add_argument("--standard", type=Path, help="run folder or checkpoint, with --data")
    parser.add_argument("--low-curvature", type=Path, help="run folder or checkpoint, with --data")
    parser.add_argument("--trust", action="store_true", help="load pickled networks, which runs code from the file")
    parser.add_argument("--size", type=int, default=32, help="side to which images of --data are scaled")
    parser.add_argument("--radii", type=float, nargs="+", help="ℓ₂ norms of the noise; pictures show the last")
    parser.add_argument("--shown", type=int, default=8, help="images in the pictures")
    parser.add_argument("--measured", type=int, default=256, help="images in the table")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/explanations"))
    args = parser.parse_args()
    if args.data is not None and None in (args.standard, args.low_curvature):
        parser.error("--data needs --standard and --low-curvature, two trained networks.")
    if args.data is None and (args.standard or args.low_curvature):
        parser.error("--standard and --low-curvature need --data, the images.")
    return args


def main() -> None:
    """Train or load, measure, draw."""
    args = arguments()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1)  # on images this small, more threads only wait for each other
    args.output.mkdir(parents=True, exist_ok=True)
    trained = args.data is None
    networks, images, labels = train_networks(args.epochs, args.seed) if trained else load_networks(args)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    radii = args.radii or ([0.125, 0.25, 0.5] if trained else [0.05, 0.1, 0.15])
    measured = order[: args.measured]
    text, found = table(networks, images[measured], labels[measured], radii)
    if not captum_explanations(nn.Identity()):
        text += '\nCaptum is not installed (pip install "lightning-lcnn[explain]"): only the gradient was compared.'
    print(text)
    (args.output / "table.txt").write_text(text + "\n")
    shown = order[: args.shown]
    draw(networks, images[shown], labels[shown], radii[-1], found, args.output)
    print(f"Pictures: {args.output}")


if __name__ == "__main__":
    main()
