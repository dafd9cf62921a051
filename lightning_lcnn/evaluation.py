"""All measures of a classifier on a set of images, as one record that can be written as JSON."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice, check_int
from lightning_lcnn.bounds import network_bound
from lightning_lcnn.conversion import to_low_curvature
from lightning_lcnn.conversion.tree import is_ours
from lightning_lcnn.functional import gradient_stability, input_gradient_norm, normalized_curvature
from lightning_lcnn.functional.input_function import check_logits
from lightning_lcnn.layers.upkeep import log_betas
from lightning_lcnn.metrics import AdversarialAccuracy
from lightning_lcnn.recording.run import record_run

Progress = Callable[[str, int, int], None]
Notes = dict[str, str]

SCHEMA = 1
STAND_IN_BETA = 1000.0
OUTPUTS = ("margin", "loss")
LISTED_CURVATURES = 256


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    name: str = "",
    examples: int = 256,
    attack_examples: int = 1000,
    stability_radii: Sequence[float] = (0.05, 0.1, 0.15),
    attack_radii: Sequence[float] = (0.05, 0.1, 0.15, 0.25),
    attack: Any = None,
    batch_size: int = 128,
    bound: str | None = "fast",
    progress: Progress | None = None,
) -> dict[str, Any]:
    r"""Accuracy, curvature, gradient stability, adversarial accuracy and certified bounds of one classifier.

    .. math:: C(x) = \|∇^2 f(x)\|_2 / \|∇ f(x)\|_2 \quad\text{for the margin and for the loss}

    Of the same images whatever the model: a permutation with a fixed seed, of which the first ``examples`` are measured
    and the first ``attack_examples`` attacked. A network with kinks (ReLU, max pooling) has no Hessian where it counts;
    its Hessian norm, curvature and gradient change are those of a stand-in, a copy in which every kink is a centered
    softplus of β = 1000. Everything else is measured on the network itself.

    Args:
        model: classifier in evaluation mode that maps images in [0, 1] to logits (B, K), normalisation included.
        images: (N, C, H, W), uint8 (then divided by 255) or floating point in [0, 1].
        labels: (N,) class indices.
        name: of the network, for tables and legends.
        examples: images for curvature and gradient change.
        attack_examples: images to attack.
        stability_radii: ℓ₂ norms of the random perturbations under which the gradient's change is measured.
        attack_radii: ℓ₂ radii of the attack.
        attack: as for :class:`~lightning_lcnn.metrics.AdversarialAccuracy`; None for projected gradient descent.
        batch_size: images at a time.
        bound: method of :func:`~lightning_lcnn.bounds.network_bound`, ``"fast"`` or ``"tight"``; None for no bound.
        progress: called as ``progress(what, done, total)`` after every batch.

    Returns:
        A dictionary of finite numbers, strings and None; docs/cli.md describes its keys. What has no finite value
        is None, and ``"notes"`` says why.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the model is in training mode, images leave [0, 1], labels do not fit, logits are not finite,
            or an argument is out of range.

    Source: the measures of LCNN (Srinivas et al., 2022); the record is ours.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 3)).eval()
        >>> record = evaluate(net, torch.rand(6, 1, 2, 2), torch.arange(6) % 3, examples=4, attack_radii=[0.1])
        >>> record["measured_examples"], record["stand_in_beta"], sorted(record["curvature"])
        (4, None, ['loss', 'margin'])
    """
    _check_arguments(model, images, labels, examples, attack_examples, batch_size, bound)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    batches = _Batches(model, images, labels, batch_size, progress or _silent)
    notes: Notes = {}
    smooth, beta = _stand_in(model, batches.example(), notes)
    measured, attacked = order[:examples], order[:attack_examples]
    return {
        "schema": SCHEMA,
        "name": name,
        "examples": len(labels),
        "measured_examples": len(measured),
        "attacked_examples": len(attacked),
        "stand_in_beta": beta,
        "accuracy": _accuracy(model, batches),
        **_certified(model, batches.example(), bound),
        **_derivatives(model, smooth, batches, measured, notes),
        "gradient_change": _gradient_change(smooth, batches, measured, stability_radii, notes),
        **_adversarial(model, batches, attacked, attack_radii, attack),
        "betas": {key.removesuffix(".log_beta"): value.exp().item() for key, value in log_betas(model).items()},
        "notes": notes,
    }


class _Batches:
    """Chosen images in batches on the model's device and in its precision, with a report of each one done."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, size: int, progress: Progress) -> None:
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        like = tensors[0] if tensors else torch.zeros(())
        self.device, self.dtype = like.device, like.dtype
        self.images, self.labels, self.size, self.progress = images, labels, size, progress

    def example(self) -> Tensor:
        """The first image as a batch."""
        return self._prepare(self.images[:1])

    def over(self, rows: Tensor, what: str) -> Any:
        """Yield (images, labels) of the rows."""
        done = 0
        for chunk in rows.split(self.size):
            yield self._prepare(self.images[chunk]), self.labels[chunk].to(self.device)
            done += len(chunk)
            self.progress(what, done, len(rows))

    def _prepare(self, images: Tensor) -> Tensor:
        scaled = images.to(self.device, self.dtype)
        return scaled / 255 if images.dtype == torch.uint8 else scaled


