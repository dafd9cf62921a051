"""Record what a model does with one example as a functional program, and compare the program with the model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._compat import schema_of
from lightning_lcnn.recording.nodes import Operation, Place, Program, Ref, references
from lightning_lcnn.recording.recorder import NotRecordedError, Recorder
from lightning_lcnn.recording.untouched import evaluation_copy
from lightning_lcnn.recording.wholes import module_calls_seen_by

__all__ = ["NotRecordedError", "Program", "check_program", "record_program"]
_SEEDS = (0, 1)
_LARGE = 2**17  # numbers in an input from which on one seed is drawn: a ResNet-50 at 224 pixels then takes 3 s in all
_WAY_OUT = "register a bound for the whole module: lightning_lcnn.bounds.register_rule(Class, rule)"


def record_program(model: nn.Module, example: Tensor, keeps: Callable[[nn.Module], bool] | None = None) -> Program:
    """Run the model once, on a fake copy of one example in evaluation mode, and write down what it did.

    In-place writes, aliases, hooks, replaced forwards, global hooks, compiled modules and sizes taken from shapes are
    all in the program as plain operations on values. The model stays as it is.

    Args:
        model: a module whose ``forward`` takes one tensor (further arguments keep their defaults) and returns one.
        example: shape (N, …); the first entry is recorded, values do not matter.
        keeps: says of a module whether it may stay one node; asked only where :func:`wholes.is_intact` holds.

    Returns:
        A :class:`Program` for one example. Parameters are read by path at every replay.

    Raises:
        NotRecordedError: (a ValueError) when ``forward`` branches on values, draws random numbers, writes into its own
            state, returns no single tensor, or fails; names the module and operation.

    Example:
        >>> program = record_program(nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)), torch.zeros(1, 3))
        >>> [node.name for node in program.nodes if isinstance(node, Operation)]
        ['aten.t.default', 'aten.addmm.default', 'aten.relu.default']
    """
    with _quiet(), torch.no_grad(), evaluation_copy(model):
        recorder = Recorder(model, keeps or (lambda module: False))
        fake = recorder.input(example[:1])
        try:
            with recorder, module_calls_seen_by(recorder.call_module):
                result = model(fake)
        except (NotRecordedError, Warning):  # the second where warnings are errors
            raise
        except Exception as error:
            _check_fits(model, example)
            raise NotRecordedError(_failed(recorder.failed or recorder.place(), error)) from error
        return _program(recorder, result)


def _check_fits(model: nn.Module, example: Tensor) -> None:
    """Tell an example that the model does not take from a model that cannot be recorded."""
    try:
        model(example.detach().clone())
    except Exception as error:
        raise ValueError(
            f"`example_input` of shape {tuple(example.shape)} does not fit `model`: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Outside of inference mode and autocast; compiled parts run as written; torch logs no failure that is raised."""
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6; before, dispatch modes stop dynamo
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), _silent(log):
        if stance is None or "torch._dynamo" not in sys.modules:  # nothing is compiled; its import takes 2 s
            yield
        else:
            with stance("force_eager"):
                yield


@contextmanager
def _silent(log: logging.Logger) -> Iterator[None]:
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _program(recorder: Recorder, result: Any) -> Program:
    output = recorder.ref(result) if isinstance(result, Tensor) else None
    if output is None or output.node not in recorder.dependent:
        got = (
            f"a tensor of shape {tuple(result.shape)} that does not"
            if isinstance(result, Tensor)
            else type(result).__name__
        )
        raise NotRecordedError(
            f"`model.forward` must return one tensor that depends on its input, got {got}. "
            "Wrap the model in a module whose forward returns the logits alone."
        )
    nodes = tuple(recorder.nodes)
    program = Program(
        nodes,
        output,
        frozenset(recorder.dependent),
        _needed(nodes, output),
        tuple(recorder.state_written),
    )
    _check_randomness(program)
    _check_writes(program)
    return program


def _needed(nodes: tuple[Any, ...], output: Ref) -> tuple[int, ...]:
    needed = {0, output.node}
    for i in range(len(nodes) - 1, -1, -1):
        if i in needed:
            needed.update(ref.node for ref in references(nodes[i]))
    return tuple(sorted(needed))


