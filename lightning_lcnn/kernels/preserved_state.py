"""Leave the user's model, its gradients, its hooks and the random state as they were found."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._compat import hook_tables


@contextmanager
def preserved_random_state(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Restore the global generators of torch (host and ``device``), NumPy and Python; seed them inside."""
    numpy: Any = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type in ("cuda", "xpu") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            if seed is not None:
                random.seed(seed)
                torch.default_generator.manual_seed(seed)
                if devices:  # torch.manual_seed would reach devices whose state is not kept
                    with torch.get_device_module(device).device(device):
                        torch.get_device_module(device).manual_seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed)
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


@contextmanager
def preserved_model_state(model: Any) -> Iterator[None]:
    """Keep every submodule's mode and hooks and every parameter's gradient and ``requires_grad``.

    Inside, parameters need no gradient (cheaper graphs) and hold none, so nothing can be added to the user's.
    The same is done when the body raises.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    hooks = [{name: dict(table) for name, table in hook_tables(module).items()} for module in modules]
    gradients = [(parameter.grad, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        yield
    finally:
        for module, mode, kept in zip(modules, modes, hooks, strict=True):
            module.training = mode
            for name, table in hook_tables(module).items():
                _refill(table, kept[name])
        for parameter, (gradient, requires_grad) in zip(parameters, gradients, strict=True):
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _refill(current: dict[int, Any], entries: dict[int, Any]) -> None:
    """Restore in place: the handles that users hold point at this very dictionary."""
    if list(current.items()) != list(entries.items()):
        current.clear()
        current.update(entries)


def copy_without_hooks(module: nn.Module) -> Any:
    """A deep copy that leaves the hooks behind, which may hold what cannot be copied, such as a profiler's records."""
    hooks = [table for submodule in module.modules() for table in hook_tables(submodule).values()]
    return copy.deepcopy(module, {id(entries): type(entries)() for entries in hooks})


@contextmanager
def measuring(model: Any, x: Tensor, *, seed: int | None = None, autocast: bool = False) -> Iterator[None]:
    """Gradients on, inference mode off, all state preserved; autocast off unless asked for.

    Second derivatives in bfloat16 carry two digits, so the measures switch autocast off.

    Raises:
        RuntimeError: where the model holds tensors made in inference mode, with the way out.
    """
    mixed = torch.is_autocast_enabled(x.device.type) and autocast
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=mixed),
        _inference_tensor_errors(),
        preserved_random_state(x.device, seed),
        preserved_model_state(model),
    ):
        yield


@contextmanager
def _inference_tensor_errors() -> Iterator[None]:
    """Add the way out to torch's errors about tensors made in inference mode."""
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise RuntimeError(
            "the model holds tensors made in inference mode, which cannot be differentiated (FSDP2 keeps such "
            "buffers after its first forward in inference mode). Use Trainer(inference_mode=False), or "
            "torch.no_grad() in place of torch.inference_mode()."
        ) from error
