"""Train a low-curvature (or, with --standard, an ordinary) network on a folder of images.

    python examples/train_image_folder.py --data DIR [--standard] [--epochs 10] ...

DIR/train/<class>/*.jpg and, if there is one, DIR/test/<class>/*.jpg. Curves go to TensorBoard and a CSV file under
--output; at the end one line of test accuracy and one of curvature are printed, and the weights are saved.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from image_folder import ImageFolder
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from lightning_lcnn import CurvatureMonitor, LCNNMixin, lcnn_parameter_groups, models, to_low_curvature
from lightning_lcnn.metrics import AdversarialAccuracy, GradientStability, NormalizedCurvature
from lightning_lcnn.penalties import CurvaturePenalty

ATTACK_RADII = [0.1, 0.25]


class Classifier(L.LightningModule):
    """Cross-entropy, SGD with momentum and a one-cycle learning rate; pixel values are centered inside the network."""

    def __init__(self, network: torch.nn.Module, num_classes: int, learning_rate: float) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - 0.5) * 4.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        groups = lcnn_parameter_groups(self, weight_decay=5e-4)
        optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class LowCurvatureClassifier(LCNNMixin, Classifier):
    """The same, with the curvature penalty in its loss."""

    penalty_weight = 1e-2

    def configure_penalties(self) -> list:
        return [CurvaturePenalty(self.penalty_weight)]


class Measures(L.LightningModule):
    """Test accuracy, curvature, gradient stability and adversarial accuracy of any network.

    A ReLU network has no Hessian where it bends; its curvature is that of ``smooth``, a copy with β = 1000.
    """

    def __init__(self, network: torch.nn.Module, smooth: torch.nn.Module, num_classes: int, examples: int) -> None:
        super().__init__()
        self.network, self.smooth = network, smooth
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.curvature = NormalizedCurvature(max_examples=examples)
        self.loss_curvature = NormalizedCurvature(output="loss", max_examples=examples)
        self.stability = GradientStability(radius=0.1, max_examples=examples)
        self.robust = AdversarialAccuracy(ATTACK_RADII, max_examples=examples)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        for metric in (self.curvature, self.loss_curvature, self.stability):
            metric.update(self.smooth, images, labels)
        self.robust.update(self.network, images, labels)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/<class>/ and perhaps test/<class>/")
    parser.add_argument("--output", type=Path, default=Path("outputs/image_folder"))
    parser.add_argument("--model", choices=["resnet18", "resnet34", "vgg11"], default="resnet18")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage; 64 is the usual ResNet-18")
    parser.add_argument("--standard", action="store_true", help="ReLU, no penalty: the network to compare with")
    parser.add_argument("--beta", type=float, default=10.0, help="start value of every β")
    parser.add_argument("--penalty-weight", type=float, default=LowCurvatureClassifier.penalty_weight)
    parser.add_argument("--size", type=int, default=32, help="side to which images are scaled")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--limit-train", type=int, default=None, help="use at most so many training images")
    parser.add_argument("--measure", type=int, default=256, help="test images for curvature and attacks")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(args: argparse.Namespace, num_classes: int) -> Classifier:
    make = getattr(models, args.model)
    options = {} if args.standard else {"low_curvature": True, "beta": args.beta}
    network = make(num_classes, args.width, input_size=(args.size, args.size), **options)
    if args.standard:
        return Classifier(network, num_classes, args.learning_rate)
    classifier = LowCurvatureClassifier(network, num_classes, args.learning_rate)
    classifier.penalty_weight = args.penalty_weight
    return classifier


def main() -> None:
    args = arguments()
    L.seed_everything(args.seed, workers=True)
    data = ImageFolder(args.data, args.size, args.batch_size, limit_train=args.limit_train)
    classifier = build(args, len(data.classes))
    loggers = [TensorBoardLogger(args.output, name="tensorboard"), CSVLogger(args.output, name="csv")]
    callbacks = [LearningRateMonitor("step")] + ([] if args.standard else [CurvatureMonitor()])
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        logger=loggers,
        callbacks=callbacks,
        default_root_dir=args.output,
        enable_model_summary=False,
    )
    trainer.fit(classifier, datamodule=data)
    smooth = copy.deepcopy(classifier.eval())
    if args.standard:
        smooth.network = to_low_curvature(classifier.network, torch.zeros(1, 3, args.size, args.size), beta=1000.0)
    measures = Measures(classifier, smooth, len(data.classes), args.measure)
    trainer.test(measures, datamodule=data, verbose=False)
    print(json.dumps(summary(measures), indent=2))
    torch.save(classifier.network.state_dict(), args.output / "weights.pt")


def summary(measures: Measures) -> dict[str, float]:
    """What is printed at the end."""
    attacked = zip(ATTACK_RADII, measures.robust.compute().tolist(), strict=True)
    return {
        "test_accuracy": float(measures.accuracy.compute()),
        "normalized_curvature_margin": float(measures.curvature.compute()),
        "normalized_curvature_loss": float(measures.loss_curvature.compute()),
        "gradient_change_at_0.1": float(measures.stability.compute()),
        **{f"adversarial_accuracy_l2_{radius}": value for radius, value in attacked},
    }


if __name__ == "__main__":
    main()