def _accuracy(model: nn.Module, batches: _Batches) -> float:
    correct = 0
    with torch.no_grad():
        for images, labels in batches.over(torch.arange(len(batches.labels)), "accuracy"):
            logits = model(images)
            check_logits(logits, labels)
            correct += int((logits.argmax(1) == labels).sum())
    return correct / len(batches.labels)


def _derivatives(model: nn.Module, smooth: nn.Module, batches: _Batches, rows: Tensor, notes: Notes) -> dict[str, Any]:
    """Gradient norm, Hessian norm and curvature of both outputs; one Lanczos run each gives all three."""
    columns: dict[str, dict[str, list[Tensor]]] = {
        key: {output: [] for output in OUTPUTS} for key in ("gradient_norm", "hessian_norm", "curvature", "converged")
    }
    hvp = _hvp(smooth, batches.example(), notes)
    for images, labels in batches.over(rows, "curvature"):
        for output in OUTPUTS:
            result = normalized_curvature(smooth, images, labels, output, hvp=hvp)
            own = result.gradient_norm
            if smooth is not model:
                own = input_gradient_norm(model, images, labels, output).values
            columns["gradient_norm"][output].append(own)
            columns["hessian_norm"][output].append(result.hessian.values)
            columns["curvature"][output].append(result.values)
            columns["converged"][output].append(result.hessian.converged.double())
    values = {key: {output: torch.cat(parts).double() for output, parts in c.items()} for key, c in columns.items()}
    means = {key: {o: _finite(v.mean(), v, f"{key}.{o}", notes) for o, v in c.items()} for key, c in values.items()}
    medians = {o: _finite(v.quantile(0.5), v, f"median_curvature.{o}", notes) for o, v in values["curvature"].items()}
    listed = [x if x < float("inf") else None for x in values["curvature"]["margin"][:LISTED_CURVATURES].tolist()]
    return {**means, "median_curvature": medians, "curvature_values": listed}


def _hvp(smooth: nn.Module, example: Tensor, notes: Notes) -> str:
    """Exact Hessian-vector products, or finite differences where an operation has no second derivative."""
    label = torch.zeros(1, dtype=torch.int64, device=example.device)
    try:
        normalized_curvature(smooth, example, label, num_hvps=1)
    except RuntimeError as error:
        if "finite_difference" not in str(error):
            raise
        notes["hessian_norm"] = "by finite differences of gradients: an operation has no second derivative"
        return "finite_difference"
    return "double_backward"


def _gradient_change(
    smooth: nn.Module, batches: _Batches, rows: Tensor, radii: Sequence[float], notes: Notes
) -> dict[str, float | None]:
    """Mean relative change of the margin's gradient under random perturbations of each norm."""
    found: dict[str, list[Tensor]] = {f"{radius:g}": [] for radius in radii}
    for images, labels in batches.over(rows, "gradient change"):
        for radius in radii:
            found[f"{radius:g}"].append(gradient_stability(smooth, images, labels, radius).values)
    values = {key: torch.cat(parts).double() for key, parts in found.items()}
    return {key: _finite(v.mean(), v, f"gradient_change.{key}", notes) for key, v in values.items()}


