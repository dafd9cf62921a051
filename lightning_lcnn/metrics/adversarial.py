"""Accuracy under attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.plot import plot_curve

from lightning_lcnn._checks import check_choice, check_int, check_positive
from lightning_lcnn.functional.input_function import Adapter, check_inputs, check_logits, check_model, logits_of, unwrap
from lightning_lcnn.kernels.preserved_state import measuring
from lightning_lcnn.metrics.attacks import (
    NORMS,
    AttackOutcome,
    PixelModel,
    attack_examples,
    checked_normalization,
    mean_and_std,
    pixels_of,
    resolve_attack,
)
from lightning_lcnn.metrics.base import MeasuringMetric


class AdversarialAccuracy(MeasuringMetric):
    """Share of examples that are classified right and stay so under attack.

    Counts x with argmax f(x) = argmax f(x_adv) = target, ‖x_adv - x‖ <= radius

    An upper estimate of the true robust accuracy: a stronger attack may break more. Only examples that are still right
    are attacked, in order of growing radius, so the accuracy never rises with the radius. The user's model keeps its
    modes, gradients and hooks, and the global random state stays. An attack of foolbox::

        def attack(model, x, target, radius):
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
            return foolbox.attacks.L2PGD(steps=20)(wrapped, x, target, epsilons=radius)[1]

        AdversarialAccuracy(radius=0.25, attack=attack)

    Args:
        radius: of the perturbation in ``norm``, in the units of ``bounds``; several give the curve over the radius.
            None for an attack that brings its own: its perturbations are measured and not limited.
        attack: None for projected gradient descent on the margin; the name of a torchattacks class (``"PGDL2"``); a
            class; a factory ``f(model)`` or ``f(model, radius)`` of instances; or any ``f(model, x, target)`` that
            returns the adversarial inputs and may take ``radius``.
        norm: ``"l2"``, ``"linf"`` or ``"l1"`` (the default attack knows the first two).
        attack_kwargs: further arguments of the attack class, or of `functional.projected_gradient_attack`.
        radius_argument: name under which an attack class takes the radius (``"eps"`` in torchattacks), or None.
        over_budget: ``"raise"`` where a perturbation exceeds the radius, or ``"ignore"`` to count the example as not
            fooled (for attacks that seek the least perturbation).
        normalization: (mean, std) per channel of inputs that were normalised; the attack then sees pixels.
        bounds: range of the (un-normalised) inputs; inputs outside are refused. None for no limits.
        full: ``compute`` returns a dictionary with clean accuracy, robust accuracy, and the mean and greatest norm of
            the perturbations at each radius.
        adapter: picks the logits out of what the model returns.
        seed: of the random state inside the attack.
        max_examples: examples per epoch and process.
        kwargs: of `torchmetrics.Metric`.

    Returns:
        The robust accuracy, a scalar, or (R,) for several radii in growing order; a dictionary for ``full``.

    Raises:
        ImportError: where torchattacks is needed and missing, naming the extra.
        RuntimeError: where the attack raises, with its message; nothing is left changed.
        ValueError: for inputs outside ``bounds``, an exceeded budget, and all that `functional.measure` refuses.

    Source: ours.

    Example:
        >>> metric = AdversarialAccuracy(radius=[0.1, 0.3])
        >>> metric.update(torch.nn.Identity(), torch.tensor([[0.5, 0.2], [0.4, 0.6]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([1., 0.])
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    clean_correct: Tensor
    robust_correct: Tensor
    num_attacked: Tensor
    perturbation_sum: Tensor
    perturbation_max: Tensor

    def __init__(
        self,
        radius: float | Sequence[float] | None = None,
        attack: Any = None,
        norm: str = "l2",
        *,
        attack_kwargs: Mapping[str, Any] | None = None,
        radius_argument: str | None = "eps",
        over_budget: str = "raise",
        normalization: tuple[Sequence[float], Sequence[float]] | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        full: bool = False,
        adapter: Adapter | None = None,
        seed: int = 0,
        max_examples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_examples, **kwargs)
        if radius is None and attack is None:
            raise ValueError("`radius` must be given for the built-in attack; only one of your own may bring it.")
        radii = [radius] if isinstance(radius, int | float) else list([math.inf] if radius is None else radius)
        for value in radii if radius is not None else ():
            check_positive("radius", value)
        if not radii:
            raise ValueError("`radius` must name at least one radius, got none.")
        check_choice("norm", norm, NORMS)
        check_choice("over_budget", over_budget, ("raise", "ignore"))
        check_int("seed", seed, minimum=0)
        radius_argument = None if radius is None else radius_argument
        resolve_attack(attack, attack_kwargs or {}, radius_argument, norm, bounds)
        self.radii = sorted(float(value) for value in radii)
        self.scalar = radius is None or isinstance(radius, int | float)
        self.attack = attack
        self.norm = norm
        self.attack_kwargs = dict(attack_kwargs or {})
        self.radius_argument = radius_argument
        self.over_budget = over_budget
        self.normalization = checked_normalization(normalization)
        self.bounds = bounds
        self.full = full
        self.adapter = adapter
        self.seed = seed
        shape = (len(self.radii),)
        self._add_counter("clean_correct")
        self._add_counter("robust_correct", shape)
        self._add_counter("num_attacked", shape)
        self._add_float("perturbation_sum", shape)
        self._add_float("perturbation_max", shape, dist_reduce_fx="max")

    def _accumulate(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> None:
        outcome = self._attack(model, x, target)
        device = self.num_examples.device
        distances = self._as_state(outcome.distances)
        self.clean_correct = self.clean_correct + outcome.correct.sum().to(device)
        self.robust_correct = self.robust_correct + outcome.robust.sum(1).to(device)
        self.num_attacked = self.num_attacked + outcome.attacked.sum(1).to(device)
        self.perturbation_sum = self.perturbation_sum + distances.sum(1)
        self.perturbation_max = torch.maximum(self.perturbation_max, distances.amax(1))

    def _attack(self, model: Callable[[Tensor], Any], x: Tensor, target: Tensor) -> AttackOutcome:
        check_inputs(x, target)
        model = unwrap(model)
        check_model(model)
        attack = resolve_attack(self.attack, self.attack_kwargs, self.radius_argument, self.norm, self.bounds)
        with measuring(model, x, seed=self.seed, autocast=True):
            x, target = x.detach().clone(), target.clone()
            mean, std = mean_and_std(self.normalization, x)
            network = PixelModel(model, self.adapter, mean, std, x.dtype)
            pixels = pixels_of(x, mean, std, self.bounds)
            with torch.no_grad():
                logits = logits_of(model, x, self.adapter)
                check_logits(logits, target)
            correct = logits.argmax(1) == target
            refuse = self.over_budget == "raise"
            return attack_examples(network, attack, pixels, target, correct, self.radii, self.norm, self.bounds, refuse)

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return robust accuracy, or everything for ``full``; NaN where no example was measured."""
        robust = self.robust_correct / self.num_examples
        if not self.full:
            return robust[0] if self.scalar else robust
        result = {"clean_accuracy": self.clean_correct / self.num_examples}
        # a radius at which nobody was left to attack has no mean
        mean = self.perturbation_sum / self.num_attacked
        for i, radius in enumerate(self.radii):
            suffix = "" if self.scalar else f"_{radius:g}"
            result[f"robust_accuracy{suffix}"] = robust[i]
            result[f"mean_perturbation{suffix}"] = mean[i]
            result[f"max_perturbation{suffix}"] = self.perturbation_max[i]
        return result

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the accuracy, its course over several results, or its curve over the radii.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of such results; computed by default.
            ax: matplotlib axes.

        Returns:
            Figure and axes.
        """
        val = self.compute() if val is None else val
        if self.scalar or not isinstance(val, Tensor | dict):
            return self._plot(val, ax)
        if isinstance(val, dict):
            val = torch.stack([val[f"robust_accuracy_{radius:g}"] for radius in self.radii])
        names = (f"{self.norm} radius", "robust accuracy")
        radii = torch.tensor(self.radii)
        return plot_curve((radii, val, radii), ax=ax, label_names=names)
