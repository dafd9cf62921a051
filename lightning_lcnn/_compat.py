"""The private names of PyTorch, Lightning and torchmetrics that the package reads, each behind a name of its own.

A release that changes one of them is answered here and nowhere else: tests/test_compat.py says what each must mean, and
tests/test_structure.py fails where another module reads a private name. Only torch is imported; trainers, callbacks and
metrics come as arguments, so that this stays the ground floor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

# Base of torch's batch norms, by which torch's update_bn and Lightning's freezing know them; it has no public name.
BatchNorm = _BatchNorm

# Sees every operation below autograd; documented by torch, but published under a private module only.
DispatchMode = TorchDispatchMode

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOKS = (
    *_FORWARD_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


# torch: what state the interpreter is in


def in_function_transform() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work; torch offers no question for either."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_torch_func() -> bool:
    """Whether a transform of ``torch.func`` is at work; torch offers no question for it."""
    return torch._C._are_functorch_transforms_active()


def is_dispatch_recorded() -> bool:
    """Whether a dispatch mode, such as a FLOP counter, watches every operation; torch offers no question for it."""
    return torch._C._len_torch_dispatch_stack() > 0


# torch: operations


def schema_of(operation: Any) -> Any:
    """Names, types and defaults of an ATen operation's arguments, and which of them it writes; not public."""
    return operation._schema


def fake_mode() -> Any:
    """A mode in which operations compute sizes and types alone; torch's own tracers use it, from a private module."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import

    return FakeTensorMode(allow_non_fake_inputs=True)


def depends_on_values(error: Exception) -> bool:
    """Whether such a mode gave up because a number or a size would follow from values; its errors are private."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return isinstance(error, DataDependentOutputException | DynamicOutputShapeException)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Write many tensors over others in one launch; torch's optimizers do so by functions that are not public."""
    torch._foreach_copy_(targets, sources)


# torch: tensors and autograd


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written over; autograd's count, of which the documentation tells but no method."""
    return tensor._version


def storage_address(tensor: Tensor) -> int:
    """Which memory a tensor shares with its views; ``data_ptr`` is 0 for tensors without values."""
    return tensor.untyped_storage()._cdata


def is_executed(node: Any) -> bool:
    """Whether the backward that is running computes this node; torch tells it to functions in C++ alone.

    Raises:
        RuntimeError: For a leaf by which ``autograd.grad`` differentiates.
    """
    return torch._C._will_engine_execute_node(node)


def function_of(node: Any) -> type | None:
    """The custom autograd function that made a node, None for torch's own; the node's class hides it."""
    return getattr(node, "_forward_cls", None)


def softplus_over(x: Tensor, beta: float) -> Tensor:
    """Softplus written over its argument; the public function takes no ``out``."""
    return torch._C._nn.softplus(x, beta, out=x)  # type: ignore[call-arg]


# torch: the compiler


def has_inductor_option(group: str, name: str) -> bool:
    """Whether inductor knows the option ``group.name``; ``torch.compile`` raises for one it does not know."""
    from torch._inductor import config  # takes seconds to import

    return hasattr(getattr(config, group), name)


def prefer_dynamic_size(tensor: Tensor, dimension: int) -> None:
    """Ask for one kernel for all sizes of a dimension; ``torch.compile`` can ask it for all arguments only."""
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def is_compiled(module: Any) -> bool:
    """Whether this is what ``torch.compile`` made of a module; its class has no public name."""
    return "_orig_mod" in getattr(module, "_modules", ())


def uncompiled(module: Any) -> Any:
    """The module within what ``torch.compile`` made of it, others as they are; nothing public leads there."""
    return module._orig_mod if is_compiled(module) else module


# torch: modules


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises over the batch, also a user's own class; the common bases have no public names."""
    return isinstance(module, _NormBase) and not isinstance(module, _InstanceNorm)