def _adversarial(
    model: nn.Module, batches: _Batches, rows: Tensor, radii: Sequence[float], attack: Any
) -> dict[str, dict[str, float]]:
    if not radii:
        return {"adversarial_accuracy": {}, "adversarial_standard_error": {}}
    metric = AdversarialAccuracy(list(radii), attack).to(batches.device)
    for images, labels in batches.over(rows, "attack"):
        metric.update(model, images, labels)
    accuracy: Any = metric.compute()
    counts = (accuracy.reshape(-1) * len(rows)).round().tolist()
    rates = {f"{radius:g}": count / len(rows) for radius, count in zip(metric.radii, counts, strict=True)}
    errors = {key: (rate * (1 - rate) / len(rows)) ** 0.5 for key, rate in rates.items()}
    return {"adversarial_accuracy": rates, "adversarial_standard_error": errors}


def _certified(model: nn.Module, example: Tensor, method: str | None) -> dict[str, Any]:
    """Bounds and their table; without them the reason."""
    nothing: dict[str, Any] = {"slope": None, "curvature": None}
    if method is None:
        return {"certified": {**nothing, "reason": "not asked for"}, "layers": []}
    try:
        bound = network_bound(model, example, method)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {"certified": {**nothing, "reason": str(error)}, "layers": []}
    certified = {"slope": _or_none(bound.slope), "curvature": _or_none(bound.curvature)}
    reason = "; ".join(bound.reasons[:3]) or ("" if None not in certified.values() else "larger than any number")
    if len(bound.reasons) > 3:
        reason += f"; and {len(bound.reasons) - 3} more"
    layers = [
        {
            "name": row.name,
            "kind": row.kind,
            "slope": _or_none(row.slope),
            "curvature": _or_none(row.curvature),
            "share": row.share,
        }
        for row in bound.layers
    ]
    return {"certified": {**certified, "reason": reason}, "layers": layers}


def _stand_in(model: nn.Module, example: Tensor, notes: Notes) -> tuple[nn.Module, float | None]:
    """The model, or if it has kinks a copy without them and its β."""
    kinks = [kink for kink in record_run(model, example).kinks if not is_ours(model.get_submodule(kink.owner))]
    if not kinks:
        return model, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of becomes a note
            smooth, report = to_low_curvature(
                model, example, beta=STAND_IN_BETA, max_pool="smooth", spectral=False, return_report=True
            )
    except ValueError as error:
        notes["stand_in"] = f"no smooth copy, so the Hessian leaves out the kinks: {error}"
        return model, None
    if report.kinks:
        left = ", ".join(f"{row.name} ({row.what})" for row in report.kinks)
        notes["stand_in"] = f"the Hessian leaves out the kinks of {left}"
    return smooth.eval(), STAND_IN_BETA


def _finite(reduced: Tensor, values: Tensor, key: str, notes: Notes) -> float | None:
    number = _or_none(reduced.item())
    if number is None:
        wrong = int((~values.isfinite()).sum())
        notes[key] = f"not finite for {wrong} of {len(values)} examples (a gradient that vanishes, or overflow)"
    return number


def _or_none(number: float) -> float | None:
    return number if abs(number) < float("inf") else None  # NaN fails the comparison too


def _silent(what: str, done: int, total: int) -> None:
    """No report."""


def _check_arguments(
    model: Any, images: Any, labels: Any, examples: int, attack_examples: int, batch_size: int, bound: str | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if model.training:
        raise ValueError("`model` must be in evaluation mode: call model.eval() first.")
    for argument, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{argument}` must be a tensor, got {type(tensor).__name__}.")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"`images` must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"`labels` must have shape ({len(images)},), one per image, got {tuple(labels.shape)}.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"`images` must be uint8 or floating point, got {images.dtype}.")
    low, high = float(images.min()), float(images.max())
    if images.is_floating_point() and not (low >= 0 and high <= 1):
        raise ValueError(
            f"`images` must lie in [0, 1], got [{low:.4g}, {high:.4g}]: put the normalisation into the model, so that "
            "radii are in units of pixels."
        )
    check_int("examples", examples)
    check_int("attack_examples", attack_examples)
    check_int("batch_size", batch_size)
    if bound is not None:
        check_choice("bound", bound, ("fast", "tight"))
