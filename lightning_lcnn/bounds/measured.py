"""A traced network at known shapes, with the certified bound of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from lightning_lcnn._compat import uncompiled
from lightning_lcnn.bounds.rules.modules import is_known
from lightning_lcnn.bounds.rules.pieces import Diagonal, LayerBound, Scale, Shape, Sum, Weight
from lightning_lcnn.bounds.steps import Step, build_steps
from lightning_lcnn.kernels.modes import unsharded
from lightning_lcnn.recording.tracing import record, run_graph


def _record_shapes(model: nn.Module, graph: fx.Graph, steps: Sequence[Step], example_input: Tensor) -> list[Shape]:
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
            result, shapes = run_graph(model, graph, batch.clone())
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
    return [_example_shape(step, shapes.get(step.node)) for step in steps]


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


@dataclass(frozen=True)
class MeasuredNetwork:
    """What both methods of :func:`network_bound` start from."""

    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]  # output of every step, batch dimension 1
    bounds: tuple[LayerBound, ...]  # of every step as a map of its first input; joins have slope 1

    def input_shape(self, i: int) -> Shape:
        """Shape of the first input of step ``i``."""
        inputs = self.steps[i].inputs
        return self.shapes[inputs[0]] if inputs else self.shapes[i]

    def copies(self, i: int) -> tuple[float, ...]:
        """For a sum: the norm of broadcasting each input to the output, √(output size / input size)."""
        size = math.prod(self.shapes[i])
        return tuple(math.sqrt(size / math.prod(self.shapes[j])) for j in self.steps[i].inputs)

    def folded(self) -> MeasuredNetwork:
        """The same network with every batch norm that follows a layer of its own merged into it.

        The batch norm's step becomes the merged layer and reads what the layer read; the layer's step is left unread.
        """
        steps, bounds = list(self.steps), list(self.bounds)
        for i, step in enumerate(self.steps):
            pair = _foldable(self, i)
            if pair is not None:
                source, layer, scale = pair
                piece = Weight(_merged(layer, scale).clone, layer.geometry)
                steps[i] = replace(step, piece=piece, inputs=self.steps[source].inputs)
                bounds[i] = LayerBound(float(bounds[source].slope) * float(bounds[i].slope))
        return replace(self, steps=tuple(steps), bounds=tuple(bounds))


def measure(model: nn.Module, example_input: Tensor) -> MeasuredNetwork:
    """Trace the model, run the example for the shapes and certify every step in float64.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the model is in training mode, the example does not fit, or :func:`trace` refuses.
    """
    model = _checked(model, example_input)
    graph: fx.Graph = record(model, is_known)
    steps = tuple(build_steps(model, graph))
    _check_evaluation(model, steps)
    shapes = tuple(_record_shapes(model, graph, steps, example_input))
    network = MeasuredNetwork(steps, shapes, ())
    return replace(network, bounds=_certified(network))


def _checked(model: nn.Module, example_input: Tensor) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(example_input, Tensor):
        raise TypeError(f"`example_input` must be a tensor, got {type(example_input).__name__}.")
    if not example_input.is_floating_point() or example_input.dim() < 2 or len(example_input) < 1:
        raise ValueError(
            "`example_input` must hold floating-point numbers of shape (N, ...) with N >= 1, got "
            f"{example_input.dtype} of shape {tuple(example_input.shape)}."
        )
    return unsharded(uncompiled(model), gather=True)


def _check_evaluation(model: nn.Module, steps: tuple[Step, ...]) -> None:
    training = [f"module '{step.name}'" for step in steps if step.module is not None and step.module.training]
    if model.training or training:
        where = training[0] if training else "the model"
        raise ValueError(f"`model` must be in evaluation mode, but {where} is in training mode; call model.eval().")


def _certified(network: MeasuredNetwork) -> tuple[LayerBound, ...]:
    bounds: list[LayerBound] = []
    for i, step in enumerate(network.steps):
        try:
            _check_ranks(network, i)
            bound = step.piece.certify(network.input_shape(i), network.shapes[i])
        except ValueError as error:
            raise ValueError(step.refusal(str(error))) from error
        bounds.append(_folded(network, i, bounds, bound))
    return tuple(bounds)


def _check_ranks(network: MeasuredNetwork, i: int) -> None:
    """Broadcasting between different ranks would align the batch with another dimension."""
    ranks = {len(network.shapes[j]) for j in (i, *network.steps[i].inputs)}
    if isinstance(network.steps[i].piece, Sum | Scale) and len(ranks) > 1:
        raise ValueError("its operands have different numbers of dimensions, so broadcasting couples the batch")


def _folded(network: MeasuredNetwork, i: int, bounds: list[LayerBound], alone: LayerBound) -> LayerBound:
    """Batch norm behind a layer that nothing else reads: the norm of both as one, over that of the layer."""
    pair = _foldable(network, i)
    if pair is None:
        return alone
    source, layer, scale = pair
    before = float(bounds[source].slope)
    if float(scale.abs().min()) >= 0.999 * float(scale.abs().max()):  # nothing to gain: one norm bound saved
        return alone
    folded = layer.norm(_merged(layer, scale), network.input_shape(source))
    return LayerBound(min(float(alone.slope), folded / before) if before else 0.0)


def _foldable(network: MeasuredNetwork, i: int) -> tuple[int, Weight, Tensor] | None:
    """For a batch norm the layer before it, if nothing else reads that: its step, piece, and the norm's scale."""
    norm = network.steps[i].piece
    if not isinstance(norm, Diagonal):
        return None
    (source,) = network.steps[i].inputs
    layer = network.steps[source].piece
    if not isinstance(layer, Weight) or sum(source in step.inputs for step in network.steps) > 1:
        return None
    if layer.geometry is None and len(network.shapes[i]) > 2:  # a linear layer's outputs are no channels here
        return None
    return source, layer, norm.exact_scale()


def _merged(layer: Weight, scale: Tensor) -> Tensor:
    weight = layer.exact_tensor()
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
