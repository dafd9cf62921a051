"""The mixin that trains a LightningModule towards low curvature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_lcnn.callbacks.base import (
    as_penalties,
    is_lightning_default,
    is_training,
    penalised_step,
    sum_penalties,
    trainer_of,
)
from lightning_lcnn.callbacks.batch import batch_input_and_target
from lightning_lcnn.callbacks.power_iteration import PowerIteration
from lightning_lcnn.penalties import CurvaturePenalty, Penalty


class LCNNMixin:
    r"""Add curvature penalties to the loss of your own ``training_step``.

    .. math:: \text{loss} = \text{your loss} + \sum_i λ_i \, \mathrm{penalty}_i(\text{model})

    Put it before the Lightning class: ``class Classifier(LCNNMixin, LightningModule)``. Every ``training_step`` that a
    subclass defines or inherits is wrapped when the class is created, so the penalties enter exactly once, through
    ``super()`` calls too. A returned tensor, or the ``"loss"`` of a returned dict (which is copied), has them added;
    None passes. Under manual optimisation nothing is added: add :meth:`curvature_penalty` to your loss. Outside
    training, for instance when ``validation_step`` calls ``training_step``, nothing is added either.

    The penalties' parts are logged under ``lcnn/...`` on the trainer's logging steps. A :class:`PowerIteration`
    callback is attached unless the trainer has one.

    Raises:
        TypeError: At class creation, if the mixin comes after ``LightningModule`` in the bases.

    Source:
        LCNN (Srinivas et al., 2022) for the penalties; the wrapping is ours.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> from lightning_lcnn.layers import CenteredSoftplus, SpectralLinear
        >>> class Classifier(LCNNMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Sequential(SpectralLinear(4, 8), CenteredSoftplus(), SpectralLinear(8, 2))
        ...     def configure_penalties(self):
        ...         return [CurvaturePenalty(weight=0.1)]
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        >>> batch = torch.ones(2, 4), torch.tensor([0, 1])
        >>> model = Classifier()
        >>> loss = torch.nn.functional.cross_entropy(model.net(batch[0]), batch[1])
        >>> bool(torch.isclose(model.training_step(batch, 0) - loss, model.curvature_penalty()))
        True
    """

    _lcnn_penalties: list[Penalty] | None = None
    _lcnn_in_step: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # The user's class comes before this one in the MRO, so a training_step defined here would never run, and
        # Lightning has no hook that may replace the loss between step and backward: with one, this may go. Wrapped on
        # the class and not on the instance, the step is there in spawned processes, copies and compiled modules.
        super().__init_subclass__(**kwargs)
        _check_base_order(cls)
        _wrap_training_step(cls)
        _wrap_configure_callbacks(cls)

    def configure_penalties(self) -> list[Penalty]:
        """Penalties to add, built anew for each run; override it as you do ``configure_optimizers``.

        Returns:
            List of penalties, ``[CurvaturePenalty()]`` by default.
        """
        return [CurvaturePenalty()]

    def penalty_inputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Input and target for penalties that need the batch; override it for batches of another form.

        Args:
            batch: What ``training_step`` got.

        Returns:
            Input (B, ...) and target, by default the first two items, or the values under usual keys.

        Raises:
            ValueError: If they are not found.
        """
        return batch_input_and_target(batch)

    def curvature_penalty(self, batch: Any = None) -> Tensor:
        """Sum of the weighted penalties as a 0-d tensor with a graph, for manual optimisation and own loops.

        Args:
            batch: The batch; only penalties that differentiate at the data need it.

        Returns:
            0-d tensor.
        """
        inputs = functools.partial(self.penalty_inputs, batch)
        return sum_penalties(self, self._penalties_of_this_run(), inputs, logs=self._lcnn_in_step)

    @torch.compiler.disable
    def _penalties_of_this_run(self) -> list[Penalty]:
        if self._lcnn_penalties is None:
            self._lcnn_penalties = as_penalties(self.configure_penalties())
        return self._lcnn_penalties

    def configure_callbacks(self) -> Any:
        """Callbacks of the next base in the MRO and, unless there is one, a :class:`PowerIteration`."""
        inherited = getattr(super(), "configure_callbacks", list)
        return _with_power_iteration(self, inherited())


def _check_base_order(cls: type) -> None:
    for base in cls.__mro__[: cls.__mro__.index(LCNNMixin)]:
        if is_lightning_default(base):
            raise TypeError(
                f"LCNNMixin must come before the Lightning class in the bases of {cls.__name__}, got "
                f"({', '.join(b.__name__ for b in cls.__bases__)}); write class {cls.__name__}(LCNNMixin, ...)."
            )


def _wrap_training_step(cls: Any) -> None:
    step = cls.__dict__.get("training_step") or _inherited_step(cls)
    if step is not None:
        cls.training_step = _penalised(step)


def _inherited_step(cls: type) -> Callable[..., Any] | None:
    """A step that calls the one inherited from a base without the mixin; None where there is no such base."""
    inherited = getattr(cls, "training_step", None)
    if inherited is None or is_lightning_default(inherited) or hasattr(inherited, "is_lcnn_wrapper"):
        return None

    @functools.wraps(inherited, updated=())
    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        following: Any = super(cls, self)
        return following.training_step(*args, **kwargs)

    return training_step


def _penalised(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an unbound step. Lightning follows ``__wrapped__`` once and reads the signature there.

    Other attributes are not copied: those that ``torch.compile`` leaves on a decorated step lead around the wrapper.
    """

    @functools.wraps(step, updated=())
    def training_step(self: LCNNMixin, *args: Any, **kwargs: Any) -> Any:
        if self._lcnn_in_step or not is_training(self):
            return step(self, *args, **kwargs)

        def own_step() -> Any:
            self._lcnn_in_step = True
            try:
                return step(self, *args, **kwargs)
            finally:
                self._lcnn_in_step = False

        if not getattr(self, "automatic_optimization", True):
            return own_step()  # which asks for the penalties itself, and they are logged as parts of this step
        batch = args[0] if args else next(iter(kwargs.values()), None)
        return penalised_step(self, self._penalties_of_this_run(), own_step, lambda: self.penalty_inputs(batch))

    wrapper: Any = training_step
    wrapper.__wrapped__ = inspect.unwrap(step)
    wrapper.is_lcnn_wrapper = True
    return wrapper


def _wrap_configure_callbacks(cls: Any) -> None:
    """Users' ``configure_callbacks`` seldom call ``super()``."""
    own = cls.__dict__.get("configure_callbacks")
    if own is None:
        return

    @functools.wraps(own)
    def configure_callbacks(self: LCNNMixin) -> Any:
        return _with_power_iteration(self, own(self))

    cls.configure_callbacks = configure_callbacks


def _with_power_iteration(module: LCNNMixin, callbacks: Any) -> list[Any]:
    """Add the callback if neither the module nor the trainer has one: Lightning would replace the user's.

    This is the first hook of every run, so the penalties of the last run end here.
    """
    module._lcnn_penalties = None
    module._lcnn_in_step = False  # there from the first step on, or a compiled step would be compiled twice
    callbacks = [] if callbacks is None else callbacks
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    present = [*callbacks, *getattr(trainer_of(module), "callbacks", [])]
    if any(isinstance(callback, PowerIteration) for callback in present):
        return callbacks
    return [*callbacks, PowerIteration()]
