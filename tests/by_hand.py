"""The oracle of the mixin: a training loop written by hand, loss and penalty differentiated each on its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurvaturePenalty, Penalty
from tests.lightning_helpers import (
    lightning_module,
    loader,
    plain_classifier,
    small_net,
    trainer,
)

WEIGHT = 0.3
Plain = plain_classifier()
Module = lightning_module()


class Low(LCNNMixin, Plain):
    """The change that a user makes."""

    def configure_penalties(self) -> list[Penalty]:
        return [CurvaturePenalty(weight=WEIGHT)]


def steps_by_hand(batches: int, penalties: int = 1, weight: float = WEIGHT, accumulate: int = 1) -> dict[str, Tensor]:
    """Parameters after plain SGD on cross-entropy + penalty, each differentiated on its own."""
    net, penalty, lr = small_net(), CurvaturePenalty(weight=weight), Plain.learning_rate
    parameters = list(net.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i, (x, y) in enumerate(loader(4 * batches)):
        first = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
        second = torch.autograd.grad(penalty(net), parameters, allow_unused=True)
        for t, a, b in zip(total, first, second, strict=True):
            t += (a + penalties * (0 if b is None else b)) / accumulate
        if (i + 1) % accumulate == 0:
            with torch.no_grad():
                for p, t in zip(parameters, total, strict=True):
                    p -= lr * t
                    t.zero_()
    return dict(net.named_parameters())


def fit(module: Any, batches: int = 1, package: str = "lightning.pytorch", **kwargs: Any) -> Any:
    """One epoch; returns the trained network."""
    trainer(package, **kwargs).fit(module, loader(4 * batches))
    return getattr(module, "_orig_mod", module).net


def assert_equal_to_hand(net: nn.Module, by_hand: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, parameter in net.named_parameters():  # float32: the sum of two gradients is rounded in another order
        assert torch.allclose(parameter, by_hand[name], rtol=tolerance, atol=tolerance), name
