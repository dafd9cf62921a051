"""What a penalty is, which network it looks at, and the penalty on slopes and curvatures of the layers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_choice, check_int, check_non_negative
from lightning_lcnn._compat import is_compiled
from lightning_lcnn.bounds import CurvatureGraph, trace
from lightning_lcnn.functional.penalty_formulas import reference_penalty, sum_log_penalty
from lightning_lcnn.kernels.modes import whole, without_autocast
from lightning_lcnn.layers.upkeep import log_betas, log_gammas

Schedule = int | Callable[[int], float] | None
MODES = ("bound", "log_hessian", "sum_log", "reference")


class Penalty:
    """Base of the penalties: a weight, its schedule over steps, and the value as a 0-d tensor with a graph.

    A subclass sets ``name`` (under which it is logged) and defines :meth:`terms`. One that differentiates the network
    at the data sets ``needs_batch = True`` and is then called as ``penalty(model, x, target)``; its network runs under
    the caller's autocast. With ``uses_logits = True`` its ``terms`` also takes ``logits``; see :meth:`evaluate`.

    Args:
        weight: Factor λ >= 0 of the penalty in the loss.
        schedule: None: λ is constant. An integer n: λ grows linearly over the first n optimizer steps. A callable:
            maps the optimizer step (0, 1, ...) to a factor of λ; use a function that can be pickled under spawn.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``weight`` is negative or not finite, or an integer ``schedule`` is below 1.

    Source:
        Ours.

    Example:
        >>> class WeightSize(Penalty):
        ...     name = "weight_size"
        ...     def terms(self, model):
        ...         return {"weight_size": sum(p.square().sum() for p in model.parameters())}
        >>> WeightSize(weight=0.5)(nn.Linear(1, 1)).ndim
        0
    """

    name: ClassVar[str]
    needs_batch: ClassVar[bool] = False
    uses_logits: ClassVar[bool] = False

    def __init__(self, weight: float, schedule: Schedule = None) -> None:
        check_non_negative("weight", weight)
        if schedule is not None and not callable(schedule):
            check_int("schedule", schedule)
        self.weight = weight
        self.schedule = schedule

    def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        """Unweighted penalty under the key ``name``, and what else should be logged, each 0-d with a graph."""
        raise NotImplementedError

    def __call__(
        self, model: nn.Module, *inputs: Tensor, step: int | None = None, logits: Tensor | None = None
    ) -> Tensor:
        """Weighted penalty, 0-d; the arguments are those of :meth:`evaluate`."""
        return self.evaluate(model, *inputs, step=step, logits=logits)[0]

    def evaluate(
        self, model: nn.Module, *inputs: Tensor, step: int | None = None, logits: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted penalty and its detached parts: the terms, and the weighted value as ``<name>_penalty``.

        Args:
            model: The network, or a module around it.
            inputs: ``x`` and ``target`` for a penalty that needs the batch.
            step: Number of optimizer steps done, needed by a schedule.
            logits: What the network has returned for ``x``, for a penalty that ``uses_logits`` and can then spare its
                own forward pass. ``x`` must be what the logits were computed from, and require a gradient.

        Returns:
            0-d tensor with a graph, and a dict of 0-d tensors without.
        """
        factor = self.current_weight(step)
        known = {} if logits is None else {"logits": logits}
        with self._precision(model):
            terms = self.terms(model, *inputs, **known)
            value = factor * terms[self.name]
        parts = {key: term.detach() for key, term in terms.items()}
        return value, {**parts, f"{self.name}_penalty": value.detach()}

    def _precision(self, model: nn.Module) -> AbstractContextManager[object]:
        """No autocast for functions of the parameters; a network at the batch runs as the caller runs it."""
        if self.needs_batch:
            return nullcontext()
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return without_autocast(device)  # exp and log of β in bfloat16 keep two digits

    def current_weight(self, step: int | None = None) -> float:
        """λ at an optimizer step, λ·min(1, (step + 1)/n) for an integer schedule n."""
        if self.schedule is None:
            return self.weight
        if step is None:
            raise ValueError(
                "A penalty with a `schedule` needs the optimizer step: call penalty(model, step=...); LCNNMixin and "
                "the penalty callback pass it."
            )
        if callable(self.schedule):
            return self.weight * float(self.schedule(step))
        return self.weight * min(1.0, (step + 1) / self.schedule)


