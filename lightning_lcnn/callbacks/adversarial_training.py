"""Train on adversarial examples."""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lcnn._checks import check_choice, check_int, check_positive
from lightning_lcnn._compat import logs_now
from lightning_lcnn.callbacks.base import Callback, check_strategy, phase
from lightning_lcnn.callbacks.batch import batch_input_and_target, replace_batch_input
from lightning_lcnn.functional.input_function import Adapter, check_inputs
from lightning_lcnn.kernels.preserved_state import measuring
from lightning_lcnn.metrics.attacks import (
    NORMS,
    Normalization,
    PixelModel,
    checked_normalization,
    mean_and_std,
    perturbation,
    pixels_of,
    resolve_attack,
    run_attack,
)
from lightning_lcnn.penalties import Schedule, network_of
from lightning_lcnn.penalties.curvature import defines_forward, trained_children

_NUM_STEPS = 3


class AdversarialTraining(Callback):
    r"""Give ``training_step`` batches whose inputs an attack has changed.

    .. math:: \min_θ \; \mathbb{E} \max_{\|δ\| \le r} \ell(f_θ(x + δ), y)

    For the length of a fit the ``training_step`` of the instance is replaced by one that attacks the batch first. What
    lies inside it sees the adversarial batch: your step, :class:`~lightning_lcnn.LCNNMixin` and
    :class:`PenaltyCallback`. Other callbacks, validation and test see the batch as it was. The batch of the loader is
    copied, not changed, and keeps its type.

    The built-in attack raises the cross-entropy by projected gradient steps from a random start and returns the last
    iterate (Madry et al., 2018): it is the loss that is trained, and the usual choice of others, so that results
    compare. It costs ``num_steps`` forward and backward passes more per step.

    The attack sees the network in evaluation mode, without DDP around it: running statistics, gradients, modes, hooks
    and the global random state stay, and it adds no communication. Its own random numbers follow from ``seed``, the
    process and the number of the batch, so they differ between processes, and a resumed fit goes on with them.

    Args:
        radius: Largest norm of the perturbation, in the units of ``bounds``.
        attack: None or ``"pgd"`` for the built-in attack, or any other that
            :class:`~lightning_lcnn.metrics.AdversarialAccuracy` takes: the name or class of a torchattacks attack, a
            factory ``f(model)`` or ``f(model, radius)``, or ``f(model, x, target)``, which may also take ``radius``.
        norm: ``"l2"``, ``"linf"``, or ``"l1"`` (which the built-in attack does not know).
        num_steps: Steps of the built-in attack, of size 2.5 radius / steps; 3 by default.
        attack_kwargs: Further arguments of the attack class, or of
            :func:`~lightning_lcnn.functional.projected_gradient_attack`.
        radius_argument: Name under which an attack class takes the radius.
        fraction: Part of each batch to attack: its first ⌈fraction · B⌉ examples.
        schedule: Of the radius. None: constant. An integer n: grows linearly over the first n optimizer steps. A
            callable: maps the optimizer step (0, 1, ...) to a factor in [0, 1]; where it is 0 the batch stays.
        normalization: (mean, std) per channel of inputs that were normalised; the attack then sees pixels.
        bounds: Range of the (un-normalised) inputs; inputs outside are refused. None for no limits.
        adapter: Picks the logits out of what the network returns.
        submodule: Dotted name of the network in the module. None: the module's ``forward``, or, where it has none, its
            only child with low-curvature layers or else with parameters.
        seed: Of the random state inside the attack; None for the one given to ``seed_everything``.

    Raises:
        TypeError: If an argument or the targets have the wrong type.
        ValueError: If an argument is out of range; at the start of a fit, under FSDP1 and DeepSpeed ZeRO stage 3;
            during training, for batches without an input and class indices, for inputs outside ``bounds`` and for an
            attack that leaves its ball.
        RuntimeError: Where the attack fails, with its message; by Lightning, for two such callbacks in one trainer.
        ImportError: If torchattacks is needed and missing.

    Source:
        Madry et al. (2018).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = AdversarialTraining(radius=0.25, num_steps=3)
        >>> trainer = Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        radius: float,
        attack: Any = None,
        norm: str = "l2",
        *,
        num_steps: int | None = None,
        attack_kwargs: Mapping[str, Any] | None = None,
        radius_argument: str | None = "eps",
        fraction: float = 1.0,
        schedule: Schedule = None,
        normalization: Normalization | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        adapter: Adapter | None = None,
        submodule: str | None = None,
        seed: int | None = None,
    ) -> None:
        check_positive("radius", radius)
        check_choice("norm", norm, NORMS)
        check_positive("fraction", fraction)
        if fraction > 1:
            raise ValueError(f"`fraction` must lie in (0, 1], got {fraction}.")
        if schedule is not None and not callable(schedule):
            check_int("schedule", schedule)
        if seed is not None:
            check_int("seed", seed, minimum=0)
        self.radius = radius
        self.attack = None if attack == "pgd" else attack
        self.norm = norm
        self.attack_kwargs = _attack_arguments(self.attack, num_steps, attack_kwargs)
        self.radius_argument = radius_argument
        self.fraction = fraction
        self.schedule = schedule
        self.normalization = checked_normalization(normalization)
        self.bounds = bounds
        self.adapter = adapter
        self.submodule = submodule
        self.seed = seed
        self._resolved()
        self._batches = 0  # started in this fit, before and after an interruption
        self._fit_seed = 0
        self._step: Any = None  # ours, while it is in place
        self._replaced: Any = None  # the instance's own before

    def _resolved(self) -> Any:
        return resolve_attack(self.attack, self.attack_kwargs, self.radius_argument, self.norm, self.bounds)

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        check_strategy(trainer.strategy)
        self._batches = 0

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Replace the instance's ``training_step``, after the callbacks that do so in their ``setup``."""
        self._fit_seed = torch.initial_seed() if self.seed is None else self.seed
        # Patched, because on_train_batch_start may look at a batch but not replace it, and on_after_batch_transfer is
        # the user's and runs for validation too. Undone as PenaltyCallback undoes its own, in the reverse order. May go
        # when a hook of callbacks can replace the batch.
        step = pl_module.training_step

        @functools.wraps(step, updated=())
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if not (trainer.training and torch.is_grad_enabled()):
                return step(*args, **kwargs)
            if args:
                return step(self._adversarial(trainer, pl_module, args[0]), *args[1:], **kwargs)
            (name, batch), *others = kwargs.items()
            return step(**{name: self._adversarial(trainer, pl_module, batch), **dict(others)})

        training_step.__wrapped__ = inspect.unwrap(step)  # Lightning reads the signature there
        self._step, self._replaced = training_step, pl_module.__dict__.get("training_step")
        pl_module.training_step = training_step

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count the batches; an optimizer that calls the step several times attacks with the same random numbers."""
        self._batches += 1

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the instance its ``training_step`` back, before other callbacks do so in their ``teardown``."""
        if self._step is not None and pl_module.__dict__.get("training_step") is self._step:
            if self._replaced is None:
                del pl_module.training_step
            else:
                pl_module.training_step = self._replaced
        self._step = self._replaced = None

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the instance its ``training_step`` back."""
        self.on_fit_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Number of batches, from which the random numbers follow."""
        return {"batches": self._batches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same random numbers."""
        self._batches = state_dict["batches"]

    def _adversarial(self, trainer: Any, pl_module: Any, batch: Any) -> Any:
        """The batch with adversarial inputs."""
        radius = self._radius_at(trainer.global_step)
        if radius == 0:
            return batch
        x, target = getattr(pl_module, "penalty_inputs", batch_input_and_target)(batch)
        count = math.ceil(self.fraction * len(x))
        seed = random.Random(f"{self._fit_seed} {trainer.global_rank} {self._batches}").getrandbits(32)
        with phase(trainer, "attack"), measuring(pl_module, x, seed=seed, autocast=True):
            pl_module.eval()
            attacked = self._attacked(self._network(pl_module), x[:count].detach(), target[:count], radius)
        if self.schedule is not None and logs_now(trainer):
            pl_module.log("adversarial/radius", radius)
        # joining an empty rest would lose the memory format
        return replace_batch_input(batch, torch.cat([attacked, x[count:]]) if count < len(x) else attacked, x)

    def _attacked(self, network: nn.Module, x: Tensor, target: Tensor, radius: float) -> Tensor:
        check_inputs(x, target)
        _check_target(target)
        mean, std = mean_and_std(self.normalization, x)
        pixels = pixels_of(x, mean, std, self.bounds)
        model = PixelModel(network, self.adapter, mean, std, x.dtype)
        adversarial = run_attack(model, self._resolved(), pixels, target, radius)
        perturbation(adversarial, pixels, radius, self.norm, self.bounds, refuse_over_budget=True)
        return (adversarial if mean is None or std is None else (adversarial - mean) / std).to(x.dtype)

    def _radius_at(self, step: int) -> float:
        if self.schedule is None:
            return self.radius
        if callable(self.schedule):
            return self.radius * float(self.schedule(step))
        return self.radius * min(1.0, (step + 1) / self.schedule)

    def _network(self, pl_module: Any) -> nn.Module:
        if self.submodule is not None:
            return pl_module.get_submodule(self.submodule)
        network = network_of(pl_module)
        if defines_forward(network):
            return network
        raise ValueError(
            f"{type(pl_module).__name__} has no `forward` and {len(trained_children(network))} children with "
            "parameters: define `forward(self, x)`, or name the network in AdversarialTraining(submodule='<name>')."
        )


def _attack_arguments(attack: Any, num_steps: int | None, attack_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the attack, with those of training where it is the built-in one."""
    given = dict(attack_kwargs or {})
    if attack is None:
        steps = {"num_steps": _NUM_STEPS if num_steps is None else num_steps}
        check_int("num_steps", steps["num_steps"])
        return {"objective": "loss", "random_start": True, "keep": "last"} | steps | given
    if num_steps is not None:
        raise ValueError(
            f"`num_steps` belongs to the built-in attack, got {num_steps} together with {attack!r}; give an attack "
            "class its own, such as attack_kwargs={'steps': 3}."
        )
    return given


def _check_target(target: Tensor) -> None:
    if target.ndim != 1 or target.dtype != torch.int64:
        raise TypeError(
            f"`target` must hold class indices, int64 of shape (B,), got {target.dtype} {tuple(target.shape)}: mix "
            "labels in `training_step`, after the attack."
        )
