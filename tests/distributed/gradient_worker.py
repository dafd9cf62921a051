"""Fits on two processes with penalties on input gradients, run as a script by test_gradient_penalties_ddp.py.

Arguments: strategy, folder for the results, and names of the scenarios below.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.penalties import CurePenalty, CurvaturePenalty, GradientNormPenalty, Penalty
from tests.distributed import worker
from tests.distributed.worker import Sharded, net_without_batch_norm, run

PENALTIES = {
    "exact": GradientNormPenalty(0.3),
    "difference": GradientNormPenalty(0.3, mode="finite_difference", step_size=0.05),
    "cure": CurePenalty(3.0),
}


class Gradients(LCNNMixin, Sharded):
    """One of the penalties beside that on the layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = net_without_batch_norm()
        self.kind = kind

    def configure_penalties(self) -> list[Penalty]:
        return [CurvaturePenalty(weight=0.3), PENALTIES[self.kind]]


class Unused(Gradients):
    """With parameters that no loss reaches, which DDP has to be told of."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.spare = nn.Linear(2, 2)


def scenario(name: str) -> None:
    """Fit and save under this name."""
    kind, _, unused = name.partition("-")
    worker.STRATEGY = "ddp_find_unused_parameters_true" if unused else "ddp"
    module: Any = Unused(kind) if unused else Gradients(kind)
    run(module, name, [PowerIteration(every_n_steps=2)], use_distributed_sampler=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker.OUT = Path(sys.argv[1])
    for name in sys.argv[2:]:
        scenario(name)
