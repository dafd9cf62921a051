"""Gradient ascent for inputs and directions where a network's slope and curvature are largest: oracles for bounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ascend(net: nn.Module, x: Tensor, weights: Tensor, sign: float, steps: int) -> tuple[float, float]:
    """Largest ‖∇h‖₂ and largest sign · λ(∇²h) found for h = wᵀg, by ascent on (x, u), and on w if it needs gradients.

    ``x`` holds the starting points in float64, ``weights`` one direction w for each, shaped like the output.
    """
    x = x.clone().requires_grad_()
    u = torch.randn_like(x).requires_grad_()
    variables = [x, u, weights] if weights.requires_grad else [x, u]
    optimizer = torch.optim.Adam(variables, lr=0.1)
    slope = curvature = 0.0
    for _ in range(steps):
        w = _unit(weights) if weights.requires_grad else weights
        (gradient,) = torch.autograd.grad((net(x) * w).sum() + 0 * x.pow(3).sum(), x, create_graph=True)
        (product,) = torch.autograd.grad((gradient * _unit(u)).sum(), x, create_graph=True)
        values = sign * (product * _unit(u)).flatten(1).sum(1)
        slope = max(slope, float(gradient.detach().flatten(1).norm(dim=1).max()))
        curvature = max(curvature, float(values.detach().max()))
        optimizer.zero_grad()
        (-values.sum()).backward()
        optimizer.step()
    return slope, curvature


def _unit(v: Tensor) -> Tensor:
    return v / v.flatten(1).norm(dim=1).view(-1, *[1] * (v.dim() - 1))


def slope_by_values(net: nn.Module, example: Tensor, step: float = 1e-5) -> float:
    """Largest norm of the Jacobian at six random inputs, by central differences of values in float64.

    Values hold what autograd does not follow: hooks on detached tensors, ``.data``, ``out=``. Rounding and the third
    derivative make it up to 1e-6 too large.
    """
    norms = []
    for scale in (1.0, 0.1, 3.0, 1.0, 0.1, 3.0):
        x = scale * torch.randn(example.shape, dtype=torch.float64)
        moves = step * torch.eye(x.numel(), dtype=torch.float64)
        with torch.no_grad():
            pairs = [(net(x + e.view_as(x)), net(x - e.view_as(x))) for e in moves]
        jacobian = torch.stack([(after - before).flatten() / (2 * step) for after, before in pairs])
        norms.append(float(torch.linalg.matrix_norm(jacobian, 2)))
    return max(norms) * (1 - 1e-6)
