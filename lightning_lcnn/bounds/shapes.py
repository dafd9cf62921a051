"""Shapes of every step, found by running the example input through the recorded graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_lcnn.bounds.pieces import Shape
from lightning_lcnn.bounds.steps import Step


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.shapes: dict[str, Shape] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it returned."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.shapes[n.name] = tuple(result.shape)
        return result


def record_shapes(model: nn.Module, graph: fx.Graph, steps: Sequence[Step], example_input: Tensor) -> list[Shape]:
    """Output shape of every step for one example, with a batch dimension of 1.

    The graph runs on two examples, which shows whether a step mixes or drops the batch, and its output is compared
    with that of the model, which shows whether the graph is the model.

    Raises:
        ValueError: when the example does not fit, when examples are coupled, or when graph and model differ.
    """
    batch = example_input[:2] if len(example_input) > 1 else torch.cat([example_input, example_input])
    try:
        with torch.no_grad():
            expected = model(batch.clone())
            recorder = _ShapeRecorder(model, graph)
            result = recorder.run(batch.clone())
    except Exception as error:
        raise ValueError(
            f"`example_input` of shape {tuple(example_input.shape)} does not fit `model`: "
            f"{type(error).__name__}: {error}"
        ) from error
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    if not torch.allclose(result, expected, rtol=1e-3, atol=1e-5 * scale, equal_nan=True):
        raise ValueError(
            "`model` does something that its recorded graph does not: the outputs differ at `example_input`. Likely "
            "causes: random numbers in evaluation mode, an in-place change through another name, a forward hook that "
            "changes values."
        )
    return [_example_shape(step, recorder.shapes.get(step.node)) for step in steps]


def _example_shape(step: Step, shape: Shape | None) -> Shape:
    if shape is None:
        raise ValueError(
            f"`model` has no bound at '{step.name}' ({step.kind}): its output is no floating-point tensor."
        )
    if len(shape) == 0 or shape[0] != 2:
        raise ValueError(
            f"`model` couples the examples of a batch at '{step.name}' ({step.kind}): for two examples its output has "
            f"shape {shape}, whose first dimension is not the batch. Keep dimension 0 as the batch throughout."
        )
    return (1, *(shape[1:] or (1,)))  # one number for each example counts as a vector of length 1
