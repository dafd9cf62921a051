"""Batch norm and activation computed again in backward, so that only what they were computed from is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lcnn._compat import version_of
from lightning_lcnn.kernels.modes import needs_composite, recomputation

Function = Callable[[Tensor], Tensor]


def recompute_activations(enabled: bool = True) -> AbstractContextManager[Any]:
    r"""Keep less for backward: of a batch norm and the centered softplus behind it only the input of the first.

    Wrap forward in it. Backward computes :math:`\hat y = \mathrm{BN}(x)` and :math:`s(\hat y; β)` again where a
    gradient needs them, by the operations and statistics of forward, so that gradients are the same to the last bit. Of
    a convolution, its batch norm and its activation one tensor is kept: instead of two where the activation works in
    place, of three elsewhere. An activation behind something else, such as a residual sum, keeps its input alone,
    in place its output. Layers that read an activation (the next convolution, pooling) share what is computed again;
    where something writes over it, it is kept as usual.

    Second derivatives, ``retain_graph``, gradient accumulation, autocast and synchronised batch norm work. A network
    under ``torch.compile`` is left to the compiler, which decides itself what to compute again; a block under
    ``torch.utils.checkpoint`` to that.

    Args:
        enabled: False changes nothing, for a flag of yours.

    Returns:
        A context manager.

    Raises:
        RuntimeError: In backward, if a tensor that it needs was written over since, as without the context.
            By torch, on entry within ``torch.func.grad`` and its kin, which take no such hooks; wrap what is outside.

    Source:
        In-Place ABN (Rota Bulò et al., 2018) keeps as little by inverting the activation; recomputation, which needs no
        inverse and loses no digit, is ours.

    Example:
        >>> from torch import nn
        >>> from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralConv2d
        >>> hidden = SpectralConv2d(1, 4, 3), LipschitzBatchNorm2d(4), CenteredSoftplus(inplace=True)
        >>> network = nn.Sequential(*hidden, SpectralConv2d(4, 1, 3))
        >>> with recompute_activations():
        ...     loss = network(torch.ones(2, 1, 8, 8)).sum()
        >>> loss.backward()
    """
    return _Recomputation() if enabled and not torch.compiler.is_compiling() else nullcontext()


# Hooks on saved tensors, because several nodes keep one tensor: an activation is kept by its own node and by the
# convolution that reads it. Only where autograd saves can both get the same recipe. torch.utils.checkpoint would run
# convolutions twice; this runs again what costs 1 to 6 % of a step, for 0.81 instead of 1.03 times the ReLU network's
# memory at width 16. May go when eager torch recomputes pointwise operations itself, as its compiler does.
class _Recomputation(saved_tensors_hooks):
    def __init__(self) -> None:
        super().__init__(_pack, _unpack)

    def __enter__(self) -> None:
        super().__enter__()  # raises within torch.func
        self._outer = _known()
        recomputation.known = WeakTensorKeyDictionary()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        recomputation.known = self._outer


class _Kept:
    """A tensor that nothing computes again. Hooks switch off autograd's own check that it is still the same."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._known_version = tensor.detach(), version_of(tensor)

    def use(self) -> None:
        """Nothing to count."""

    def get(self) -> Tensor:
        if version_of(self._tensor) != self._known_version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self._tensor.shape)} that backward needs was written over after forward, "
                "within `recompute_activations`; do that out of place."
            )
        return self._tensor


class _Recipe:
    """A tensor that is computed again at its first use in backward and let go after the last."""

    def __init__(self, function: Function, source: _Kept | _Recipe) -> None:
        self._function, self._source = function, source
        self._uses = self._left = 0
        self._value: Tensor | None = None

    def use(self) -> None:
        """Announce one more use."""
        if not self._uses:
            self._source.use()
        self._uses += 1

    def get(self) -> Tensor:
        if self._value is None:
            self._left = self._uses
            with torch.no_grad():
                self._value = self._function(self._source.get())
        value, self._left = self._value, self._left - 1
        if self._left <= 0:
            self._value = None
        return value

    def then(self, function: Function) -> _Recipe:
        """The recipe after an operation that writes over its result."""
        before = self._function
        return _Recipe(lambda x: function(before(x)), self._source)


def remember(result: Tensor, source: Tensor, function: Function) -> None:
    """Tell that ``result`` is ``function(source)``, for whoever keeps it within :func:`recompute_activations`.

    Args:
        result: A new tensor.
        source: What it was computed from; ``function`` must hold no graph and change nothing.
        function: Returns a new tensor with the values of ``result``.
    """
    known = _known()
    if known is not None and not needs_composite() and not result.is_inference():
        known[result] = _Recipe(function, _recipe_of(source) or _Kept(source)), version_of(result)


def write_over(x: Tensor, function: Function) -> None:
    """Write ``function(x)`` over x in a custom autograd function, and tell if that can be computed again.

    Args:
        x: Any tensor.
        function: Writes over its argument and returns it.
    """
    recipe = _recipe_of(x)
    function(x)
    if recipe is not None:
        recomputation.known[x] = recipe.then(function), None  # autograd counts the change when forward ends


def _known() -> WeakTensorKeyDictionary | None:
    """Recipe and version of every tensor that can be computed again; None outside :func:`recompute_activations`."""
    return getattr(recomputation, "known", None)


def _recipe_of(tensor: Tensor) -> _Recipe | None:
    known = _known()
    if known is None or tensor not in known:
        return None
    recipe, version = known[tensor]
    if version is None:
        known[tensor] = recipe, version_of(tensor)
    elif version != version_of(tensor):
        return None
    return recipe


def _pack(tensor: Tensor) -> _Kept | _Recipe:
    packed = _recipe_of(tensor) or _Kept(tensor)
    packed.use()
    return packed


def _unpack(packed: _Kept | _Recipe) -> Tensor:
    return packed.get()
