"""A ready LightningModule for image classification, standard or low-curvature."""

from __future__ import annotations

import importlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import Self

from lightning_lcnn.__about__ import __version__
from lightning_lcnn._checks import check_non_negative, check_positive
from lightning_lcnn._files import check_finite, read_checkpoint, weights_of
from lightning_lcnn.functional import recompute_activations
from lightning_lcnn.layers import lcnn_parameter_groups
from lightning_lcnn.metrics import MeasuringMetric
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.models.by_name import build_network
from lightning_lcnn.models.from_file import Source, check_class_path, classifier_settings
from lightning_lcnn.models.normalize import Normalize
from lightning_lcnn.penalties import CurvaturePenalty, Penalty

MARK = "lightning_lcnn"  # key of a checkpoint that a LitClassifier wrote


class LitClassifier(LCNNMixin, LightningModule):
    r"""Cross-entropy, SGD with momentum and a one-cycle learning rate, for images in [0, 1] of shape (B, C, H, W).

    .. math:: \text{logits} = \text{network}((x - \text{mean}) / \text{std})

    A low-curvature network is penalised by :class:`~lightning_lcnn.penalties.CurvaturePenalty`, a standard one by
    nothing, unless ``penalties`` says otherwise. Loss, accuracy and ``metrics`` are logged in validation and test.

    Args:
        network: Name as for :func:`~lightning_lcnn.models.by_name.build_network`: ``"resnet18"``,
            ``"torchvision/resnet50"``, ``"timm/convnext_tiny"``, ``"my_module.make_net"``.
        num_classes: Number of classes.
        image_shape: (C, H, W) of the images.
        network_args: Further arguments of the network's function, such as ``{"width": 16}`` for ours.
        low_curvature: Whether to train the low-curvature form.
        beta: Start of every β.
        gamma: Start of every γ; None: 10, or the layer's own slope if that is larger.
        max_pool: What max pooling becomes in the low-curvature form: ``"smooth"``, ``"average"`` or ``"keep"``.
        pretrained: Whether to start from downloaded weights (torchvision, timm).
        weights: Checkpoint to start from, of either form; for fine-tuning.
        penalties: Added to the loss; None for the default above.
        learning_rate: Peak of the one-cycle schedule.
        momentum: Of SGD, with Nesterov's correction.
        weight_decay: Of all parameters but β and γ.
        mean: Subtracted from the images, one number or one per channel.
        std: Divides the images, one number or one per channel.
        metrics: Metrics of :mod:`lightning_lcnn.metrics` by name, logged as ``val_NAME`` and ``test_NAME``.
        recompute: Whether training takes less memory and a little more time
            (:func:`~lightning_lcnn.functional.recompute_activations`).

    Raises:
        ImportError: If the network's library is missing.
        ValueError: If the network is unknown, weights do not fit, or an argument is out of range.

    Source:
        LCNN (Srinivas et al., 2022); defaults from our experiments on CIFAR-10.

    Example:
        >>> classifier = LitClassifier("resnet18", 5, (1, 8, 8), network_args={"width": 2}, low_curvature=True)
        >>> classifier(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        network: str = "resnet18",
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        network_args: dict[str, Any] | None = None,
        low_curvature: bool = False,
        beta: float = 10.0,
        gamma: float | None = None,
        max_pool: str = "smooth",
        pretrained: bool = False,
        weights: str | None = None,
        penalties: list[Penalty] | None = None,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.25,
        metrics: dict[str, MeasuringMetric] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_positive("learning_rate", learning_rate)
        check_non_negative("weight_decay", weight_decay)
        self.save_hyperparameters(ignore=["penalties", "metrics"])
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.low_curvature, self.penalties, self.image_shape = low_curvature, penalties, tuple(image_shape)
        self.recompute = recompute
        self.normalize = Normalize(mean, std)
        self.network = build_network(
            network,
            num_classes,
            (image_shape[0], image_shape[1], image_shape[2]),
            low_curvature=low_curvature,
            beta=beta,
            gamma=gamma,
            max_pool=max_pool,
            pretrained=pretrained,
            weights=None if weights is None else _weights(Path(weights)),
            arguments=network_args,
        )
        # a checkpoint of this module carries the weights itself
        self.hparams.update(pretrained=False, weights=None)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.measures = nn.ModuleDict(metrics or {})

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images in [0, 1]."""
        return self.network(self.normalize(x))

    def on_train_start(self) -> None:
        """Refuse to go on beyond the schedule of the checkpoint, which has ended."""
        schedule: Any = self.lr_schedulers()
        planned = getattr(schedule, "total_steps", None)
        if planned is not None and planned < self.trainer.estimated_stepping_batches:
            raise ValueError(
                f"the checkpoint's learning rate ends after {planned} steps, so it cannot go on for more epochs; "
                "start a new run from its weights with --model.weights CHECKPOINT (weights=...)."
            )

    def configure_penalties(self) -> list[Penalty]:
        """The penalties given, or the default of the network's form."""
        if self.penalties is not None:
            return self.penalties
        return [CurvaturePenalty()] if self.low_curvature else []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy; the mixin adds the penalties."""
        images, labels = batch
        with recompute_activations(self.recompute):
            loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and the further metrics."""
        self._measure(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss, accuracy and the further metrics."""
        self._measure(batch, "test")

    def configure_optimizers(self) -> Any:
        """SGD without decay of β and γ, and a one-cycle schedule over the whole run."""
        groups = lcnn_parameter_groups(self, weight_decay=self.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, nesterov=self.momentum > 0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """As Lightning's, after a check that the file asks for nothing but what this class writes.

        Args:
            checkpoint_path: Path, URL or open file.
            map_location: Where the tensors go.
            hparams_file: YAML or CSV with hyperparameters in place of the checkpoint's.
            strict: Whether the names of all weights must agree.
            weights_only: False to trust the file: pickled objects, and whatever it names, run code.
            kwargs: Hyperparameters in place of the file's. A network of your own, ``"my_module.make_net"``, is built if
                you name it here, with its ``network_args``.

        Returns:
            The module.

        Raises:
            ValueError: If the file asks for more, or a weight holds NaN.

        Source:
            Ours.
        """
        if weights_only is not False:
            weights_only = True
            checkpoint_path, content = _opened(checkpoint_path)
            if hparams_file is not None:
                read = load_hparams_from_tags_csv if str(hparams_file).endswith(".csv") else load_hparams_from_yaml
                content = {**content, "hyper_parameters": dict(read(hparams_file))}
            described = {key: kwargs[key] for key in ("network", "network_args") if key in kwargs}
            if isinstance(content.get("hyper_parameters"), dict):
                content["hyper_parameters"] = content["hyper_parameters"] | described
            source = Source(hparams_file or checkpoint_path, "weights_only=False", "network=... and network_args=...")
            classifier_settings(content, source, kwargs, further=cls is not LitClassifier)
            check_class_path(content, cls, source)
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=weights_only, **kwargs
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that hold NaN."""
        check_finite(checkpoint, "the checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint, so that the command line knows what it holds."""
        cls = type(self)
        checkpoint[MARK] = {"class": f"{cls.__module__}.{cls.__qualname__}", "version": __version__}

    def classifier(self) -> nn.Sequential:
        """Normalisation and network without Lightning, in evaluation mode; shares the weights."""
        return nn.Sequential(OrderedDict(normalize=self.normalize, network=self.network)).eval()

    def _measure(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_accuracy", self.accuracy, prog_bar=True)
        measures: Any = self.measures
        for name, metric in measures.items():
            metric.update(self, images, labels)
            self.log(f"{stage}_{name}", metric)


def _weights(file: Path) -> dict[str, Tensor]:
    content = read_checkpoint(file, way="`lightning-lcnn convert FILE --trust --output NEW`, and start from NEW")
    return weights_of(content, file)


def _opened(source: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint as Lightning takes it, and what it holds; a URL is read once: what is checked is what is loaded."""
    if isinstance(source, str | Path) and "://" not in str(source):
        content = read_checkpoint(Path(source), way="weights_only=False")
    else:
        if isinstance(source, str):
            fsspec = importlib.import_module("fsspec")  # comes with Lightning
            with fsspec.open(source, "rb") as file:
                source = io.BytesIO(file.read())
        start = source.tell()
        content = torch.load(source, map_location="cpu", weights_only=True)
        source.seek(start)
        check_finite(content, "the checkpoint")
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{source} is no checkpoint of Lightning: it has no `state_dict`.")
    return source, dict(content)
