"""Deciding for every module of a recorded model what it becomes, and the report of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_lcnn._compat import has_hooks_between
from lightning_lcnn.conversion import rules
from lightning_lcnn.conversion.options import OUTPUT_LAYER, SKIPPED, Options
from lightning_lcnn.conversion.tree import is_ours, replace_modules, take_over
from lightning_lcnn.layers import ScaledActivation
from lightning_lcnn.recording.run import Record

_NORMS = (*rules.NORMS, nn.SyncBatchNorm)
_READ_OUTSIDE = "another module reads its weight"


@dataclass(frozen=True)
class Change:
    """One module that was replaced."""

    name: str  # path in the model
    before: str  # class
    after: str  # class
    note: str = ""  # where its scale went, what γ it got


@dataclass(frozen=True)
class Kept:
    """One module or operation that was left as it is."""

    name: str  # path of the module
    what: str  # class of the module, or operation and place of a functional call
    reason: str
    smooth: bool = True  # False: a kink remains here, and with it infinite curvature


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`to_low_curvature` did; ``print`` shows it as a table.

    Example:
        >>> print(ConversionReport((Change("act", "ReLU", "CenteredSoftplus"),), ()))
        changed  act  ReLU  CenteredSoftplus
        1 changed, 0 left alone, 0 of them with kinks
    """

    changed: tuple[Change, ...]  # in the order of the model's modules
    kept: tuple[Kept, ...]

    @property
    def kinks(self) -> tuple[Kept, ...]:
        """What was left alone and has infinite curvature."""
        return tuple(row for row in self.kept if not row.smooth)

    def __str__(self) -> str:
        rows = [("changed", row.name, row.before, row.after, row.note) for row in self.changed]
        rows += [("kept" if row.smooth else "kink", row.name, row.what, row.reason, "") for row in self.kept]
        widths = [max(len(row[i]) for row in rows) for i in range(5)] if rows else []
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{len(self.changed)} changed, {len(self.kept)} left alone, {len(self.kinks)} of them with kinks"
        return "\n".join([*lines, total])


