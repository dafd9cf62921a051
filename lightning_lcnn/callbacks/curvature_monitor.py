"""Log slope and curvature of every layer during training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

import lightning_lcnn.bounds as bounds
from lightning_lcnn._checks import check_int
from lightning_lcnn._compat import logger_step, logs_now
from lightning_lcnn.bounds import Surrogate
from lightning_lcnn.callbacks.base import TOTALS, Callback, phase
from lightning_lcnn.callbacks.batch import batch_input
from lightning_lcnn.kernels.modes import is_sharded
from lightning_lcnn.layers import LearnableBeta, SpectralLayer
from lightning_lcnn.layers.batch_norm import LipschitzBatchNorm
from lightning_lcnn.penalties import GraphCache, network_of

# Each chart shows all tags that match; a logger's prefix may stand before them.
_CHARTS = {
    "beta": ".*lcnn_beta/.*",
    "gamma": ".*lcnn_gamma/.*",
    "slope": ".*lcnn_slope/.*",
    "sigma": ".*lcnn_sigma/.*",
    "share of the curvature": ".*lcnn_share/.*",
    "network": ".*lcnn/log_(ratio|slope|curvature)",
}
_HISTOGRAMS = ("beta", "gamma")


class CurvatureMonitor(Callback):
    r"""Log β, γ, σ, slope and curvature share of every layer, and the totals of the network.

    .. math:: \log \bar C = \mathrm{logsumexp}_i \Big(\log β_i - \log 4 + \sum_{j \le i} \log L_j\Big)

    Works with every logger, through ``logger.log_metrics``: ``lcnn_beta/<layer>``, ``lcnn_gamma/<layer>``,
    ``lcnn_slope/<layer>``, ``lcnn_sigma/<layer>``, ``lcnn_share/<activation>`` (the part of :math:`\bar C` that comes
    from it, all adding to 1), and ``lcnn/log_ratio`` (:math:`\log \bar C`), ``lcnn/log_slope``,
    ``lcnn/log_curvature``. These totals follow from the layers' training slopes; they are estimates, equal to the
    penalty's. At the end of each training and validation epoch they are also in ``trainer.callback_metrics``, where
    ModelCheckpoint and EarlyStopping find them.

    TensorBoard also gets the distributions of β and γ over the layers, as histograms, and a layout with one chart per
    quantity and a line per layer, in its tab CUSTOM SCALARS. Characters of layer names that some logger refuses
    (MLflow takes ASCII letters, digits and ``_ - .`` there) are logged as ``_``.

    Where the network's graph cannot be traced there are no totals and shares, with one warning.

    Args:
        every_n_steps: Steps between logs. None: the trainer's logging steps, and the end of each epoch.
        every_n_epochs: Epochs between logs, in place of steps.
        certified: At the end of each validation epoch, also log ``lcnn/certified_slope`` and
            ``lcnn/certified_curvature``, which are proven for the evaluation-mode network
            (:func:`~lightning_lcnn.bounds.network_bound`, seconds on a ResNet-18). Needs ``example_input_array`` or
            batches that hold the input.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an interval is below 1 or both are given.

    Source:
        Ours.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CurvatureMonitor()], logger=False, accelerator="cpu")
    """

    def __init__(
        self, every_n_steps: int | None = None, every_n_epochs: int | None = None, certified: bool = False
    ) -> None:
        if every_n_steps is not None:
            check_int("every_n_steps", every_n_steps)
        if every_n_epochs is not None:
            check_int("every_n_epochs", every_n_epochs)
        if every_n_steps is not None and every_n_epochs is not None:
            raise ValueError(
                "`every_n_steps` and `every_n_epochs` exclude each other, got "
                f"{every_n_steps} and {every_n_epochs}; give one of them."
            )
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.certified = certified
        self._graphs = GraphCache()
        self._traceable = True
        self._last_step = -1
        self._example: Tensor | None = None

    @property
    def logs_totals(self) -> bool:
        """Whether it logs slope and curvature of the network, as far as is known: not once tracing has failed."""
        return self._traceable

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the last run."""
        self._graphs, self._traceable, self._last_step, self._example = GraphCache(), True, -1, None

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Lay out TensorBoard's charts."""
        if trainer.is_global_zero:
            add_layout(trainer.loggers)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log if this is one of the steps."""
        if self.every_n_epochs is not None or not trainer.loggers:
            return
        step = logger_step(trainer)
        due = logs_now(trainer)
        if self.every_n_steps is not None:
            due = (step + 1) % self.every_n_steps == 0
        if due:
            self._log(trainer, pl_module, step)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log if this is one of the epochs, and show the totals to other callbacks."""
        every = self.every_n_epochs if self.every_n_epochs is not None else int(self.every_n_steps is None)
        if every and (trainer.current_epoch + 1) % every == 0:
            self._log(trainer, pl_module, max(0, logger_step(trainer) - 1))
        self._show(pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep one example for the certified bound."""
        if self.certified and self._example is None:
            given = pl_module.example_input_array
            self._example = batch_input(batch if given is None else given)[:1].detach().clone()

    @override
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Show the totals to other callbacks; certify them if asked to."""
        if trainer.sanity_checking:
            return
        self._show(pl_module)
        if self.certified and self._example is not None:
            with torch.inference_mode(False), phase(trainer, "certified_bound"):
                bound = bounds.network_bound(network_of(pl_module), self._example.to(pl_module.device))
            # The largest of all processes, whose running statistics may differ: still a bound for each of them.
            for key, value in (("slope", bound.slope), ("curvature", bound.curvature)):
                pl_module.log(f"lcnn/certified_{key}", value, reduce_fx="max", sync_dist=True)

    @torch.no_grad()
    def _log(self, trainer: Any, pl_module: Any, step: int) -> None:
        # where FSDP2 shards the weights every process takes part in reading them
        if step == self._last_step or not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        self._last_step = step
        with phase(trainer, "monitor"):
            values = layer_values(network_of(pl_module))
            surrogate = self._surrogate(pl_module)
            if surrogate is not None:
                values |= graph_values(surrogate) | network_totals(surrogate)
            numbers = logger_keys(to_numbers(values))
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=step)
                add_histograms(trainer.loggers, numbers, step)

    @torch.no_grad()
    def _show(self, pl_module: Any) -> None:
        surrogate = self._surrogate(pl_module)
        if surrogate is not None:
            for key, value in network_totals(surrogate).items():
                pl_module.log(key, value, logger=False, sync_dist=True)

    def _surrogate(self, pl_module: Any) -> Surrogate | None:
        """Surrogate bound of the network as it is now, or None where the graph cannot be traced."""
        if not self._traceable:
            return None
        try:
            return self._graphs.graph(network_of(pl_module)).surrogate()
        except ValueError as error:
            self._traceable = False
            warnings.warn(f"CurvatureMonitor logs no totals and no curvature shares: {error}", UserWarning)
            return None


