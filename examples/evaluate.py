"""Measure a trained classifier: curvature, gradient stability and accuracy under attack, as JSON and a picture.

    python examples/evaluate.py --model network.pt --data DIR --normalize 0.5 0.25
    python examples/evaluate.py --model weights.pt --arch resnet18 --width 16 --data DIR
    python examples/evaluate.py --model network.pt --data digits

--model is a file of torch.save(module), a checkpoint of a LitClassifier, or with --arch the weights of one of our
networks. A pickled module runs code when it is loaded: take it only from people you trust. DIR holds
train/<class>/*.jpg and perhaps test/<class>/; "digits" are scikit-learn's handwritten digits, of shape (1, 8, 8).
Results go to --output. The command `lightning-lcnn evaluate` does the same without the picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lightning_lcnn._checks import import_extra
from lightning_lcnn.checkpoints import load_classifier
from lightning_lcnn.cli.evaluate import summary
from lightning_lcnn.data import Digits, ImageData, ImageFolder
from lightning_lcnn.evaluation import evaluate

ATTACK_RADII = (0.05, 0.1, 0.25, 0.5, 1.0)


def load_model(arguments: argparse.Namespace, data: ImageData) -> Any:
    """The classifier of the file, with its normalisation in front."""
    described: dict[str, Any] = {}
    if arguments.arch is not None:
        sizes = {"num_classes": data.num_classes, "image_shape": data.image_shape}
        described = {"network": arguments.arch, "arguments": {"width": arguments.width}, **sizes}
    normalize = None if arguments.normalize is None else tuple(arguments.normalize)
    trust = arguments.arch is None
    return load_classifier(arguments.model, trust=trust, normalize=normalize, **described).module


def draw(record: dict[str, Any], file: Path) -> None:
    """Distribution of the curvature, gradient change over the radius, accuracy over the radius."""
    pyplot = import_extra("matplotlib.pyplot", "plot")
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    curvatures = sorted(value for value in record["curvature_values"] if value is not None)
    left.plot(curvatures, [(i + 1) / len(curvatures) for i in range(len(curvatures))])
    left.set(xscale="log", xlabel="curvature ‖∇²m‖ / ‖∇m‖ of the margin", ylabel="share of images below")
    for axes, values, start in (
        (middle, record["gradient_change"], 0.0),
        (right, record["adversarial_accuracy"], record["accuracy"]),
    ):
        axes.plot([0, *map(float, values)], [start, *values.values()], marker="o")
    middle.set(xlabel="ℓ₂ radius", ylabel="relative change of the gradient")
    right.set(xlabel="ℓ₂ radius", ylabel="accuracy under attack", ylim=(0, 1))
    figure.savefig(file, dpi=120)


def main() -> None:
    """Parse the command line, measure, write ``evaluation.json`` and ``evaluation.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", default="digits", help="a folder of images, or digits")
    parser.add_argument("--arch", choices=["resnet18", "resnet34", "vgg11"], help="network whose weights a file holds")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--low-curvature", action="store_true", help="not needed: the weights tell")
    parser.add_argument("--normalize", type=float, nargs=2, metavar=("MEAN", "STD"))
    parser.add_argument("--size", type=int, default=32, help="side to which images of a folder are scaled")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/evaluation"))
    arguments = parser.parse_args()
    cache = str(arguments.output / "cache")
    data = Digits() if arguments.data == "digits" else ImageFolder(arguments.data, arguments.size, cache=cache)
    data.setup("test")
    record = evaluate(
        load_model(arguments, data).to(arguments.device),
        *data.test_set.tensors,
        name=arguments.model.stem,
        examples=arguments.examples,
        attack_examples=arguments.examples,
        attack_radii=ATTACK_RADII,
        batch_size=arguments.batch_size,
        progress=lambda what, done, total: print(f"{what}: {done} of {total}", flush=True),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "evaluation.json").write_text(json.dumps(record, indent=2))
    draw(record, arguments.output / "evaluation.png")
    print(summary(record))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