def _check_randomness(program: Program) -> None:
    for i in program.needed:
        node = program.nodes[i]
        if isinstance(node, Operation) and _draws(node):
            raise NotRecordedError(
                f"`model` draws random numbers in evaluation mode: `{node.target}` in {node.place}. Pass "
                "training=self.training to dropout, use its module form, or draw the numbers once."
            )


def _draws(node: Operation) -> bool:
    """Attention is tagged too, for its dropout: it has no rule, the better reason. Some draw in training only."""
    names = [argument.name for argument in schema_of(node.target).arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    off = "training" in names and not given.get("training", False)
    attention = node.target.overloadpacket.__name__.startswith("_scaled_dot_product")
    return torch.Tag.nondeterministic_seeded in node.target.tags and not off and not attention


def _check_writes(program: Program) -> None:
    """What lasts beyond the call must not depend on the call."""
    for name, place in program.state_written:
        raise NotRecordedError(
            f"`model` writes into its own state in evaluation mode, so that calls depend on earlier ones: '{name}' in "
            f"{place}. Write under `if self.training`, or {_WAY_OUT}."
        )


def _failed(place: Place, error: Exception) -> str:
    reason = str(error).split("\n")[0].rstrip(".")
    return (
        f"`model` cannot be recorded: {place} failed with {type(error).__name__}: {reason}. Tensors of the network "
        f"have shapes and no values while it is recorded; rewrite what needs their values, or {_WAY_OUT}."
    )


def check_program(model: nn.Module, program: Program, example: Tensor) -> None:
    """Compare program and model at the example and at random inputs, in float64, as one batch and one by one.

    Raises:
        ValueError: when they differ: random numbers, hidden state, or examples of a batch that are coupled.
    """
    x = _inputs(example)
    with _quiet(), torch.no_grad():
        expected, dtype = _outputs(model, x)
        double = dtype == torch.float64
        with evaluation_copy(model, double):
            got = [program.run(model, entry[None].to(dtype), double) for entry in x]
    shape = tuple(got[0].shape[1:]) if got[0].dim() else ()
    if got[0].dim() == 0 or got[0].shape[0] != 1 or tuple(expected.shape) != (len(x), *shape):
        raise ValueError(
            f"`model` couples the examples of a batch: one example gives an output of shape {tuple(got[0].shape)}, "
            f"{len(x)} give {tuple(expected.shape)}. Keep dimension 0 as the batch throughout."
        )
    for i, value in enumerate(got):
        _compare(value[0], expected[i], double, "at `example_input`" if i == 0 else "at a random input")


def _inputs(example: Tensor) -> Tensor:
    """The example, and normal numbers of two seeds that leave the global generator alone."""
    like = example[:1].detach().double().cpu()
    seeds = _SEEDS[: 1 if like.numel() >= _LARGE else None]
    drawn = [torch.randn(like.shape, generator=torch.Generator().manual_seed(s), dtype=like.dtype) for s in seeds]
    return torch.cat([like, *drawn]).to(example.device)


def _outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, torch.dtype]:
    """Of a batch, in float64; in the model's own type where its code insists on one. And the type of the input."""
    try:
        with evaluation_copy(model, double=True):
            result = model(x.clone())
        if result.dtype == torch.float64:
            return result, torch.float64
    except (RuntimeError, TypeError):  # float32 constants in its code meet float64
        pass
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    try:
        with evaluation_copy(model):
            return model(x.to(dtype, copy=True)), dtype
    except Exception as error:
        raise ValueError(
            f"`model` couples the examples of a batch: it takes one example but no batch of {len(x)} "
            f"({type(error).__name__}: {error}). Keep dimension 0 as the batch throughout."
        ) from error


def _compare(got: Tensor, expected: Tensor, double: bool, where: str) -> None:
    scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
    tolerance = 1e-7 if double else 1e-3
    if not torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale, equal_nan=True):
        raise ValueError(
            f"`model` does something that its recorded program does not: outputs differ {where}. Likely causes: random "
            "numbers in evaluation mode, examples of a batch that are coupled, results kept from earlier calls."
        )
