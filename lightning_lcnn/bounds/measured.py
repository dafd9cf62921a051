"""A recorded network, with the certified bound of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_lcnn._compat import hook_tables, uncompiled
from lightning_lcnn.bounds.recorded_steps import RecordedStep, build_recorded_steps
from lightning_lcnn.bounds.rules.modules import is_known, rule_for
from lightning_lcnn.bounds.rules.pieces import Diagonal, LayerBound, Shape, Weight
from lightning_lcnn.bounds.steps import Step
from lightning_lcnn.kernels.modes import unsharded
from lightning_lcnn.recording.fingerprint import fingerprint
from lightning_lcnn.recording.nodes import Layer
from lightning_lcnn.recording.program import check_program, record_program


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
    """Record what the model does with the example, compare record and model, and certify every step in float64.

    Raises:
        TypeError: when an argument has the wrong type.
        ValueError: when the model is in training mode, the example does not fit, the model cannot be recorded, or a
            layer or operation has no bound.
    """
    model = _checked(model, example_input)
    program = record_program(model, example_input, is_known)
    recorded = build_recorded_steps(model, program, double=True)
    check_program(model, program, example_input)
    network = MeasuredNetwork(tuple(r.step for r in recorded), tuple(r.shape for r in recorded), ())
    return replace(network, bounds=_certified(network, recorded))


def identity(model: nn.Module, example_input: Tensor) -> tuple[Any, ...] | None:
    """What the bounds of a model depend on: equal for two calls only where the bounds are; None where not known.

    The function that ran, with the contents of its parameters, and the rules of its layers.
    """
    model = _checked(model, example_input)
    program = record_program(model, example_input, is_known)
    digest = fingerprint(model, program)
    layers = [model.get_submodule(node.path) for node in program.nodes if isinstance(node, Layer)]
    return None if digest is None else (digest, *(rule_for(layer) for layer in layers))


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
    _check_evaluation(model)
    return unsharded(_without_compiler(model), gather=True)


def _without_compiler(model: nn.Module) -> nn.Module:
    """The module inside a wrapper of ``torch.compile``; the wrapper itself where it has hooks of its own."""
    return model if any(hook_tables(model, forward_only=True).values()) else uncompiled(model)


def _check_evaluation(model: nn.Module) -> None:
    training = [path for path, module in model.named_modules() if module.training]
    if training:
        where = f"module '{training[-1]}'" if training[-1] else "the model"
        raise ValueError(f"`model` must be in evaluation mode, but {where} is in training mode; call model.eval().")


def _certified(network: MeasuredNetwork, recorded: Sequence[RecordedStep]) -> tuple[LayerBound, ...]:
    bounds: list[LayerBound] = []
    for i, entry in enumerate(recorded):
        bounds.append(_bound(network, i, entry, bounds))
    return tuple(bounds)


def _bound(network: MeasuredNetwork, i: int, entry: RecordedStep, before: list[LayerBound]) -> LayerBound:
    """Certified bound of a step; infinite, with the reason, where NaN or infinity is in it."""
    if not all(_is_finite(value()) for value in entry.constants):
        return LayerBound(math.inf, math.inf, "its parameters or constants hold NaN or infinity")
    if math.prod(network.shapes[i]) * math.prod(network.input_shape(i)) == 0:  # no entries: a constant
        return LayerBound(0.0)
    try:
        bound = entry.step.piece.certify(network.input_shape(i), network.shapes[i])
        sources = [before[j] for j in entry.step.inputs]
        if all(math.isfinite(float(b.slope)) for b in (bound, *sources)):
            bound = _folded(network, i, before, bound)
    except ValueError as error:
        raise ValueError(entry.step.refusal(str(error))) from error
    slope, curvature = float(bound.slope), float(bound.curvature)
    if math.isnan(curvature) or not math.isfinite(slope):
        return LayerBound(math.inf, math.inf, bound.reason or "its slope or curvature is NaN or beyond float64")
    return bound


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return math.isfinite(value)


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
