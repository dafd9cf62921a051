"""Bring a model into a form of stock modules that the rules know, without changing what it computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any

from torch import Tensor, nn

from lightning_lcnn.conversion import rules
from lightning_lcnn.conversion.options import Options
from lightning_lcnn.conversion.rewriting.editor import Build, CannotRewriteError, edit_method, is_function
from lightning_lcnn.conversion.tree import is_stock, replace_modules, stock_form
from lightning_lcnn.functional.bends import ELEMENTWISE, MAX_POOLINGS, Bend
from lightning_lcnn.recording.run import Kink, Record, record_run, same_values

# arguments of the functional poolings, in their order
_POOL = ("output_size", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
Place = tuple[str, CodeType]  # path of a module and code of one of its methods


def _forms(bends: Iterable[Bend]) -> dict[Any, Build]:
    """What functions, and methods of tensors by their names, become: a module and the arguments after the input."""
    table: dict[Any, Build] = {}
    for bend in bends:
        (cls,) = bend.modules
        known = inspect.signature(cls).parameters
        names = bend.arguments if bend.curve else tuple(name for name in _POOL if name in known)
        table |= dict.fromkeys((*bend.functions, *bend.methods), (cls, names))
    return table


# PReLU's function takes its slopes as a tensor, which its module has to own
_ACTIVATIONS = [bend for bend in ELEMENTWISE if rules.is_converted(bend) and nn.PReLU not in bend.modules]
ACTIVATIONS = _forms(_ACTIVATIONS)
POOLINGS = _forms(filter(rules.is_converted, MAX_POOLINGS))
_OPERATIONS = frozenset(name for bend in _ACTIVATIONS for name in bend.aten)


def expand(model: nn.Module, example_input: Tensor, options: Options) -> tuple[nn.Module, Record, dict[Place, str]]:
    """Turn functional activations and timm's own layers into stock modules, in a copy.

    The copy is run again and dropped unless it gives the same output.

    Args:
        model: Left as it is.
        example_input: One batch.
        options: What is to be converted.

    Returns:
        The copy, the record of its run, and why the functional calls of a method were left alone.

    Raises:
        ValueError: If the model cannot be copied or does not accept the input.
    """
    expanded = _copy(model)
    record = record_run(expanded, example_input)
    places = _places(expanded, record, options)
    reasons: dict[Place, str] = {}
    for place, separate in places.items():
        try:
            _edit(expanded, place, separate, options)
        except CannotRewriteError as error:
            reasons[place] = str(error)
    _replace_attributes(expanded, record, options)
    expanded = _replace_foreign(expanded, options)
    _set_inplace(expanded, options)
    after = _try_run(expanded, example_input)
    if after is not None and same_values(record.output, after.output):
        return expanded, after, reasons
    plain = copy.deepcopy(model)
    _set_inplace(plain, options)
    after = record_run(plain, example_input)
    if not same_values(record.output, after.output):
        _refuse(model, example_input, record, options)
    reason = "the model gave another output when it was rewritten"
    return plain, after, dict.fromkeys(places, reason) | reasons


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"`model` cannot be copied ({type(error).__name__}: {error}); make weight norm or pruning permanent first, "
            "and detach tensors that modules keep."
        ) from error


def _places(model: nn.Module, record: Record, options: Options) -> dict[Place, set[str]]:
    """Return the methods to edit, each with the activations to be given one module for every call."""
    places: dict[Place, set[str]] = {}
    for kink in _convertible(record):
        module = model.get_submodule(kink.owner)
        if kink.code is None or options.skips(kink.owner, module):
            continue
        if kink.on_owner and not is_stock(module):
            places.setdefault((kink.owner, kink.code), set())
        elif options.separate_activations and rules.activation(module, options) is not None:
            parent, _, attribute = kink.owner.rpartition(".")
            if record.usage[kink.owner].calls > 1 and not isinstance(model.get_submodule(parent), nn.Sequential):
                places.setdefault((parent, kink.code), set()).add(attribute)
    return places


def _convertible(record: Record) -> list[Kink]:
    """All kinks, and the smooth activations that get a β."""
    return record.kinks + [place for place in record.smooth if place.operation in _OPERATIONS]


def _edit(model: nn.Module, place: Place, separate: set[str], options: Options) -> None:
    owner, code = place
    module = model.get_submodule(owner)
    functions = ACTIVATIONS | (POOLINGS if options.max_pool != "keep" else {})
    for child in edit_method(module, code, functions, separate).values():
        child.train(module.training)


def _replace_attributes(model: nn.Module, record: Record, options: Options) -> None:
    """Turn ``self.activation = F.relu`` into a child module of that name."""
    owners = {kink.owner for kink in _convertible(record)}
    for name, module in model.named_modules():
        if name not in owners or is_stock(module) or options.skips(name, module):
            continue
        for key, value in list(vars(module).items()):
            if is_function(value) and value in ACTIVATIONS:
                delattr(module, key)
                module.add_module(key, ACTIVATIONS[value][0]().train(module.training))


def _replace_foreign(model: nn.Module, options: Options) -> nn.Module:
    """Put torch's own layers in the place of timm's that compute the same, one or several for each."""
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        stock = None if options.skips(name, module) else stock_form(module)
        if stock is not None:
            replacements[id(module)] = stock
    return replace_modules(model, replacements)


def _try_run(model: nn.Module, example_input: Tensor) -> Record | None:
    try:
        return record_run(model, example_input)
    except ValueError:
        return None


def _set_inplace(model: nn.Module, options: Options, only: str | None = None) -> list[str]:
    """Make activations that will be converted work out of place; return the paths of those that did not."""
    found = [
        name
        for name, module in model.named_modules()
        if rules.activation(module, options) is not None
        and getattr(module, "inplace", False)
        and not options.skips(name, module)
    ]
    for name in found:
        if only is None or name == only:
            model.get_submodule(name).inplace = False  # type: ignore[assignment]
    return found


def _refuse(model: nn.Module, example_input: Tensor, record: Record, options: Options) -> None:
    """Raise if it is the in-place activations that change the output, and not chance."""
    trial = copy.deepcopy(model)
    if not same_values(record.output, record_run(trial, example_input).output):
        return
    culprits = []
    for name in _set_inplace(copy.deepcopy(model), options):
        trial = copy.deepcopy(model)
        _set_inplace(trial, options, name)
        if not same_values(record.output, record_run(trial, example_input).output):
            culprits.append(name)
    raise ValueError(
        f"`model` uses the input of in-place activations after they have overwritten it ({', '.join(culprits)}), and a "
        "smooth activation leaves its input alone; let `forward` use the activation's result instead, or pass "
        "these paths as `skip`."
    )
