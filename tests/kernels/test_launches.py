"""What a training step asks of a GPU, counted on the meta device, where whatever would wait for the device raises."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests import ROOT

# of ResNet-18 of width 16 at batch 128, as counted; a smaller number is welcome and then written here
LAUNCHES, PENALTY, REFRESH, WITH_GRADIENT_NORM = 2.0, 9, 120, 1.2
TRAFFIC = 1.0


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "examples"))
    import benchmark_launches

    yield benchmark_launches.count_all(16, 128, gradient_norm=True)
    sys.path.remove(str(ROOT / "examples"))


def test_step_against_relu(rows: dict[str, Any]) -> None:
    plain, ours = rows["ReLU"], rows["low curvature"]
    assert ours.launches <= LAUNCHES * plain.launches
    assert ours.traffic <= TRAFFIC * plain.traffic


def test_penalty_forward_and_backward(rows: dict[str, Any]) -> None:
    ours, without = rows["low curvature"].phases, rows["low curvature, no penalty"].phases
    more = ours["backward"].launches - without["backward"].launches
    accumulated = more.pop("add")  # by autograd, where a parameter gets a gradient from the loss as well
    assert accumulated == 17 + 20 + 20 + 1  # β, γ, weights of batch norms, and of the output layer
    assert ours["penalty"].total + more.total() <= PENALTY


def test_refresh(rows: dict[str, Any]) -> None:
    assert rows["a refresh"].launches <= REFRESH


def test_step_with_gradient_norm(rows: dict[str, Any]) -> None:
    plain, ours = rows["ReLU, gradient norm"], rows["low curvature, gradient norm"]
    assert ours.launches <= WITH_GRADIENT_NORM * plain.launches