def layer_values(module: nn.Module) -> dict[str, Tensor]:
    """β of every activation, slope and γ of every batch norm, slope, γ and σ of every spectral layer, by name."""
    values: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LearnableBeta):
            values[f"lcnn_beta/{name}"] = layer.beta.mean()
        elif isinstance(layer, LipschitzBatchNorm | SpectralLayer):
            values |= _normalised_layer_values(name, layer)
    return values


def _normalised_layer_values(name: str, layer: LipschitzBatchNorm | SpectralLayer) -> dict[str, Tensor]:
    values = {}
    if isinstance(layer, SpectralLayer) or layer.running_var is not None:
        values[f"lcnn_slope/{name}"] = layer.slope()
    if layer.gamma is not None:
        values[f"lcnn_gamma/{name}"] = layer.gamma
    if isinstance(layer, SpectralLayer):
        values[f"lcnn_sigma/{name}"] = layer.sigma()
    return values


def network_totals(surrogate: Surrogate) -> dict[str, Tensor]:
    """Logarithms of the network's estimated slope and curvature bounds and of their ratio."""
    totals = (surrogate.log_ratio, surrogate.log_slope, surrogate.log_curvature)
    return dict(zip(TOTALS, totals, strict=True))


def graph_values(surrogate: Surrogate) -> dict[str, Tensor]:
    """Slope of every layer of the graph, and the share of every activation in the curvature, all its uses together."""
    values = {
        f"lcnn_slope/{name}": log_slope.exp()
        for name, log_slope in zip(surrogate.layers, surrogate.layer_log_slopes, strict=True)
    }
    for name, share in zip(surrogate.activations, surrogate.shares(), strict=True):
        key = f"lcnn_share/{name}"
        values[key] = values[key] + share if key in values else share
    return values


def to_numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy all values to the host at once."""
    if not values:
        return {}
    stacked = torch.stack([value.detach().float() for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def logger_keys(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers under keys ``group/layer`` that every logger takes; MLflow is the strictest.

    Other characters become ``_``, keys that are then equal get a number, and a network that is one layer, whose name is
    empty, is called ``network``.
    """
    keyed: dict[str, float] = {}
    for key, number in numbers.items():
        group, layer = key.split("/", 1)
        name = stem = f"{group}/{re.sub(r'[^A-Za-z0-9_.-]', '_', layer) or 'network'}"
        count = 1
        while name in keyed:
            count += 1
            name = f"{stem}_{count}"
        keyed[name] = number
    return keyed


def add_layout(loggers: Iterable[Any]) -> None:
    """One chart per quantity with a line per layer, in the tab CUSTOM SCALARS."""
    layout = {"low curvature": {title: ["Multiline", [tags]] for title, tags in _CHARTS.items()}}
    for writer in _writers(loggers):
        writer.add_custom_scalars(layout)


def add_histograms(loggers: Iterable[Any], numbers: Mapping[str, float], step: int) -> None:
    """Distribution over the layers of β and γ, as ``lcnn/beta`` and ``lcnn/gamma``."""
    for writer in _writers(loggers):
        for name in _HISTOGRAMS:
            values = torch.tensor([value for key, value in numbers.items() if key.startswith(f"lcnn_{name}/")])
            values = values[values.isfinite()]  # a histogram of anything else raises
            if len(values):
                writer.add_histogram(f"lcnn/{name}", values, step)


def _writers(loggers: Iterable[Any]) -> Iterator[Any]:
    """Summary writers of torch and tensorboardX, told by their methods: neither package need be there."""
    for logger in loggers:
        writer = getattr(logger, "experiment", None)
        if hasattr(writer, "add_custom_scalars") and hasattr(writer, "add_histogram"):
            yield writer
