"""Linear layers and convolutions divided by their spectral norm; the mathematics is in ``functional``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn._checks import check_positive
from lightning_lcnn.functional.operator_norm import register_linear_layer
from lightning_lcnn.functional.singular_vectors import (
    ConvGeometry,
    LinearOperator,
    SingularTriplet,
    conv_geometry,
    conv_operator,
    filtered_power_iteration,
    largest_singular_triplet,
    matrix_operator,
)
from lightning_lcnn.kernels.layer_operators import scale_weight, takes_operators
from lightning_lcnn.kernels.modes import needs_composite, on_plain_cpu, scalar, whole, without_autocast
from lightning_lcnn.kernels.normalized_convolution import (
    Arguments,
    SharedGradient,
    inner_product,
    normalized_convolution,
    positive_norm,
)

# Graphs that are alive read G in backward, so a refresh must not change it under them, and a copy for each forward
# would cost as much as a second weight. So they share G until it changes. Who reads it is kept outside the layer, which
# would otherwise hold weak references that cannot be pickled; weak keys, so that a layer goes when its network does.
_SHARED: weakref.WeakKeyDictionary[nn.Module, SharedGradient] = weakref.WeakKeyDictionary()
PERTURBATION = 0.03  # costs 1e-5 of σ when nothing overtakes; without it a converged vector cannot change its mind
_STATE = ("weight", "spectral_gradient", "right_vector")
ConvT = TypeVar("ConvT", bound="SpectralConvNd")
LinearT = TypeVar("LinearT", bound="SpectralLinear")


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
        # As large as the weight, and worth it: with G kept, forward pays one dot product for σ and its exact gradient.
        # Made anew from the singular pair in every step it would take 22 ms at width 64 of ResNet-18 instead of 7, and
        # save 9 % of the memory. Buffers, so that both move and are saved with the layer: reloaded, it is bit-equal.
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
        return inner_product(self.accurate_weight(), gradient)

    def normalized_weight(self) -> Tensor:
        """The weight that :meth:`forward` uses, W γ/σ; W γ where σ is not positive."""
        return self._normalized_weight(self.weight.dtype)

    def _weight_of_forward(self) -> Tensor:
        """The same, in the type to which autocast would convert it."""
        kind = self.weight.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return self._normalized_weight(torch.get_autocast_dtype(kind) if mixed else self.weight.dtype)

    def _normalized_weight(self, dtype: torch.dtype) -> Tensor:
        if self.weight.device.type != "cpu" and takes_operators(self.weight, self.spectral_gradient, self.log_gamma):
            gradient = self.shared_gradient().lend(self.spectral_gradient)
            return scale_weight(self.weight, gradient, self.log_gamma, dtype)
        scale = self.slope() / positive_norm(self.sigma())
        return (self.accurate_weight() * scale).to(self.weight.dtype)

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
        weight = self.accurate_weight()
        operator = self._operator(weight, self.right_vector.shape)
        with without_autocast(weight.device):
            right = self.right_vector.to(weight.dtype)
            start = unit_vector(
                right + PERTURBATION * unit_vector(random_vector(tuple(right.shape), right.device, right.dtype))
            )
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
        weight = self.accurate_weight()
        operator = self._operator(weight, shape)
        with without_autocast(weight.device):
            triplet = largest_singular_triplet(
                operator.apply,
                operator.adjoint,
                random_vector(shape, weight.device, weight.dtype),
                tolerance,
                max_iterations,
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
        self.shared_gradient().before_change()
        self.spectral_gradient.copy_(operator.weight_gradient(triplet.left, triplet.right))
        if right:
            self.right_vector.copy_(triplet.right)

    def shared_gradient(self) -> SharedGradient:
        """Who still reads G; outside the module, which can so be copied and pickled at any time."""
        return _SHARED.setdefault(self, SharedGradient())

    def _reset_or_wait(self) -> None:
        """Converge, or only a first impression while the input size is unknown; nothing without data."""
        if not self.weight.is_meta:
            known = self.right_vector.numel() > 0
            self.reset_spectral_norm(max_iterations=240 if known else 12)

    def accurate_weight(self) -> Tensor:
        """The weight, whole, in at least float32."""
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


@lru_cache(maxsize=64)
def random_vector(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same vector at every call, on every rank and device: drawn once on the CPU, from a private generator."""
    with torch.inference_mode(False):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def unit_vector(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)