class Decisions:
    """Builds the replacements for the modules of ``model``, in which they then stand.

    ``rows`` holds what was done to each, by its path.
    """

    def __init__(self, model: nn.Module, record: Record, options: Options) -> None:
        self.model, self.record, self.options = model, record, options
        inner = {id(module.activation) for module in model.modules() if type(module) is ScaledActivation}
        self.modules = {name: module for name, module in model.named_modules() if id(module) not in inner}
        self.rows: dict[str, Change | Kept] = {}
        self._encoders = [name for name, m in self.modules.items() if isinstance(m, nn.TransformerEncoderLayer)]
        self._replacements: dict[int, nn.Module] = {}
        parameters = [p for module in self.modules.values() for p in module._parameters.values() if p is not None]
        self._uses = Counter(map(id, parameters))
        dtypes = (p.dtype for p in parameters if p.is_floating_point())
        self._float_type = next(dtypes, torch.float32)

    def apply(self) -> nn.Module:
        """Replace what can be replaced; return the model, or what replaces it."""
        for name, module in self.modules.items():  # before the norms, which take over the scale of these layers
            if type(module) in rules.SPECTRAL and self.options.spectral:
                self._decide(name, module, self._spectral)
        for name, module in self.modules.items():
            if type(module) in _NORMS:
                self._decide(name, module, self._norm)
            elif type(module) in rules.AVERAGE:
                self._decide(name, module, self._pooling)
            elif rules.is_activation(module, self.options):
                self._decide(name, module, self._activation)
            elif name not in self.rows and module._parameters and not is_ours(module):
                self._keep(name, module, self._why_unknown(module))
        return replace_modules(self.model, self._replacements)

    def _decide(self, name: str, module: nn.Module, decide: Any) -> None:
        reason = self._why_untouched(name, module)
        if reason:
            self._keep(name, module, reason)
        else:
            decide(name, module)

    def _why_untouched(self, name: str, module: nn.Module) -> str:
        if self.options.skips(name, module):
            return SKIPPED
        if self.record.usage[name].calls == 0:
            read = name in self.record.read_outside
            return _READ_OUTSIDE if read else "the example input does not reach it in evaluation mode"
        if any(name.startswith(f"{path}.") for path in self._encoders):
            return "nn.TransformerEncoderLayer reads it directly on its fast path"
        return "its forward was replaced" if "forward" in vars(module) else ""

    def _why_unknown(self, module: nn.Module) -> str:
        if parametrize.is_parametrized(module):
            return "its parameters are parametrised; remove the parametrisation first"
        if type(module) in rules.SPECTRAL:
            return "spectral=False"
        known = (*rules.SPECTRAL, *_NORMS)
        parent = next((cls.__name__ for cls in known if isinstance(module, cls)), None)
        if parent is not None:
            return f"a subclass of {parent}, which may compute something else"
        return "holds parameters of its own" if module._modules else "no counterpart"

    def _spectral(self, name: str, module: Any) -> None:
        reason = self._why_not_spectral(name, module)
        if reason:
            return self._keep(name, module, reason)
        new = rules.spectral(module, self.record.usage[name].inputs)
        sigma = float(new.sigma().detach())
        norm = self._norm_behind(name, module, sigma)
        if norm is None:
            rules.set_gain(new, sigma)
        else:
            rules.move_scale(new, self.modules[norm], sigma)
        self._replace(
            name, module, new, f"gain {sigma:.4g}" if norm is None else f"scale {sigma:.4g} moved into {norm}"
        )

    def _why_not_spectral(self, name: str, module: Any) -> str:
        if module._parameters.get("weight") is None:
            return "its weight is computed by a hook (weight norm, pruning); make that permanent first"
        if name in self.record.read_outside:
            return _READ_OUTSIDE
        usage = self.record.usage[name]
        if usage.escapes and not usage.consumers and not self.options.output_layer:
            return OUTPUT_LAYER
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"padding_mode={module.padding_mode!r} has no known norm; pad in a layer of its own"
        norm = float(torch.linalg.vector_norm(module.weight.detach().double()))
        return "" if math.isfinite(norm) and norm > 0 else "its weight is zero or not finite"

    def _norm_behind(self, name: str, module: Any, sigma: float) -> str | None:
        """Return the batch norm that gets all of this layer's output and nothing else, if its statistics can move."""
        norm = self.record.only_consumer(name) or name
        target: Any = self.modules[norm]
        if type(target) not in _NORMS or target.running_var is None or norm in self.record.read_outside:
            return None
        if self._why_untouched(norm, target):
            return None
        if has_hooks_between(module, target) or target.running_var.dtype.itemsize < 4:
            return None
        if not rules.takes_scale(target, sigma):
            return None
        changed = (tensor for tensor in (module.bias, target.weight) if tensor is not None)
        return norm if all(self._uses[id(tensor)] == 1 for tensor in changed) else None

    def _norm(self, name: str, module: Any) -> None:
        if module.running_var is None:
            return self._keep(name, module, "keeps no running statistics, so that its slope depends on the batch")
        new, note = rules.batch_norm(module, len(self.record.usage[name].inputs[0]), self.options.gamma)
        self._replace(name, module, new, note)

    def _pooling(self, name: str, module: nn.Module) -> None:
        new = rules.pooling(module, self.options)
        if isinstance(new, str):
            self._keep(name, module, new, smooth=False)
        else:
            self._replace(name, module, new)

    def _activation(self, name: str, module: nn.Module) -> None:
        new = rules.activation(module, self.options)
        if new is None:
            reason = rules.bend_reason(module)
            self._keep(name, module, reason or "smooth already", smooth=not reason)
        else:
            new = new.to(self.record.usage[name].device, self._float_type)
            note = "β 1, the same function" if type(new) is ScaledActivation else f"β {self.options.beta:g}"
            self._replace(name, module, new, note, attributes=False)

    def _replace(self, name: str, old: nn.Module, new: nn.Module, note: str = "", attributes: bool = True) -> None:
        self._replacements[id(old)] = take_over(old, new, attributes)
        self.rows[name] = Change(name, type(old).__name__, type(new).__name__, note)

    def _keep(self, name: str, module: nn.Module, reason: str, smooth: bool = True) -> None:
        self.rows[name] = Kept(name, type(module).__name__, reason, smooth)
