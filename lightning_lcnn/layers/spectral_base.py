"""State of the layers whose weight is divided by its spectral norm; the mathematics is in ``functional``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive
from lightning_lcnn.functional._sharded import scalar, whole
from lightning_lcnn.functional.linear_operators import LinearOperator
from lightning_lcnn.functional.normalized_convolution import SharedGradient, inner_product, positive_norm
from lightning_lcnn.functional.power_iteration import (
    SingularTriplet,
    filtered_power_iteration,
    largest_singular_triplet,
)

_SHARED: weakref.WeakKeyDictionary[nn.Module, SharedGradient] = weakref.WeakKeyDictionary()
_PERTURBATION = 0.03  # costs 1e-5 of σ when nothing overtakes; without it a converged vector cannot change its mind
_STATE = ("weight", "spectral_gradient", "right_vector")


class SpectralLayer(nn.Module):
    """Base of the spectral layers: y = A(W γ/σ) x + b with σ(W) = ⟨W, G⟩.

    G = ∂σ/∂W, the buffer ``spectral_gradient``, is the pull-back of the leading singular pair u vᵀ on the
    weight. It is constant in :meth:`forward`, which therefore costs one dot product and has an exact
    gradient; :meth:`update_spectral_norm` refreshes it from time to time. Whoever changes the weight in
    another way than by small steps (initialisation, averaging, pruning) calls :meth:`reset_spectral_norm`.
    """

    weight: Tensor
    spectral_gradient: Tensor  # shaped like weight
    right_vector: Tensor  # input shape without batch; (0,) until the input size is known
    log_gamma: nn.Parameter | None
    _start: float | None = None  # log γ at the start
    _constant_buffers = _STATE[1:]  # forward only reads them

    def _create_spectral_state(self, gamma: float | None, right_shape: tuple[int, ...] | None) -> None:
        if gamma is not None:
            check_positive("gamma", gamma)
        self._start = None if gamma is None else math.log(gamma)
        log_gamma = None if self._start is None else nn.Parameter(self.weight.new_full((1,), self._start))
        self.register_parameter("log_gamma", log_gamma)
        self.register_buffer("spectral_gradient", torch.zeros_like(self.weight, requires_grad=False))
        self.register_buffer("right_vector", self.weight.new_zeros(right_shape or (0,)))
        self._reset_or_wait()

    @property
    def gamma(self) -> Tensor | None:
        """The gain, exp(log_gamma), shape (), or None."""
        return None if self.log_gamma is None else scalar(self.log_gamma).exp()

    def slope(self) -> Tensor:
        """Slope that the layer is trained to have: the gain, or 1; shape (), differentiable."""
        # from the buffer, which is an ordinary tensor where FSDP2 shards the weight
        return self.spectral_gradient.new_ones(()) if self.log_gamma is None else scalar(self.log_gamma).exp()

    def sigma(self) -> Tensor:
        """Estimate ⟨W, G⟩ of the norm with the raw weight; shape (), differentiable, at least float32."""
        gradient = self.spectral_gradient
        if torch.is_grad_enabled():
            # Autograd keeps it: a refresh, or the buffer broadcast of DDP, may come before backward.
            gradient = gradient.clone()
        return inner_product(self._accurate_weight(), gradient)

    def normalized_weight(self) -> Tensor:
        """The weight that :meth:`forward` uses, W γ/σ; W γ where σ is not positive."""
        scale = self.slope() / positive_norm(self.sigma())
        return (self._accurate_weight() * scale).to(self.weight.dtype)

    @torch.no_grad()
    def update_spectral_norm(self, num_iterations: int = 5) -> Tensor:
        """Refresh G in place by warm-started, filtered power iterations, without host synchronisation.

        The start is the last vector and 3 % of a fixed random one: now and then another singular vector overtakes
        the first in training, and grows from its part in the start.

        Args:
            num_iterations: products with the operator and with its adjoint, each.

        Returns:
            Relative residual of the singular pair, shape ().

        Source:
            Ours; see :func:`lightning_lcnn.functional.filtered_power_iteration`.

        Example:
            >>> from lightning_lcnn.layers import SpectralLinear
            >>> SpectralLinear(3, 2).update_spectral_norm().shape
            torch.Size([])
        """
        if self.right_vector.numel() == 0:
            return self.reset_spectral_norm()
        weight = self._accurate_weight()
        operator = self._operator(weight, self.right_vector.shape)
        with torch.autocast(weight.device.type, enabled=False):
            right = self.right_vector.to(weight.dtype)
            start = _unit(right + _PERTURBATION * _unit(_random(tuple(right.shape), right.device).to(right.dtype)))
            triplet = filtered_power_iteration(operator.apply, operator.adjoint, start, num_iterations)
            self._store(operator, triplet)
        return triplet.residual

    @torch.no_grad()
    def reset_spectral_norm(self, tolerance: float = 1e-3, max_iterations: int = 240) -> Tensor:
        """Find G anew to convergence, from a fixed start: call it after the weight was changed from outside.

        Args:
            tolerance: for the relative residual of σ².
            max_iterations: products with the operator and with its adjoint, each.

        Returns:
            Relative residual of the singular pair, shape ().

        Raises:
            ValueError: when the weight holds numbers that are not finite.

        Source:
            Ours; see :func:`lightning_lcnn.functional.largest_singular_triplet`.

        Example:
            >>> from lightning_lcnn.layers import SpectralLinear
            >>> layer = SpectralLinear(3, 3)
            >>> weight = nn.init.eye_(layer.weight).data.mul_(7.0)
            >>> residual = layer.reset_spectral_norm()
            >>> print(f"{layer.sigma():.3f}")
            7.000
        """
        known = self.right_vector.numel() > 0
        shape = tuple(self.right_vector.shape) if known else self._default_right_shape()
        weight = self._accurate_weight()
        operator = self._operator(weight, shape)
        start = _random(shape, torch.device("cpu"))
        with torch.autocast(weight.device.type, enabled=False):
            triplet = largest_singular_triplet(
                operator.apply, operator.adjoint, start.to(weight), tolerance, max_iterations
            )
            self._store(operator, triplet, right=known)
        return triplet.residual

    @torch.compiler.disable
    @torch.inference_mode(False)
    def _see_input(self, right_shape: tuple[int, ...]) -> None:
        """The one change of state in forward: the first input tells the size at which to iterate."""
        self.right_vector = self.spectral_gradient.new_zeros(right_shape)
        self.reset_spectral_norm()

    def _store(self, operator: LinearOperator, triplet: SingularTriplet, right: bool = True) -> None:
        self._shared_gradient().before_change()
        self.spectral_gradient.copy_(operator.weight_gradient(triplet.left, triplet.right))
        if right:
            self.right_vector.copy_(triplet.right)

    def _shared_gradient(self) -> SharedGradient:
        """Who still reads G; outside the module, which can so be copied and pickled at any time."""
        return _SHARED.setdefault(self, SharedGradient())

    def _reset_or_wait(self) -> None:
        """Converge, or only a first impression while the input size is unknown; nothing without data."""
        if not self.weight.is_meta:
            known = self.right_vector.numel() > 0
            self.reset_spectral_norm(max_iterations=240 if known else 12)

    def _accurate_weight(self) -> Tensor:
        weight = whole(self.weight)
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def _operator(self, weight: Tensor, right_shape: Sequence[int]) -> LinearOperator:
        raise NotImplementedError

    def _default_right_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw new weights as torch does, set γ to its start value, and find G."""
        super().reset_parameters()  # type: ignore[misc]
        if "spectral_gradient" in self._buffers:  # torch's constructor calls this before the buffers exist
            if self.log_gamma is not None and self._start is not None:
                nn.init.constant_(self.log_gamma, self._start)
            self._reset_or_wait()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the input size of the checkpoint; find G anew where the weight came without it."""
        loaded, expected = state_dict.get(prefix + "right_vector"), self._default_right_shape()
        if loaded is not None and loaded.shape != self.right_vector.shape:
            fits = loaded.dim() == len(expected) and loaded.shape[0] == expected[0]
            if fits or loaded.numel() == 0:
                self.right_vector = self.right_vector.new_zeros(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        arrived = [prefix + name in state_dict for name in _STATE]
        if any(arrived) and not all(arrived):
            self._reset_or_wait()


def check_exact_type(layer: nn.Module, expected: type[nn.Module]) -> None:
    """Raise unless ``layer`` is of exactly this class; a subclass may compute something else."""
    if type(layer) is not expected:
        raise TypeError(f"`layer` must be exactly a torch.nn.{expected.__name__}, got {type(layer).__name__}.")


def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Clone the parameters of one layer into another, with device, dtype and training flag."""
    for name, parameter in source.named_parameters(recurse=False):
        copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(target, name, copy)
    target.train(source.training)


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The same vector at every call and on every rank, from a private generator: the global one stays untouched."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)
