"""The methods: each is a network and a choice of penalties or callbacks on one and the same Lightning module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
from torch import Tensor, nn

from comparison.presets import Options, Preset
from lightning_lcnn import to_low_curvature
from lightning_lcnn.callbacks import AdversarialTraining
from lightning_lcnn.layers import CenteredSoftplus
from lightning_lcnn.penalties import CurePenalty, CurvaturePenalty, GradientNormPenalty, Penalty


@dataclass(frozen=True)
class Method:
    """How a network is made and trained; each function gets the hyper-parameters."""

    name: str
    network: Callable[[nn.Module, Tensor, Options], nn.Module] = lambda network, example, options: network
    penalties: Callable[[Options], list[Penalty]] = lambda options: []
    callbacks: Callable[[Options], list[L.Callback]] = lambda options: []
    defaults: Options = field(default_factory=dict)
    grid: tuple[Options, ...] = ({},)  # searched on the validation split
    start: str | None = None  # method whose trained network this one goes on from
    epochs: float = 1.0  # part of the preset's epochs

    def chosen(self, preset: Preset) -> Options:
        """Own defaults, and what the search on the validation split chose for this preset."""
        return {**self.defaults, **preset.options.get(self.name, {})}


class BetaDecay(Penalty):
    """λ/2 Σ β²: weight decay on β itself, one of the paper's baselines."""

    name = "beta_decay"

    def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        betas = [module.beta for module in model.modules() if isinstance(module, CenteredSoftplus)]
        return {self.name: sum(beta.square().sum() for beta in betas) / 2}


def softplus_network(beta: float, learnable: bool) -> Callable[[nn.Module, Tensor, Options], nn.Module]:
    """Replace ReLU alone; convolutions and batch norms stay ordinary."""

    def make(network: nn.Module, example: Tensor, options: Options) -> nn.Module:
        for module in network.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, name, CenteredSoftplus(beta, learnable=learnable))
        return network

    return make


def low_curvature(network: nn.Module, example: Tensor, options: Options) -> nn.Module:
    """What a user gets who says nothing, but for β where the search asks for it."""
    return to_low_curvature(network, example, **({"beta": options["beta"]} if "beta" in options else {}))


def curvature_penalty(options: Options) -> CurvaturePenalty:
    """The default unless the search asks for something else."""
    return CurvaturePenalty(**{key: options[key] for key in ("weight", "mode", "schedule") if key in options})


def gradient_penalty(options: Options) -> GradientNormPenalty:
    """Gradient norm of the loss, per example."""
    return GradientNormPenalty(options["gradient_weight"], mode=options.get("gradient_mode", "exact"))


def lcnn_penalties(options: Options) -> list[Penalty]:
    """Curvature alone."""
    return [curvature_penalty(options)]


def both_penalties(options: Options) -> list[Penalty]:
    """Curvature and gradient norm."""
    return [curvature_penalty(options), gradient_penalty(options)]


def adversarial(options: Options) -> list[L.Callback]:
    """Projected gradient descent of torchattacks, with the step of Madry et al. (2018)."""
    radius, steps, norm = float(options["radius"]), int(options["steps"]), str(options["norm"])
    attack = {"l2": "PGDL2", "linf": "PGD"}[norm]
    return [AdversarialTraining(radius, attack, norm, attack_kwargs={"alpha": 2.5 * radius / steps, "steps": steps})]


def _grid(key: str, *values: float | str, **fixed: float | str) -> tuple[Options, ...]:
    return tuple({key: value, **fixed} for value in values)


METHODS = {
    method.name: method
    for method in (
        Method("standard"),
        Method("standard-softplus", softplus_network(1000.0, learnable=False)),
        Method(
            "lcnn",
            low_curvature,
            lcnn_penalties,
            grid=(
                *_grid("weight", 1e-2, 3e-2, 1e-1, 3e-3, 0.0),
                *_grid("weight", 1e-2, 3e-2, mode="log_hessian"),
            ),
        ),
        Method(
            "lcnn-strong",  # the largest weight that cost no accuracy on the validation images of cifar10-small
            low_curvature,
            lcnn_penalties,
            defaults={"weight": 0.02},
        ),
        Method(
            "gradient-norm",
            penalties=lambda options: [gradient_penalty(options)],
            defaults={"gradient_weight": 0.01},
            grid=_grid("gradient_weight", 1e-3, 1e-2, 1e-1),
        ),
        Method(
            "lcnn+gradient-norm",
            low_curvature,
            both_penalties,
            defaults={"gradient_weight": 0.003},
            grid=_grid("gradient_weight", 3e-3, 1e-2, 3e-2),
        ),
        Method(
            "lcnn-strong+gradient-norm",
            low_curvature,
            both_penalties,
            defaults={"weight": 0.02, "gradient_weight": 0.003},
        ),
        Method(
            "lcnn+strong-gradient-norm",  # robustness before accuracy
            low_curvature,
            both_penalties,
            defaults={"gradient_weight": 0.01},
        ),
        Method(
            "cure",
            penalties=lambda options: [CurePenalty(options["cure_weight"], step_size=options["cure_step"])],
            defaults={"cure_weight": 0.01, "cure_step": 0.25},
            grid=_grid("cure_weight", 1e-3, 1e-2, 1e-1),
        ),
        Method(
            "softplus-decay",
            softplus_network(10.0, learnable=True),
            lambda options: [BetaDecay(options["decay"])],
            defaults={"decay": 1e-4},
            grid=_grid("decay", 1e-5, 1e-4, 1e-3),
        ),
        Method(
            "adversarial-l2",
            callbacks=adversarial,
            defaults={"norm": "l2", "radius": 0.25, "steps": 3},
            grid=_grid("radius", 0.1, 0.25, 0.5),
        ),
        Method(
            "adversarial-l2-0.1",
            callbacks=adversarial,
            defaults={"norm": "l2", "radius": 0.1, "steps": 3},
        ),
        Method(
            "adversarial-linf",
            callbacks=adversarial,
            defaults={"norm": "linf", "radius": 1 / 255, "steps": 3},
            grid=_grid("radius", 1 / 255, 2 / 255),
        ),
        Method(
            "lcnn-fine-tuned",
            low_curvature,
            lcnn_penalties,
            defaults={"learning_rate": 0.02},
            grid=(*_grid("learning_rate", 0.01, 0.03, 0.1), *_grid("learning_rate", 0.03, beta=30.0)),
            start="standard",
            epochs=0.2,
        ),
    )
}