class SpectralConvNd(SpectralLayer):
    """Base of the spectral convolutions; the subclass names its torch class and inherits from it."""

    torch_class: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    in_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float | None = None,
        input_size: tuple[int, ...] | None = None,
    ) -> None:
        _check_padding_mode(padding_mode)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self._create_spectral_state(gamma, self._right_shape(input_size))

    @classmethod
    def from_layer(
        cls: type[ConvT],
        layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        input_size: tuple[int, ...] | None = None,
        gamma: float | None = None,
    ) -> ConvT:
        """Copy a convolution: parameters, geometry, device, training flag. Its function changes by 1/σ.

        Args:
            layer: exactly the torch class of the same rank.
            input_size: spatial size of the input, or None: the first input tells.
            gamma: start of the gain, or None; ``gamma`` = σ keeps the function.

        Returns:
            A new layer that shares nothing with ``layer``.

        Raises:
            TypeError: when ``layer`` is of another class, which may compute something else.
            ValueError: when its padding mode is not zeros, or ``input_size`` does not fit.

        Source:
            Ours.

        Example:
            >>> from lightning_lcnn.layers import SpectralConv2d
            >>> SpectralConv2d.from_layer(torch.nn.Conv2d(3, 4, 3), input_size=(8, 8)).right_vector.shape
            torch.Size([3, 8, 8])
        """
        check_exact_type(layer, cls.torch_class)
        _check_padding_mode(layer.padding_mode)
        new = cls(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            device="meta",
        )
        copy_parameters(layer, new)
        new._create_spectral_state(gamma, new._right_shape(input_size))
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Apply the normalised layer to (B, in_channels, *size) or (in_channels, *size)."""
        if self.right_vector.numel() == 0:
            self._see_input((self.in_channels, *input.shape[2 - self.weight.dim() :]))
        arguments = self._arguments()
        if arguments is not None and self._is_eager(input):
            gradient = self.shared_gradient().lend(self.spectral_gradient)
            log_gamma = None if self.log_gamma is None else scalar(self.log_gamma)
            return normalized_convolution(input, self.weight, self.bias, log_gamma, gradient, arguments)
        return self._conv_forward(input, self._weight_of_forward(), self.bias)

    def _arguments(self) -> Arguments | None:
        """What ``torch.convolution`` takes; None where the padding before and after a dimension differ."""
        padding = self.padding
        if isinstance(padding, str):
            pairs = self.geometry().padding
            if any(before != after for before, after in pairs):
                return None
            padding = tuple(before for before, _ in pairs)
        return self.stride, padding, self.dilation, False, (0,) * len(padding), self.groups

    def _is_eager(self, input: Tensor) -> bool:
        """Whether the custom function, which keeps less for backward, can stand in for the composed operations."""
        if needs_composite() or torch.is_autocast_enabled("cpu") or input.dim() != self.weight.dim():
            return False
        if not self.weight.requires_grad:  # input measures freeze the weights and have a cheaper second derivative
            return False
        others = (t for t in (self.bias, self.log_gamma) if t is not None)
        return on_plain_cpu(input, self.weight, self.spectral_gradient, *others)

    def extra_repr(self) -> str:
        """Torch's text, and the input size once it is known."""
        size = tuple(self.right_vector.shape[1:])
        return super().extra_repr() + (f", input_size={size}" if size else "")

    def _right_shape(self, input_size: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if input_size is None:
            return None
        geometry = self.geometry()
        fits = len(input_size) == len(self.kernel_size) and min(geometry.output_size(input_size)) > 0
        if not fits:
            raise ValueError(
                f"`input_size` must be the spatial size of the input, {len(self.kernel_size)} integers that "
                f"leave at least one output position, got {input_size!r} for kernel size {self.kernel_size}."
            )
        return (self.in_channels, *input_size)

    def geometry(self) -> ConvGeometry:
        """How the convolution slides."""
        return conv_geometry(self.kernel_size, self.stride, self.padding, self.dilation, self.groups)

    def _operator(self, weight: Tensor, right_shape: Sequence[int]) -> LinearOperator:
        return conv_operator(weight, right_shape[1:], self.geometry())

    def _default_right_shape(self) -> tuple[int, ...]:
        extents = zip(self.kernel_size, self.dilation, strict=True)
        return (self.in_channels, *(d * (k - 1) + 8 for k, d in extents))


def _check_padding_mode(padding_mode: str) -> None:
    if padding_mode != "zeros":
        raise ValueError(
            f"`padding_mode` must be 'zeros', got {padding_mode!r}: the norm of others is not computed. "
            "Use zeros, or a padding layer (nn.ReflectionPad2d, ...) before a convolution without padding."
        )


class SpectralLinear(SpectralLayer, nn.Linear):
    """Linear layer divided by its spectral norm.

    y = (γ/σ) W x + b, with σ = ‖W‖₂ as of the last update of G = ∂σ/∂W.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: add a learnable bias.
        device: as in torch.
        dtype: as in torch.
        gamma: start of the learnable gain γ > 0 (stored as its logarithm); None means no gain, γ = 1.

    Raises:
        ValueError: when ``gamma`` is not a finite number > 0.

    Source:
        LCNN paper (arXiv 2206.07144) divides convolutions by their spectral norm; G is ours.

    Example:
        >>> layer = SpectralLinear(20, 10)
        >>> bool(torch.linalg.matrix_norm(layer.normalized_weight(), 2) < 1.001)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gamma: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._create_spectral_state(gamma, (in_features,))

    @classmethod
    def from_layer(cls: type[LinearT], layer: nn.Linear, gamma: float | None = None) -> LinearT:
        """Copy a linear layer: parameters, device, training flag. Its function changes by 1/σ.

        Args:
            layer: exactly an nn.Linear.
            gamma: start of the gain, or None; ``gamma`` = σ keeps the function.

        Returns:
            A new layer that shares nothing with ``layer``.

        Raises:
            TypeError: when ``layer`` is of another class, which may compute something else.

        Source:
            Ours.

        Example:
            >>> SpectralLinear.from_layer(torch.nn.Linear(3, 2)).weight.shape
            torch.Size([2, 3])
        """
        check_exact_type(layer, nn.Linear)
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        copy_parameters(layer, new)
        new._create_spectral_state(gamma, (layer.in_features,))
        return new

    def forward(self, input: Tensor) -> Tensor:
        """Apply the normalised layer to (..., in_features)."""
        return F.linear(input, self._weight_of_forward(), self.bias)

    def _operator(self, weight: Tensor, right_shape: Sequence[int]) -> LinearOperator:
        return matrix_operator(weight)

    def _default_right_shape(self) -> tuple[int, ...]:
        return (self.in_features,)


class SpectralConv1d(SpectralConvNd, nn.Conv1d):
    """1-d convolution divided by its spectral norm; see :class:`SpectralConv2d`.

    y = conv(x, W γ/σ) + b.

    Example:
        >>> SpectralConv1d(3, 4, 5, padding="same", input_size=(16,)).right_vector.shape
        torch.Size([3, 16])
    """

    torch_class = nn.Conv1d


class SpectralConv2d(SpectralConvNd, nn.Conv2d):
    """2-d convolution divided by its spectral norm at the true input size.

    y = conv(x, W γ/σ) + b, with σ the operator norm on zero-padded inputs of ``input_size`` as of the last
    update of G = ∂σ/∂W, for any stride, dilation, groups and padding.

    Args:
        in_channels: as in torch.
        out_channels: as in torch.
        kernel_size: as in torch.
        stride: as in torch.
        padding: as in torch.
        dilation: as in torch.
        groups: as in torch.
        bias: as in torch.
        padding_mode: only "zeros".
        device: as in torch.
        dtype: as in torch.
        gamma: start of the learnable gain γ > 0 (stored as its logarithm); None means no gain, γ = 1.
        input_size: spatial size (H, W) of the inputs. None: the first forward sees it and iterates to
            convergence then; before that, G belongs to a small default size. Larger inputs that come later
            may have a slightly larger norm.

    Raises:
        ValueError: when ``gamma``, ``padding_mode`` or ``input_size`` is out of range.

    Source:
        LCNN paper (arXiv 2206.07144) divides convolutions by their spectral norm; the exact
        operator (stride, padding, input size) and the constant G are ours.

    Example:
        >>> layer = SpectralConv2d(3, 8, 3, stride=2, padding=1, input_size=(32, 32))
        >>> layer(torch.randn(4, 3, 32, 32)).shape
        torch.Size([4, 8, 16, 16])
    """

    torch_class = nn.Conv2d


class SpectralConv3d(SpectralConvNd, nn.Conv3d):
    """3-d convolution divided by its spectral norm; see :class:`SpectralConv2d`.

    y = conv(x, W γ/σ) + b.

    Example:
        >>> SpectralConv3d(2, 4, 3, input_size=(6, 6, 6)).right_vector.shape
        torch.Size([2, 6, 6, 6])
    """

    torch_class = nn.Conv3d


for _kind in (SpectralLinear, SpectralConv1d, SpectralConv2d, SpectralConv3d):
    register_linear_layer(_kind, _kind.normalized_weight)
