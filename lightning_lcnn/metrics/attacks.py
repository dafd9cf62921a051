"""Attacks of any kind behind one calling form, in the units of the pixels."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice, import_extra
from lightning_lcnn.functional.input_function import Adapter, logits_of
from lightning_lcnn.functional.projected_gradient import projected_gradient_attack
from lightning_lcnn.kernels.preserved_state import preserved_model_state

Normalization = tuple[Sequence[float], Sequence[float]]
Attack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]  # (model, x, target, radius) -> adversarial x
NORMS = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}
# Rounding of x + δ, relative to the radius; a real violation is far larger.
_TOLERANCE = 1e-3


def resolve_attack(
    attack: Any,
    attack_kwargs: Mapping[str, Any],
    radius_argument: str | None,
    norm: str,
    bounds: tuple[float, float] | None,
) -> Attack:
    """Bring an attack of any kind into the form (model, x, target, radius) -> adversarial x.

    Args:
        attack: None (projected gradient descent), the name of a torchattacks class, a class that is built with
            (model, …) and called with (x, target), a factory ``f(model)`` or ``f(model, radius)`` of such instances, or
            a function ``f(model, x, target)``, which may also take ``radius``.
        attack_kwargs: further arguments of the class or of the default attack.
        radius_argument: name under which a class takes the radius, None if it has none.
        norm: of the perturbation.
        bounds: of the inputs.

    Returns:
        The function.

    Raises:
        TypeError: if the attack is a ready instance (it holds a model and a device) or has no known form.
        ValueError: if torchattacks has no such class, or ``bounds`` are not its [0, 1].
        ImportError: if torchattacks is not installed.

    Source: ours.

    Example:
        >>> attack = resolve_attack(lambda model, x, target: x, {}, None, "l2", None)
        >>> attack(torch.nn.Identity(), torch.ones(1, 2), torch.tensor([0]), 0.1)
        tensor([[1., 1.]])
    """
    if attack is None:
        check_choice("norm", norm, ("l2", "linf"))
        return functools.partial(_default_attack, norm=norm, bounds=bounds, options=dict(attack_kwargs))
    if isinstance(attack, str):
        attack = _torchattacks_class(attack)
    is_class = isinstance(getattr(attack, "func", attack), type)
    if is_class and getattr(attack, "func", attack).__module__.startswith("torchattacks") and bounds != (0, 1):
        raise ValueError(
            f"torchattacks clamps to [0, 1], got `bounds` = {bounds}; rescale the inputs or pass normalization."
        )
    if is_class:
        return functools.partial(_build_and_call, attack, radius_argument, dict(attack_kwargs))
    if attack_kwargs:
        raise TypeError("`attack_kwargs` belong to an attack class; bind those of a function with functools.partial.")
    return _from_callable(attack)


def _default_attack(
    model: nn.Module, x: Tensor, target: Tensor, radius: float, *, norm: str, bounds: Any, options: dict[str, Any]
) -> Tensor:
    return projected_gradient_attack(model, x, target, radius, norm, bounds=bounds, **options)


def _torchattacks_class(name: str) -> type:
    library = import_extra("torchattacks", "attacks")
    found = getattr(library, name, None)
    if not isinstance(found, type):
        known = sorted(key for key, value in vars(library).items() if isinstance(value, type))
        raise ValueError(f"`attack` must name a class of torchattacks, got {name!r}; it has {', '.join(known)}.")
    return found


def _build_and_call(
    cls: Any,
    radius_argument: str | None,
    options: dict[str, Any],
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    radius: float,
) -> Tensor:
    known = inspect.signature(cls).parameters
    if "seed" in known and known["seed"].default is None:  # AutoAttack would take the time
        options = {"seed": int(torch.randint(2**31, ()))} | options
    if radius_argument is not None:
        if radius_argument not in known:
            raise TypeError(
                f"{getattr(cls, '__name__', cls)} takes no argument {radius_argument!r}; name the one that holds the "
                "radius in `radius_argument`, or, for an attack without a radius, pass radius_argument=None and "
                "over_budget='ignore'."
            )
        options = options | {radius_argument: radius}
    return _call(cls(model, **options), x, target)


def _call(instance: Any, x: Tensor, target: Tensor) -> Tensor:
    if hasattr(instance, "set_device"):  # torchattacks takes that of the model's first parameter
        instance.set_device(x.device)
    return instance(x, target)


def _from_callable(attack: Any) -> Attack:
    """Tell by the number of required arguments what a callable is."""
    if not callable(attack):
        raise TypeError(f"`attack` must be None, a name, a class or a callable, got {type(attack).__name__}.")
    if hasattr(attack, "get_logits") and hasattr(attack, "model"):
        raise TypeError(
            f"`attack` is an instance of {type(attack).__name__}, which holds a model and a device; pass the class, or "
            "a factory such as lambda model: torchattacks.PGDL2(model, eps=0.1)."
        )
    parameters = inspect.signature(attack).parameters
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is p.empty for p in parameters.values())
    forms: dict[int, Callable[..., Tensor]] = {
        1: lambda model, x, target, radius: _call(attack(model), x, target),
        2: lambda model, x, target, radius: _call(attack(model, *_needed(radius)), x, target),
        3: lambda model, x, target, radius: attack(model, x, target),
        4: lambda model, x, target, radius: attack(model, x, target, *_needed(radius)),
    }
    if required == 3 and "radius" in parameters:
        return lambda model, x, target, radius: attack(model, x, target, **_finite(radius))
    if required not in forms:
        raise TypeError(
            "`attack` must take (model), (model, radius), (model, x, target) or (model, x, target, radius), got "
            f"{inspect.signature(attack)}."
        )
    return forms[required]


def _finite(radius: float) -> dict[str, float]:
    """The radius as an argument, or nothing where the metric has none."""
    return {"radius": radius} if math.isfinite(radius) else {}


def _needed(radius: float) -> tuple[float]:
    if not math.isfinite(radius):
        raise ValueError("the attack takes a radius: pass `radius` to AdversarialAccuracy")
    return (radius,)


@dataclass(frozen=True, eq=False)
class AttackOutcome:
    """What R attacks of growing radius did to B examples."""

    correct: Tensor  # (B,) of bool, before any attack
    robust: Tensor  # (R, B) of bool, right before and after all attacks up to this radius
    attacked: Tensor  # (R, B) of bool, still right before this attack
    distances: Tensor  # (R, B) norms of the perturbations, 0 where not attacked


def attack_examples(
    network: PixelModel,
    attack: Attack,
    pixels: Tensor,
    target: Tensor,
    correct: Tensor,
    radii: Sequence[float],
    norm: str,
    bounds: tuple[float, float] | None,
    refuse_over_budget: bool,
) -> AttackOutcome:
    """Attack the examples that are still right, radius by radius in growing order.

    A successful perturbation also lies within every greater radius, so the curve never rises.
    """
    alive, robust, attacked, distances = correct, [], [], []
    for radius in radii:
        distance = pixels.new_zeros(len(pixels))
        attacked.append(alive)
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            adversarial = run_attack(network, attack, pixels[rows], target[rows], radius)
            distance[rows] = perturbation(adversarial, pixels[rows], radius, norm, bounds, refuse_over_budget)
            with torch.no_grad():
                fooled = network(adversarial).argmax(1) != target[rows]
            alive = alive.index_put((rows,), ~(fooled & (distance[rows] <= radius * (1 + _TOLERANCE))))
        robust.append(alive)
        distances.append(distance)
    return AttackOutcome(correct, torch.stack(robust), torch.stack(attacked), torch.stack(distances))


def run_attack(network: PixelModel, attack: Attack, pixels: Tensor, target: Tensor, radius: float) -> Tensor:
    """Adversarial pixels (B, …), detached, finite and of the right shape; the model's state is left as it was."""
    # an attack may leave frozen batch norm in training mode, which would change the predictions that follow
    with preserved_model_state(network):
        try:
            adversarial: Any = attack(network, pixels.clone(), target.clone(), radius)
        except Exception as error:
            raise RuntimeError(
                f"the attack failed on {len(pixels)} examples at radius {radius:g}: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(adversarial, Tensor) or adversarial.shape != pixels.shape:
        got = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise ValueError(f"the attack must return inputs of shape {tuple(pixels.shape)}, got {got}.")
    adversarial = adversarial.detach().to(pixels)
    if not bool(adversarial.isfinite().all()):
        raise ValueError(f"the attack returned NaN or infinity at radius {radius:g}.")
    return adversarial


def perturbation(
    adversarial: Tensor,
    pixels: Tensor,
    radius: float,
    norm: str,
    bounds: tuple[float, float] | None,
    refuse_over_budget: bool,
) -> Tensor:
    """Norms (B,) of what an attack has changed; an error where it left the bounds or, if refused, the ball."""
    _check_range(adversarial, bounds)
    distance = torch.linalg.vector_norm((adversarial - pixels).flatten(1), NORMS[norm], dim=1)
    _check_budget(distance, radius, norm, refuse_over_budget)
    return distance


def _check_range(inputs: Tensor, bounds: tuple[float, float] | None) -> None:
    if bounds is not None and (inputs.min() < bounds[0] - _TOLERANCE or inputs.max() > bounds[1] + _TOLERANCE):
        raise ValueError(f"the attack left the allowed range {list(bounds)}: [{inputs.min():.4g}, {inputs.max():.4g}].")


def _check_budget(distance: Tensor, radius: float, norm: str, refuse: bool) -> None:
    largest = float(distance.max())
    if refuse and largest > radius * (1 + _TOLERANCE):
        raise ValueError(
            f"the attack exceeded its budget: a perturbation of {norm} norm {largest:.4g} at radius {radius:g}. "
            "Check `norm` and the attack's own radius, or pass over_budget='ignore' to count such examples as not "
            "fooled."
        )


class PixelModel(nn.Module):
    """The user's model behind its adapter, normalisation and precision: an attack sees float32 pixels and logits."""

    def __init__(
        self, model: Any, adapter: Adapter | None, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.mean, self.std, self.dtype = model, adapter, mean, std, dtype
        self.training = getattr(model, "training", False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K)."""
        x = pixels if self.mean is None or self.std is None else (pixels - self.mean) / self.std
        return logits_of(self.model, x.to(self.dtype), self.adapter)


def checked_normalization(normalization: Normalization | None) -> tuple[list[float], list[float]] | None:
    """Mean and std per channel as lists; an error unless they fit each other and every std is positive."""
    if normalization is None:
        return None
    mean, std = (torch.as_tensor(values, dtype=torch.float64).flatten().tolist() for values in normalization)
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(f"`normalization` must be (mean, std) of equal length with std > 0, got {normalization}.")
    return mean, std


def mean_and_std(normalization: Normalization | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Mean and std (1, C, 1, …) for inputs (B, C, …), or None twice."""
    if normalization is None:
        return None, None
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, std = (torch.tensor(values, device=x.device, dtype=torch.float32).view(shape) for values in normalization)
    if mean.shape[1] not in (1, x.shape[1]):
        raise ValueError(f"`normalization` has {mean.shape[1]} channels, the inputs have {x.shape[1]}.")
    return mean, std


def pixels_of(x: Tensor, mean: Tensor | None, std: Tensor | None, bounds: tuple[float, float] | None) -> Tensor:
    """Un-normalised inputs in at least float32, within the bounds; an error if that takes more than rounding."""
    x = x if x.dtype == torch.float64 else x.float()
    pixels = x if mean is None or std is None else x * std + mean
    if bounds is None:
        return pixels
    low, high = bounds
    rounding = 1e-3 * (high - low)
    if pixels.min() < low - rounding or pixels.max() > high + rounding:
        raise ValueError(
            f"inputs must lie in [{low:g}, {high:g}], got [{pixels.min():.4g}, {pixels.max():.4g}]; pass "
            "normalization=(mean, std) if they were normalised, other bounds, or bounds=None for no limits."
        )
    return pixels.clamp(low, high)
