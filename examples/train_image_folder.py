"""Train a low-curvature (or, with --standard, an ordinary) network on a folder of images.

    python examples/train_image_folder.py --data DIR [--standard] [--epochs 10] ...

DIR/train/<class>/*.jpg and, if there is one, DIR/test/<class>/*.jpg. Curves go to TensorBoard and a CSV file under
--output; at the end the measures on the test images are printed and the weights are saved. The command `lightning-lcnn
fit` does the same from a YAML file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_lcnn import CurvatureMonitor
from lightning_lcnn._files import write_json
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli.evaluate import summary
from lightning_lcnn.data import ImageFolder
from lightning_lcnn.evaluation import evaluate
from lightning_lcnn.penalties import CurvaturePenalty


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train/<class>/ and perhaps test/<class>/")
    parser.add_argument("--output", type=Path, default=Path("outputs/image_folder"))
    parser.add_argument("--model", choices=["resnet18", "resnet34", "vgg11"], default="resnet18")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage; 64 is the usual ResNet-18")
    parser.add_argument("--standard", action="store_true", help="ReLU, no penalty: the network to compare with")
    parser.add_argument("--beta", type=float, default=10.0, help="start value of every β")
    parser.add_argument("--penalty-weight", type=float, default=1e-2)
    parser.add_argument("--size", type=int, default=32, help="side to which images are scaled")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--limit-train", type=int, default=None, help="use at most so many training images")
    parser.add_argument("--measure", type=int, default=256, help="test images for curvature and attacks")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    L.seed_everything(args.seed, workers=True)
    data = ImageFolder(args.data, args.size, args.batch_size, limit_train=args.limit_train)
    classifier = LitClassifier(
        args.model,
        data.num_classes,
        data.image_shape,
        network_args={"width": args.width},
        low_curvature=not args.standard,
        beta=args.beta,
        max_pool="average",
        penalties=[] if args.standard else [CurvaturePenalty(args.penalty_weight)],
        learning_rate=args.learning_rate,
    )
    trainer = L.Trainer(
        max_epochs=args.epochs,
        precision=args.precision,
        logger=[TensorBoardLogger(args.output, name="tensorboard"), CSVLogger(args.output, name="csv")],
        callbacks=[LearningRateMonitor("step")] + ([] if args.standard else [CurvatureMonitor()]),
        default_root_dir=args.output,
        enable_model_summary=False,
    )
    trainer.fit(classifier, datamodule=data)
    data.setup("test")
    record = evaluate(
        classifier.classifier(),
        *data.test_set.tensors,
        name="standard" if args.standard else "low-curvature",
        examples=args.measure,
        attack_examples=args.measure,
    )
    print(summary(record))
    write_json(args.output / "evaluation.json", record)
    torch.save(classifier.network.state_dict(), args.output / "weights.pt")


if __name__ == "__main__":
    main()
