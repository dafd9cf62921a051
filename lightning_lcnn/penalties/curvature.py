"""Penalty on the slopes and curvatures of the layers, and the traced graph it keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_lcnn._checks import check_choice
from lightning_lcnn.bounds import CurvatureGraph, trace
from lightning_lcnn.functional._sharded import whole
from lightning_lcnn.functional.penalties import reference_penalty, sum_log_penalty
from lightning_lcnn.layers.parameter_groups import log_betas, log_gammas
from lightning_lcnn.penalties.base import Penalty, Schedule
from lightning_lcnn.penalties.network import network_of

MODES = ("bound", "log_hessian", "sum_log", "reference")


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
        self._cache = GraphCache()

    def terms(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        """Unweighted value under ``"curvature"``; the graph modes add ``log_slope`` and ``log_curvature``."""
        target = network_of(model) if self.submodule is None else model.get_submodule(self.submodule)
        betas = log_betas(target)
        if not betas:
            raise ValueError(
                f"CurvaturePenalty found no CenteredSoftplus in {type(target).__name__}: there is nothing whose "
                "curvature it could lower. Convert the network with `to_low_curvature(model, example_input)` first."
            )
        if self.mode in ("bound", "log_hessian"):
            return self._graph_terms(target)
        formula = sum_log_penalty if self.mode == "sum_log" else reference_penalty
        return {self.name: formula([*map(whole, betas.values())], [*map(whole, log_gammas(target).values())])}

    def _graph_terms(self, model: nn.Module) -> dict[str, Tensor]:
        try:
            surrogate = self._cache.graph(model).surrogate()
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


class GraphCache:
    """The traced graph of a network, traced at first use and again when its modules have changed.

    Tracing a ResNet-18 takes as long as a small training step, its surrogate a hundredth of that. Copies and pickles
    start empty, for the graph refers to the modules of its own network.

    Source:
        Ours.
    """

    def __init__(self) -> None:
        self._modules: tuple[tuple[int, type], ...] = ()
        self._graph: CurvatureGraph | None = None

    def graph(self, network: nn.Module) -> CurvatureGraph:
        """Graph of ``network``; raises ``ValueError`` where it cannot be traced."""
        modules = tuple((id(module), type(module)) for module in network.modules())  # fully_shard changes the class
        if self._graph is None or modules != self._modules:
            self._graph, self._modules = trace(network), modules
        return self._graph

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the graph."""
        return GraphCache, ()