def hook_tables(module: nn.Module, forward_only: bool = False) -> dict[str, dict[int, Any]]:
    """The module's hooks by the names of the tables that hold them; hooks can be registered publicly, but not seen."""
    names = _FORWARD_HOOKS if forward_only else _HOOKS
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def has_global_hooks() -> bool:
    """Whether hooks are registered that run at the call of every module; they cannot be seen publicly."""
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def is_hook_attribute(name: str) -> bool:
    """Whether a module keeps hooks, of any kind, or what belongs to them in the attribute of this name."""
    return name.startswith("_") and name.endswith(("_hooks", "_hook", "_with_kwargs", "_always_called"))


def has_hooks_between(module: nn.Module, following: nn.Module) -> bool:
    """Whether a hook sees or changes what passes from one module to the next; hooks cannot be seen publicly."""
    return bool(module._forward_hooks or following._forward_pre_hooks)


# torch: several processes


def is_of_fully_shard(name: str) -> bool:
    """Whether ``fully_shard`` keeps its state in a module's attribute of this name; it cannot be taken off publicly."""
    return name.startswith("__composable_api")


def ignored_by_ddp(module: nn.Module) -> set[str]:
    """Names of parameters and buffers that DDP leaves alone; read and set by a private static method of DDP only."""
    return set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def ignore_in_ddp(module: nn.Module, names: Collection[str]) -> None:
    """Have DDP, which must not wrap the module yet, leave these parameters and buffers alone, and no others."""
    module._ddp_params_and_buffers_to_ignore = sorted(names)  # type: ignore[assignment]


# Lightning


def logs_now(trainer: Any) -> bool:
    """Whether this is a logging step; ``log_every_n_steps`` counts batches that stepped, which is not public either."""
    return trainer._logger_connector.should_update_logs


def logger_step(trainer: Any) -> int:
    """The step under which Lightning logs; ``global_step`` counts the steps of every optimizer."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def averaged_network(callback: Any) -> nn.Module | None:
    """The network that a callback averages, None for others; both averaging callbacks keep it under this name."""
    average = getattr(callback, "_average_model", None)
    return average if isinstance(average, nn.Module) else None


def layer_sync(strategy: Any) -> Any:
    """The plugin with which a strategy synchronises layers, None without; ``sync_batchnorm`` is not kept publicly."""
    return getattr(strategy, "_layer_sync", None)


def set_layer_sync(strategy: Any, plugin: Any) -> None:
    """Put another plugin in its place; the public argument of the trainer comes before there are callbacks."""
    strategy._layer_sync = plugin


# Keys under which LightningCLI saves the class of a module, and what builds the modules among its arguments.
CLASS_PATH, INSTANTIATOR = "_class_path", "_instantiator"


def class_path_of(hyper_parameters: Mapping[str, Any]) -> str:
    """Import path of the class whose arguments LightningCLI has saved, "" where it saved none; a key of its own."""
    return str(hyper_parameters.get(CLASS_PATH, ""))


# torchmetrics: a metric that keeps its precision and survives errors has to reach below ``add_state``

_BOOKKEEPING = ("_update_count", "_to_sync", "_should_unsync", "_enable_grad", "compute_on_cpu", "_is_synced", "_cache")


def bookkeeping_of(metric: Any) -> dict[str, Any]:
    """What ``forward`` changes besides the states and puts back at its end, but not after an error."""
    return {name: getattr(metric, name) for name in _BOOKKEEPING}


def default_states(metric: Any) -> dict[str, Any]:
    """The values to which ``reset`` returns, by name; to be moved with the states, and not public."""
    return metric._defaults


def set_state_dtype(metric: Any, dtype: torch.dtype) -> None:
    """Precision of the states still to be added; ``set_dtype`` casts those that are there, counts included."""
    metric._dtype = dtype


def is_within_set_dtype(metric: Any) -> bool:
    """Whether the cast that is going on was asked for by ``set_dtype``, and not by a module around the metric."""
    return metric._dtype_convert


def forget_result(metric: Any) -> None:
    """Compute anew at the next ``compute``; publicly only ``update`` and ``reset`` do that."""
    metric._computed = None


def keep_out_of_state_dict(metric: Any, state: str) -> None:
    """Undo ``persistent(True)`` for one state; publicly all or none are saved."""
    metric._persistent[state] = False
