"""Measure a trained classifier: curvature, gradient stability and accuracy under attack, as JSON and a picture.

    python examples/evaluate.py --model network.pt --data DIR --normalize 0.5 0.25
    python examples/evaluate.py --model weights.pt --arch resnet18 --width 16 --low-curvature --data DIR
    python examples/evaluate.py --model network.pt --data digits

--model is a file of torch.save(module), or of a state_dict or Lightning checkpoint of one of our networks (--arch). A
pickled module runs code when it is loaded: take it only from people you trust. DIR holds train/<class>/*.jpg and
perhaps test/<class>/; "digits" are scikit-learn's handwritten digits, of shape (1, 8, 8). Results go to --output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn import models
from lightning_lcnn._checks import import_extra
from lightning_lcnn.metrics import (
    AdversarialAccuracy,
    GradientStability,
    InputGradientNorm,
    InputHessianNorm,
    MeasuringMetric,
    NormalizedCurvature,
)

STABILITY_RADII = (0.05, 0.1, 0.15)
ATTACK_RADII = (0.05, 0.1, 0.25, 0.5, 1.0)


class Normalize(nn.Module):
    """(x - mean) / std in front of the network, so that attacks and radii are in pixels of [0, 1]."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def load_model(arguments: argparse.Namespace, num_classes: int, shape: torch.Size) -> nn.Module:
    """The module of a file, or one of our networks with the file's weights."""
    content = torch.load(arguments.model, map_location="cpu", weights_only=arguments.arch is not None)
    if isinstance(content, nn.Module):
        network = content
    else:
        if arguments.arch is None:
            raise ValueError(
                f"{arguments.model} holds weights and no module; name the network with --arch and --width."
            )
        make = getattr(models, arguments.arch)
        options = {"in_channels": shape[1], "input_size": tuple(shape[2:]), "low_curvature": arguments.low_curvature}
        network = make(num_classes, arguments.width, **options)
        network.load_state_dict(own_weights(content.get("state_dict", content), set(network.state_dict())))
    return nn.Sequential(Normalize(*arguments.normalize), network).eval()


def own_weights(weights: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Strip the prefix that a LightningModule gives to its network's weights, and drop what else it holds."""
    prefixes = {key[: -len(name)] for key in weights for name in names if key == name or key.endswith("." + name)}
    best = max(sorted(prefixes), key=lambda prefix: sum(prefix + name in weights for name in names), default="")
    return {name: weights[best + name] for name in names if best + name in weights}


def load_data(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, int]:
    """Images in [0, 1], labels, and the number of classes."""
    if arguments.data == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels), 10
    from image_folder import class_names, load_split

    folder = Path(arguments.data)
    classes = class_names(folder / "train")
    split = next(folder / name for name in ("test", "val", "train") if (folder / name).is_dir())
    images, labels = load_split(split, classes, arguments.size, arguments.output / "cache")
    return images.float() / 255, labels, len(classes)


def measures() -> dict[str, MeasuringMetric]:
    """Everything that is measured, in one pass over the images."""
    spread = ["mean", "median", 0.95]
    table: dict[str, MeasuringMetric] = {
        "gradient_norm": InputGradientNorm(reduction=spread),
        "hessian_norm": InputHessianNorm(reduction=[*spread, "converged"]),
        "curvature_margin": NormalizedCurvature(reduction=[*spread, "converged", "none"]),
        "curvature_loss": NormalizedCurvature("loss", reduction=[*spread, "converged"]),
        "adversarial": AdversarialAccuracy(ATTACK_RADII, full=True),
    }
    for radius in STABILITY_RADII:
        table[f"gradient_change_{radius:g}"] = GradientStability(radius, reduction=spread)
        table[f"worst_gradient_change_{radius:g}"] = GradientStability(radius, statistic="worst", reduction=spread)
    return table


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """One nested dictionary per measure; numbers only, and the per-example curvatures."""
    metrics = {name: metric.to(arguments.device) for name, metric in measures().items()}
    model = model.to(arguments.device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: arguments.examples]
    for done, rows in enumerate(order.split(arguments.batch_size)):
        batch = images[rows].to(arguments.device), labels[rows].to(arguments.device)
        for metric in metrics.values():
            metric.update(model, *batch)
        print(f"\rmeasured {min((done + 1) * arguments.batch_size, len(order))} of {len(order)}", end="", flush=True)
    print()
    results = {name: metric.compute() for name, metric in metrics.items()}
    return {name: {key: value.tolist() for key, value in result.items()} for name, result in results.items()}


def draw(results: dict[str, Any], file: Path) -> None:
    """Distribution of the curvature, gradient change over the radius, accuracy over the radius."""
    pyplot = import_extra("matplotlib.pyplot", "plot")
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    curvatures = sorted(results["curvature_margin"]["values"])
    left.plot(curvatures, [(i + 1) / len(curvatures) for i in range(len(curvatures))])
    left.set(xscale="log", xlabel="curvature ‖∇²m‖ / ‖∇m‖ of the margin", ylabel="share of images below")
    for prefix, label in (("worst_gradient_change", "worst found"), ("gradient_change", "random, mean")):
        changes = [results[f"{prefix}_{radius:g}"]["mean"] for radius in STABILITY_RADII]
        middle.plot([0, *STABILITY_RADII], [0, *changes], marker="o", label=label)
    middle.set(xlabel="ℓ₂ radius", ylabel="relative change of the gradient")
    middle.legend()
    attacked = results["adversarial"]
    accuracies = [attacked["clean_accuracy"], *(attacked[f"robust_accuracy_{radius:g}"] for radius in ATTACK_RADII)]
    right.plot([0, *ATTACK_RADII], accuracies, marker="o")
    right.set(xlabel="ℓ₂ radius", ylabel="accuracy under attack", ylim=(0, 1))
    figure.savefig(file, dpi=120)


def main() -> None:
    """Parse the command line, measure, write ``evaluation.json`` and ``evaluation.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", default="digits", help="a folder of images, or digits")
    parser.add_argument(
        "--arch", choices=["resnet18", "resnet34", "vgg11"], help="network of a file that holds weights"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--low-curvature", action="store_true")
    parser.add_argument("--normalize", type=float, nargs=2, default=(0.0, 1.0), metavar=("MEAN", "STD"))
    parser.add_argument("--size", type=int, default=32, help="side to which images of a folder are scaled")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
    arguments = parser.parse_args()
    images, labels, num_classes = load_data(arguments)
    model = load_model(arguments, num_classes, images.shape)
    results = evaluate(model, images, labels, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "evaluation.json").write_text(json.dumps(results, indent=2))
    draw(results, arguments.output / "evaluation.png")
    for name, result in results.items():
        row = "  ".join(f"{key} {value:.4g}" for key, value in result.items() if key != "values")
        print(f"{name:28} {row}")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
