"""Penalties for LightningModules that cannot inherit from the mixin."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from lightning_lcnn.callbacks.base import Callback, as_penalties, check_strategy, penalised_step, trains
from lightning_lcnn.callbacks.batch import batch_input_and_target
from lightning_lcnn.callbacks.power_iteration import PowerIteration
from lightning_lcnn.layers.upkeep import spectral_layers
from lightning_lcnn.penalties import CurvaturePenalty, Penalty


class PenaltyCallback(Callback):
    r"""Add curvature penalties to the loss of any LightningModule, without touching its class.

    .. math:: \text{loss} = \text{your loss} + \sum_i λ_i \, \mathrm{penalty}_i(\text{model})

    For the length of a fit the ``training_step`` of the instance is replaced by one that adds the penalties to its
    result; afterwards everything is as it was. :class:`~lightning_lcnn.LCNNMixin` does the same for classes of your
    own and attaches :class:`PowerIteration`, which this callback does not: pass both to the trainer.

    Args:
        penalties: One penalty or a list of them; None means ``[CurvaturePenalty()]``.

    Raises:
        TypeError: If ``penalties`` holds anything else; at setup, if the module has the mixin already or optimises
            manually.
        ValueError: At setup, under FSDP1 and DeepSpeed ZeRO stage 3.

    Source:
        Ours.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callbacks = [PenaltyCallback(CurvaturePenalty(weight=0.1)), PowerIteration()]
        >>> trainer = Trainer(callbacks=callbacks, logger=False, accelerator="cpu")
    """

    def __init__(self, penalties: Penalty | Sequence[Penalty] | None = None) -> None:
        if penalties is None:
            penalties = CurvaturePenalty()
        self.penalties = as_penalties([penalties] if isinstance(penalties, Penalty) else penalties)
        self._undo: Any = None

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Replace the instance's ``training_step``."""
        if stage != "fit" or self._undo is not None:
            return
        self._check(trainer, pl_module)
        # The instance's, not the class's: other modules of that class shall not be penalised. Undone after the fit and
        # after errors: a copy of a patched module would run the original's step, and a local function has no pickle.
        # May go when a hook of callbacks can replace the loss between step and backward; none can.
        step = pl_module.training_step

        @functools.wraps(step, updated=())
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not trains(pl_module):
                return step(*args, **kwargs)
            batch = args[0] if args else next(iter(kwargs.values()), None)
            split = getattr(pl_module, "penalty_inputs", batch_input_and_target)
            return penalised_step(pl_module, self.penalties, lambda: step(*args, **kwargs), lambda: split(batch))

        training_step.__wrapped__ = inspect.unwrap(step)  # Lightning reads the signature there
        own = pl_module.__dict__.get("training_step")
        pl_module.training_step = training_step
        self._undo = functools.partial(_restore_step, pl_module, own)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the instance its ``training_step`` back."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the instance its ``training_step`` back: Lightning calls no teardown after an error."""
        self.teardown(trainer, pl_module, "fit")

    def _check(self, trainer: Any, pl_module: Any) -> None:
        name = type(pl_module).__name__
        if hasattr(pl_module, "configure_penalties"):
            raise TypeError(
                f"{name} has LCNNMixin, which adds the penalties already: choose them in `configure_penalties` and "
                "leave PenaltyCallback away."
            )
        if not pl_module.automatic_optimization:
            raise TypeError(
                f"PenaltyCallback has no loss to add to in {name}, which optimises manually: add "
                "`CurvaturePenalty(...)(self)` to your loss before `self.manual_backward(loss)`."
            )
        check_strategy(trainer.strategy)
        maintained = any(isinstance(callback, PowerIteration) for callback in trainer.callbacks)
        if not maintained and any(True for _ in spectral_layers(pl_module)):
            warnings.warn(
                f"{name} has spectral layers and nothing refreshes their norms: pass PowerIteration() to the trainer.",
                UserWarning,
            )


def _restore_step(module: Any, own: Any) -> None:
    if own is None:
        del module.training_step
    else:
        module.training_step = own
