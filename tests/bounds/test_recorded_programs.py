"""Programs of drawn statements, in place, through aliases, with hooks and shared layers: no input exceeds the bounds.

``LCNN_PROGRAMS=20000`` tries more of them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.bounds import network_bound

WIDTH = 6
PROGRAMS = int(os.environ.get("LCNN_PROGRAMS", "200"))
CURVES: tuple[Callable[[Tensor], Tensor], ...] = (torch.tanh, torch.sigmoid, torch.sin, torch.relu, F.softplus, F.gelu)


class Drawn(nn.Module):
    """Three variables of width 6, and drawn statements that work on them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.linear = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        others = [
            nn.Tanh(),
            nn.SiLU(inplace=True),
            nn.Dropout(0.3),
            nn.ReLU(inplace=True),
            nn.LayerNorm(WIDTH, eps=0.1),
        ]
        self.others = nn.ModuleList([*others, nn.BatchNorm1d(WIDTH)])
        nn.init.uniform_(self.others[-1].running_var, 0.3, 2.0)
        self.statements = [
            (draw.choice(STATEMENTS), *(draw.randrange(3) for _ in range(3)), draw.choice(CURVES), draw.randrange(5))
            for _ in range(draw.randint(3, 9))
        ]
        for layer in (*self.linear, *self.others):
            if draw.random() < 0.1:
                layer.register_forward_hook(draw.choice([_times_two, _times_two_in_place]))
            elif draw.random() < 0.1:
                layer.register_forward_pre_hook(lambda m, x: (-1.5 * x[0],))

    def forward(self, x: Tensor) -> Tensor:
        v = [self.linear[0](x), x.clone(), x * 1.0]
        for statement, a, b, c, curve, i in self.statements:
            result = statement(self, v[a], v[b], v[c], curve, i)
            v[a] = v[a] if result is None else result
        return v[0] + v[1]


def _times_two(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def _times_two_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(2)


def _write(target: Tensor, value: Tensor) -> None:
    target.copy_(value)


# (module, three variables, an activation, a number below 5) -> the new first variable, or None for a statement
STATEMENTS: tuple[Callable[..., Tensor | None], ...] = (
    lambda m, a, b, c, s, i: m.linear[i % 3](b),
    lambda m, a, b, c, s, i: m.others[i](b),
    lambda m, a, b, c, s, i: m.others[5](m.linear[i % 3](b)),
    lambda m, a, b, c, s, i: s(b) + c,
    lambda m, a, b, c, s, i: torch.sub(b, s(c), alpha=-0.5),
    lambda m, a, b, c, s, i: b,
    lambda m, a, b, c, s, i: torch.cat([b[:, :i], c[:, i:]], 1),
    lambda m, a, b, c, s, i: b[:, [i, 0, 1, 2, 3, i]],
    lambda m, a, b, c, s, i: s(b.reshape(-1, 2, 3).transpose(1, 2)).reshape(-1, WIDTH),
    lambda m, a, b, c, s, i: b[:, i : i + 1].expand(-1, WIDTH) + c,
    lambda m, a, b, c, s, i: torch.where(torch.arange(WIDTH) < i, b, s(c)),
    lambda m, a, b, c, s, i: torch.cat(b.chunk(2, 1)[::-1], 1).roll(i, 1),
    lambda m, a, b, c, s, i: (a.tanh_(), None)[1],
    lambda m, a, b, c, s, i: (torch.relu_(a), None)[1],
    lambda m, a, b, c, s, i: (a[:, i : i + 2].mul_(-2.0), None)[1],
    lambda m, a, b, c, s, i: (a.detach().mul_(0.5), None)[1],
    lambda m, a, b, c, s, i: (a.data.add_(b), None)[1],
    lambda m, a, b, c, s, i: (a.t()[i].mul_(3.0), None)[1],
    lambda m, a, b, c, s, i: (a[:, i].zero_(), None)[1],
    lambda m, a, b, c, s, i: (a.add_(b, alpha=0.5), None)[1],
    lambda m, a, b, c, s, i: (torch.mul(b.clone(), -2.0, out=a), None)[1],
    lambda m, a, b, c, s, i: (a.masked_fill_(torch.arange(WIDTH) == i, 1.0), None)[1],
    lambda m, a, b, c, s, i: _write(a[:, i:], s(b.clone())[:, : WIDTH - i]),
    lambda m, a, b, c, s, i: _write(a[:, i], 2 * s(b[:, 0].clone())),
)


def quotients(net: nn.Module) -> tuple[float, float]:
    """Largest slope at 24 inputs and largest second difference along a direction at each, from values alone."""
    x = torch.randn(24, 1, WIDTH, dtype=torch.float64) * torch.tensor([0.05, 0.5, 2.0]).repeat(8)[:, None, None]
    u = F.normalize(torch.randn_like(x), dim=-1)
    steps = torch.cat([1e-6 * torch.eye(WIDTH, dtype=torch.float64).expand(24, -1, -1), 1e-3 * u, 0 * u], 1)
    with torch.no_grad():
        up, down = (net((x + sign * steps).flatten(0, 1)).unflatten(0, (24, -1)) for sign in (1, -1))
    slopes = torch.linalg.matrix_norm((up - down)[:, :WIDTH] / 2e-6, 2)
    bends = ((up + down)[:, WIDTH] - 2 * up[:, WIDTH + 1]) / 1e-6
    return float(slopes.max()), float(bends.norm(dim=1).max())


@pytest.mark.parametrize("first", range(0, PROGRAMS, 50))
def test_no_input_exceeds_the_bounds_of_a_drawn_program(first: int) -> None:
    refused = 0
    for seed in range(first, first + 50):
        net = Drawn(seed).double().eval()
        try:
            bounds = [network_bound(net, torch.randn(1, WIDTH, dtype=torch.float64), m) for m in ("fast", "tight")]
        except ValueError as error:  # views of what is contiguous for one example and not for three
            if "does something that its recorded program does not" not in str(error):
                raise
            refused += 1
            continue
        slope, bend = quotients(net)
        assert slope <= min(b.slope for b in bounds) * (1 + 1e-4) + 1e-6, seed
        curvature = min(b.curvature for b in bounds)
        assert math.isinf(curvature) or bend <= curvature * (1 + 1e-3) + 1e-4 * max(1.0, slope), seed
    assert refused <= 5