def network_of(module: Any, compiled: bool = False) -> Any:
    """Part of a module that computes the outputs: itself, or its only child to be trained if it has no ``forward``.

    Many Lightning modules define no ``forward`` and call ``self.net(x)`` in their steps. DistributedDataParallel is
    taken off.

    Args:
        module: Network or Lightning module; another callable is returned as it is.
        compiled: Whether the wrapper of ``torch.compile`` stays on, for a network that is to be run and not read.

    Returns:
        The module itself if it defines ``forward``. Otherwise its only child with a β; if there is none, its only
        child with parameters; and itself where that does not tell.

    Source:
        Ours.

    Example:
        >>> from lightning_lcnn.layers import CenteredSoftplus
        >>> holder = nn.ModuleDict({"net": nn.Sequential(CenteredSoftplus()), "criterion": nn.CrossEntropyLoss()})
        >>> network_of(holder) is holder["net"]
        True
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return network_of(module.module, compiled)
    if not isinstance(module, nn.Module) or defines_forward(module) or (compiled and is_compiled(module)):
        return module
    candidates = trained_children(module)
    if len(candidates) > 1:
        candidates = [child for child in candidates if log_betas(child)] or candidates
    return network_of(candidates[0], compiled) if len(candidates) == 1 else module


def defines_forward(module: nn.Module) -> bool:
    """Whether the class says how outputs follow from an input.

    Example:
        >>> defines_forward(nn.Linear(1, 1)), defines_forward(nn.ModuleDict())
        (True, False)
    """
    forward = type(module).forward
    return forward is not nn.Module.forward and forward.__qualname__ != "LightningModule.forward"


def trained_children(module: nn.Module) -> list[nn.Module]:
    """Children with parameters.

    Example:
        >>> trained_children(nn.Sequential(nn.Linear(1, 1), nn.Tanh()))
        [Linear(in_features=1, out_features=1, bias=True)]
    """
    return [child for child in module.children() if any(True for _ in child.parameters())]


class CurvaturePenalty(Penalty):
    r"""Penalty on the slopes and curvatures of the layers, independent of the data.

    .. math:: λ \log \bar C, \quad
              \log \bar C = \mathrm{logsumexp}_i \Big(\log β_i - \log 4 + \sum_{j \le i} \log L_j\Big)

    ``"bound"`` is :math:`\log \bar C` along the traced graph, with residual sums and concatenations as they are: the
    logarithm of the network's curvature bound over its slope bound, as far as the layers' training slopes
    are accurate. ``"log_hessian"`` is :math:`\log K = \log \bar C + \log \bar L`, the bound on the Hessian norm that
    certificates use. ``"sum_log"`` is :math:`\sum \log β + \sum \log γ` and ``"reference"`` is
    :math:`\sum β + \sum |\log γ|`, the forms of paper and research code; they need no graph, count every parameter once
    and bound nothing. Parameters shared by several layers count once there, and once for each use in the graph.

    Args:
        weight: λ. The default 1e-2 lowers each log β with the same total force as Σ log β at 6e-4 does in a network of
            17 activations, where our first explorations lost no accuracy up to 3e-3.
        mode: One of the four above.
        schedule: None, a number of warm-up steps, or a callable from step to factor; see :class:`Penalty`.
        submodule: Dotted name of the part of the model to penalise, for models whose ``forward`` cannot be traced
            as a whole; None for the model itself.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range; when called, if the model has no low-curvature layer, if its graph
            cannot be traced, or if a schedule gets no step.

    Source:
        LCNN (Srinivas et al., 2022); the bound along the graph and its logarithm are ours.

    Example:
        >>> from lightning_lcnn.layers import CenteredSoftplus, SpectralLinear
        >>> net = nn.Sequential(SpectralLinear(3, 3), CenteredSoftplus(beta=4.0), SpectralLinear(3, 1))
        >>> abs(round(CurvaturePenalty(weight=1.0)(net).item(), 3))  # log(β/4) = 0: all slopes are 1
        0.0
        >>> loss = CurvaturePenalty(weight=0.1, mode="sum_log")(net)
    """

    name = "curvature"

    def __init__(
        self,
        weight: float = 1e-2,
        mode: str = "bound",
        schedule: Schedule = None,
        submodule: str | None = None,
    ) -> None:
        super().__init__(weight, schedule)
        check_choice("mode", mode, MODES)
        self.mode = mode
        self.submodule = submodule
        self._graphs = GraphCache()

    def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        """Unweighted value under ``"curvature"``; the graph modes add ``log_slope`` and ``log_curvature``."""
        target = network_of(model) if self.submodule is None else model.get_submodule(self.submodule)
        if self.mode in ("bound", "log_hessian"):
            if not self._graphs.knows(target):
                _log_betas_of(target)
            return self._graph_terms(target)
        formula = sum_log_penalty if self.mode == "sum_log" else reference_penalty
        betas, gammas = _log_betas_of(target), log_gammas(target)
        return {self.name: formula([*map(whole, betas.values())], [*map(whole, gammas.values())])}

    def _graph_terms(self, model: nn.Module) -> dict[str, Tensor]:
        try:
            surrogate = self._graphs.graph(model).surrogate()
        except ValueError as error:
            raise ValueError(
                f"CurvaturePenalty(mode={self.mode!r}) needs the graph of {type(model).__name__}: {error} Other ways "
                "out: mode='sum_log', which needs no graph, or submodule='<name>' for the part that can be traced."
            ) from error
        value = surrogate.log_ratio if self.mode == "bound" else surrogate.log_curvature
        return {
            self.name: value,
            "log_slope": surrogate.log_slope,
            "log_curvature": surrogate.log_curvature,
        }

    def __repr__(self) -> str:
        """Constructor call."""
        return f"CurvaturePenalty(weight={self.weight}, mode={self.mode!r}, schedule={self.schedule!r})"


def _log_betas_of(network: nn.Module) -> dict[str, Tensor]:
    betas = log_betas(network)
    if not betas:
        raise ValueError(
            f"CurvaturePenalty found no CenteredSoftplus in {type(network).__name__}: there is nothing whose "
            "curvature it could lower. Convert the network with `to_low_curvature(model, example_input)` first."
        )
    return betas


class GraphCache:
    """The traced graph of a network, traced at first use and again when its modules have changed.

    Tracing a ResNet-18 takes as long as a small training step, its surrogate a hundredth of that. Copies and pickles
    start empty, for the graph refers to the modules of its own network.

    Source:
        Ours.
    """

    def __init__(self) -> None:
        self._traced: tuple[tuple[int, type], ...] = ()
        self._graph: CurvatureGraph | None = None

    def graph(self, network: nn.Module) -> CurvatureGraph:
        """Graph of ``network``; raises ``ValueError`` where it cannot be traced."""
        modules = _modules_of(network)
        if self._graph is None or self._traced != modules:
            self._graph, self._traced = trace(network), modules
        return self._graph

    def knows(self, network: nn.Module) -> bool:
        """Whether this network, with these modules, was the last one traced."""
        return self._graph is not None and self._traced == _modules_of(network)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the graph."""
        return GraphCache, ()


def _modules_of(network: nn.Module) -> tuple[tuple[int, type], ...]:
    return tuple((id(module), type(module)) for module in network.modules())  # fully_shard changes the class
