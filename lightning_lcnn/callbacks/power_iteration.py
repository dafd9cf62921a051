"""Keep the spectral norms up to date during training, of averaged weights too, as often as asked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lcnn._checks import check_int, check_positive
from lightning_lcnn._compat import averaged_network, ignore_in_ddp, ignored_by_ddp, layer_sync, logs_now, set_layer_sync
from lightning_lcnn.callbacks.base import Callback, check_strategy, phase
from lightning_lcnn.layers.batch_norm import convert_sync_batchnorm, revert_sync_batchnorm
from lightning_lcnn.layers.spectral import SpectralLayer
from lightning_lcnn.layers.upkeep import (
    low_curvature_parameters,
    reset_spectral_norm,
    spectral_layers,
    spectral_norms,
    update_spectral_norm,
)

_LEAST, _MOST = 10, 80  # steps between adaptive refreshes


class PowerIteration(Callback):
    r"""Refresh the spectral norm of every spectral layer every few optimizer steps.

    .. math:: v ← W^\top W \, T_{k-1}(W^\top W / c - 1) \, v, \quad u = \frac{W v}{\|W v\|}, \quad
              G = \partial (u^\top W v) / \partial W, \quad σ(W) = \langle W, G \rangle

    At the start of a fit every layer is iterated to convergence. A resumed fit goes on from the vectors in the
    checkpoint, at the same steps as without the interruption. The result depends only on weights and vectors, so
    processes agree without communication; DDP is told not to broadcast the vectors.
    The largest residual :math:`\|W^\top u - σ v\| / σ` is logged as ``lcnn/spectral_residual`` on logging steps.
    Without spectral layers the callback only checks strategy and optimizers.
    With ``Trainer(sync_batchnorm=True)`` it sees to it that our batch norms are synchronised and keep γ
    (:func:`~lightning_lcnn.layers.convert_sync_batchnorm`).

    Where a callback averages the weights (WeightAveraging, EMAWeightAveraging), the norms of the averaged network are
    iterated to convergence before it is validated or saved and when it takes the network's place at the end.

    :class:`~lightning_lcnn.LCNNMixin` adds this callback with its defaults where the trainer has none.

    Args:
        every_n_steps: Optimizer steps between refreshes. At 10, they cost 0.7 % of the training of a ResNet-18 of width
            16 at batch 128, and 2 % of width 64 at batch 32. ``"auto"`` starts with 10 and refreshes as often as the
            norms change, every 10 to 80 steps: half as often where a refresh changed no norm by a quarter of
            ``max_change``, twice as often where it changed one by more.
        num_iterations: Products k with each layer and with its adjoint in a refresh. One loses track where singular
            vectors overtake each other: σ fell short by 8 % on average after 100 steps of SGD at 0.05 (ResNet-18 of
            width 8), by 0.5 % with 5.
        tolerance: Relative residual of σ² at which the convergence at the start stops.
        max_iterations: Iterations after which it stops in any case, with a warning.
        max_change: Relative change of a norm in a refresh, for ``"auto"``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; at setup, under FSDP1 and DeepSpeed ZeRO stage 3; when the fit
            starts, if weights are averaged and a spectral layer does not know its input size yet.

    Source:
        LCNN (Srinivas et al., 2022) refreshes in every forward; the constant G, the interval and the Chebyshev filter
        T (:func:`~lightning_lcnn.functional.filtered_power_iteration`) are ours.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PowerIteration(every_n_steps=20)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        every_n_steps: int | str = 10,
        num_iterations: int = 5,
        tolerance: float = 1e-3,
        max_iterations: int = 240,
        max_change: float = 0.01,
    ) -> None:
        self._schedule = refresh_schedule(every_n_steps, max_change)
        check_int("num_iterations", num_iterations)
        check_positive("tolerance", tolerance)
        check_int("max_iterations", max_iterations)
        self.every_n_steps = every_n_steps
        self.num_iterations = num_iterations
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.max_change = max_change
        self.residual: Tensor | None = None  # () of the last refresh
        self._active = False
        self._restored = False

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse sharding strategies; spare DDP a broadcast of as many bytes as the weights have; keep γ in sync."""
        if stage != "fit":
            return
        check_strategy(trainer.strategy)
        keep_gamma_in_sync(trainer.strategy)
        _exclude_from_broadcast(pl_module)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Undo :meth:`setup`."""
        leave_sync_to_lightning(trainer.strategy)

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers, and converge unless this fit continues another one."""
        check_optimizers(trainer.optimizers, pl_module)
        check_averages(trainer, pl_module)
        self._active = any(True for _ in spectral_layers(pl_module))
        continued = self._restored or trainer.global_step > 0
        self._restored = False
        if not self._active or continued:
            return
        self._schedule.refreshed(0, None)
        with phase(trainer, "power_iteration"):
            self.residual = reset_spectral_norm(pl_module, self.tolerance, self.max_iterations)
        if float(self.residual) > self.tolerance:
            warnings.warn(
                f"The spectral norms reached a residual of {float(self.residual):.1e} in {self.max_iterations} "
                f"iterations, not {self.tolerance:.1e}: raise `max_iterations` or `tolerance` of PowerIteration.",
                UserWarning,
            )

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Refresh at the first batch of each interval of optimizer steps."""
        if not self._active:
            return
        if self._schedule.is_due(trainer.global_step):
            with phase(trainer, "power_iteration"):
                self._schedule.refreshed(trainer.global_step, self._refresh(pl_module))
        if self.residual is not None and logs_now(trainer):
            pl_module.log("lcnn/spectral_residual", self.residual)

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the averaged network valid before its callback puts it in the network's place."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            converge_averages(trainer, self.tolerance, self.max_iterations)

    @override
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Make the averaged network valid, in place: the checkpoint may hold its tensors already."""
        converge_averages(trainer, self.tolerance, self.max_iterations)

    @override
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the network valid that has got the averaged weights."""
        if averaged_networks(trainer):
            reset_spectral_norm(pl_module, self.tolerance, self.max_iterations)

    def _refresh(self, module: torch.nn.Module) -> Tensor | None:
        """Refresh all norms; with an adaptive interval return their largest relative change, 0-d."""
        adaptive = isinstance(self._schedule, AdaptiveInterval)
        before = spectral_norms(module) if adaptive else None
        self.residual = update_spectral_norm(module, self.num_iterations)
        return None if before is None else (spectral_norms(module) / before - 1.0).abs().amax()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What decides the next refresh; everything else is in the layers' buffers."""
        return {"interval": self._schedule.state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the same interval."""
        self._schedule.load_state(state_dict["interval"])
        self._restored = True


def _exclude_from_broadcast(module: torch.nn.Module) -> None:
    ignored = ignored_by_ddp(module)
    layers = {id(layer) for layer in spectral_layers(module)}
    for prefix, layer in module.named_modules():
        if id(layer) in layers:
            ignored |= {f"{prefix}.{name}" for name in ("spectral_gradient", "right_vector")}
    if ignored:
        ignore_in_ddp(module, ignored)


class FixedInterval:
    """Once in each interval of n steps."""

    def __init__(self, length: int) -> None:
        check_int("every_n_steps", length)
        self.length = length
        self._interval: int | None = None  # number of the interval that has been refreshed

    def is_due(self, step: int) -> bool:
        """Whether this step's interval has not been refreshed."""
        return step // self.length != self._interval

    def refreshed(self, step: int, change: Tensor | None) -> None:
        """Remember the refresh."""
        self._interval = step // self.length

    def state(self) -> Any:
        """Everything that decides the next refresh, for a checkpoint."""
        return self._interval

    def load_state(self, state: Any) -> None:
        """Go on in the same interval."""
        self._interval = state


class AdaptiveInterval:
    """Twice as many steps to the next refresh where the norms hardly changed, half where they changed too much.

    The change of the last refresh is read at the earliest step at which the next one can be due. On CUDA it was copied
    to the host long before, so nothing waits.
    """

    def __init__(self, max_change: float) -> None:
        self.max_change = max_change
        self.length = _LEAST
        self._last: int | None = None  # step of the last refresh
        self._change: tuple[Tensor, Any] | None = None  # of the last refresh on the host, and when it will be there

    def is_due(self, step: int) -> bool:
        """Whether enough steps have passed since the last refresh."""
        if self._last is None:
            return True
        if step < self._last + _LEAST:
            return False
        self._read_change()
        return step >= self._last + self.length

    def refreshed(self, step: int, change: Tensor | None) -> None:
        """Remember the refresh and the largest relative change of a norm in it; None starts over."""
        self._last = step
        self._change = None if change is None else _copy_to_host(change)
        if change is None:
            self.length = _LEAST

    def state(self) -> Any:
        """Everything that decides the next refresh, for a checkpoint."""
        self._read_change()
        return {"last": self._last, "length": self.length}

    def load_state(self, state: Any) -> None:
        """Go on towards the same step."""
        self._last, self.length, self._change = state["last"], state["length"], None

    def _read_change(self) -> None:
        if self._change is None:
            return
        value, event = self._change
        if event is not None:
            event.synchronize()
        self._change = None
        if value > self.max_change:
            self.length = max(self.length // 2, _LEAST)
        elif value < self.max_change / 4:
            self.length = min(self.length * 2, _MOST)


def refresh_schedule(every_n_steps: int | str, max_change: float) -> FixedInterval | AdaptiveInterval:
    """Return the schedule that :class:`~lightning_lcnn.PowerIteration` has for its arguments."""
    check_positive("max_change", max_change)
    if every_n_steps == "auto":
        return AdaptiveInterval(max_change)
    if isinstance(every_n_steps, str):
        raise ValueError(f"`every_n_steps` must be an integer or 'auto', got {every_n_steps!r}.")
    return FixedInterval(every_n_steps)


def _copy_to_host(value: Tensor) -> tuple[Tensor, Any]:
    if not value.is_cuda:
        return value, None
    host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def averaged_networks(trainer: Any) -> list[nn.Module]:
    """Averages with spectral layers that the trainer's callbacks keep."""
    found = map(averaged_network, trainer.callbacks)
    return [module for module in found if module is not None and any(True for _ in spectral_layers(module))]


def converge_averages(trainer: Any, tolerance: float, max_iterations: int) -> None:
    """Iterate the averaged networks to convergence: the average of G is no gradient of their norms."""
    for average in averaged_networks(trainer):
        reset_spectral_norm(average, tolerance, max_iterations)


def check_averages(trainer: Any, module: nn.Module) -> None:
    """Refuse layers of unknown input size, whose buffers would change their shape and could not be averaged."""
    if not any(hasattr(average, "n_averaged") for average in averaged_networks(trainer)):
        return
    for name, layer in module.named_modules():
        if isinstance(layer, SpectralLayer) and layer.right_vector.numel() == 0:
            raise ValueError(
                f"{name} ({type(layer).__name__}) has not seen an input, and its first one will change the shape of a "
                "buffer, which weight averaging cannot follow: give the layer its `input_size`, or run the network "
                "once before the fit."
            )


class _SyncKeepingGamma:
    """In place of Lightning's plugin for ``sync_batchnorm=True``, which calls torch's converter, and that drops γ.

    The strategy applies it once the network is complete (``configure_model``) and before DDP wraps it.
    """

    def __init__(self, plugin: Any) -> None:
        self.plugin = plugin

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise all batch norms, ours with γ."""
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo it, as Lightning does at the end of a fit."""
        revert_sync_batchnorm(model)
        return self.plugin.revert(model)


def keep_gamma_in_sync(strategy: Any) -> None:
    """Have the strategy synchronise our batch norms if it shall synchronise any; a user's own plugin is left alone."""
    plugin = layer_sync(strategy)
    if type(plugin).__name__ == "TorchSyncBatchNorm":  # of either package
        set_layer_sync(strategy, _SyncKeepingGamma(plugin))


def leave_sync_to_lightning(strategy: Any) -> None:
    """Give the strategy its own plugin back."""
    plugin = layer_sync(strategy)
    if isinstance(plugin, _SyncKeepingGamma):
        set_layer_sync(strategy, plugin.plugin)


def check_optimizers(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Warn where an optimizer decays β or γ, and where none has them."""
    names = {id(parameter): name for name, parameter in low_curvature_parameters(module)}
    decayed, present = [], set()
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        ours = [id(parameter) for parameter in group["params"] if id(parameter) in names]
        present.update(ours)
        if group.get("weight_decay", 0):
            decayed += [names[key] for key in ours]
    if decayed:
        warnings.warn(
            f"The optimizer decays {_list(decayed)}, which pulls β and γ to 1. Build it with "
            "`lcnn_parameter_groups(self, weight_decay=...)`.",
            UserWarning,
        )
    absent = [name for key, name in names.items() if key not in present]
    if absent:
        warnings.warn(
            f"No optimizer has {_list(absent)}, so they keep their start values. Pass "
            "`lcnn_parameter_groups(self, weight_decay=...)` to it, or freeze them with `requires_grad_(False)`.",
            UserWarning,
        )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
