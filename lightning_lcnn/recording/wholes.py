"""Which modules may be taken as a whole, and how their calls are seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_lcnn._compat import has_global_hooks, hook_tables


def is_intact(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class and nothing else.

    False with hooks (weight norm, spectral norm and pruning are hooks too), with parametrizations, with a method
    replaced on the instance, or a ``forward`` that was put into the class from another package.
    """
    return not has_global_hooks() and not _is_hooked(module) and is_intact_between_hooks(module)


def is_intact_between_hooks(module: nn.Module) -> bool:
    """Whether the module's ``forward``, without the hooks before and after it, is that of its class alone."""
    parts = [part for part in module.modules() if part is not module]
    if parts and (has_global_hooks() or any(map(_is_hooked, parts))):
        return False
    return all(map(_is_plain, module.modules()))


def _is_hooked(module: nn.Module) -> bool:
    return any(hook_tables(module, forward_only=True).values())


def _is_plain(module: nn.Module) -> bool:
    kind = type(module)
    replaced = any(callable(value) and hasattr(kind, name) for name, value in module.__dict__.items())
    return not (replaced or parametrize.is_parametrized(module)) and _defines_its_forward(kind)


def _defines_its_forward(kind: type[nn.Module]) -> bool:
    packages = {base.__module__.split(".")[0] for base in kind.__mro__}
    forward: Any = kind.forward
    return str(getattr(forward, "__module__", "")).split(".")[0] in packages and not hasattr(forward, "__wrapped__")


Seen = Callable[[Callable[..., Any], nn.Module, Any, Any], Any]
_active = threading.local()
_lock = threading.Lock()
_watchers = 0
_original: Any = None


@contextmanager
def module_calls_seen_by(see: Seen) -> Iterator[None]:
    """Have ``see(original, module, args, kwargs)`` answer every call of a module in this thread.

    torch has no hook that may answer in the place of ``forward``, so ``nn.Module.__call__`` is replaced, as torch.fx
    does it while tracing. Other threads pass through; the first of several recordings replaces, the last puts back.
    """
    before = getattr(_active, "see", None)
    _watch(+1)
    _active.see = see
    try:
        yield
    finally:
        _active.see = before
        _watch(-1)


def _watch(change: int) -> None:
    global _watchers, _original
    with _lock:
        if _watchers == 0:
            _original = nn.Module.__call__
            nn.Module.__call__ = _answered(_original)  # type: ignore[method-assign]
        _watchers += change
        if _watchers == 0:
            nn.Module.__call__ = _original  # type: ignore[method-assign]


def _answered(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        see = getattr(_active, "see", None)
        return original(self, *args, **kwargs) if see is None else see(original, self, args, kwargs)

    return call
