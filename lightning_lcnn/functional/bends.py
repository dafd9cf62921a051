"""The one list of torch's operations that bend, have a kink or jump, under every name that torch gives them.

The recorder of a run knows an operation by its ATen name, the measures by the node in an autograd graph, the bounds and
the conversion by module class, function or method: all read this table. Our own layers have entries of the same form in
``bounds/rules/activations.py``. tests/functional/test_bends.py compares every entry with torch itself.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_lcnn.functional import curves
from lightning_lcnn.functional.curves import Curve


@dataclass(frozen=True)
class Bend:
    """One operation that bends, has a kink or jumps.

    Args:
        name: what we call it, unique in the table.
        curve: the ranges of its derivatives; its parameters are the function's arguments after the input and attributes
            of the module. None for what is no function of one number, such as a maximum: that has a kink.
        modules: exact classes.
        functions: Python functions that take the input first.
        methods: names of tensor methods.
        aten: ATen operations, without the underscore of the in-place form.
        nodes: autograd nodes, up to the word Backward in their names.
        run: the curve at the arguments that ATen gets after the input; None where these are those of ``curve``.
        parts: ATen operations of which the functions are composed, where ATen has none for the whole.
        jumps: whether its values jump, so that it has no slope.
        telling: whether its node tells that the network has a kink. Some also stand in smooth functions (the absolute
            value in softsign, the largest logit taken off before an exponential, a floor under a norm) or act on
            weights alone (the largest slope of our batch norm), and a graph, unlike the record of a run, does not show
            the line of code.

    Example:
        >>> [bend.name for bend in BENDS if nn.SELU in bend.modules], OF_ATEN["elu"].has_kink(1.67, 1.05)
        (['selu'], True)
    """

    name: str
    curve: Callable[..., Curve] | None
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    aten: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    run: Callable[..., Curve] | None = None
    parts: tuple[str, ...] = ()
    jumps: bool = False
    telling: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the function's arguments after the input, as far as the curve depends on them."""
        return () if self.curve is None else tuple(inspect.signature(self.curve).parameters)

    def has_kink(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it has a kink or jumps at these arguments, which are ATen's after the input."""
        curve = self.run or self.curve
        kwargs.pop("out", None)
        return curve is None or curve(*args, **kwargs).has_kink

    def node_has_kink(self, node: Any) -> bool:
        """Whether it has a kink or jumps as a node of an autograd graph, which keeps the numbers it was called with.

        Numbers have a default and stay when the graph is freed; tensors (the slopes of PReLU) do not, and reading one
        could set off a recomputation.
        """
        curve = self.run or self.curve
        parameters = {} if curve is None else inspect.signature(curve).parameters
        if curve is None or any(parameter.default is parameter.empty for parameter in parameters.values()):
            return True
        return curve(**{name: getattr(node, f"_saved_{name}", p.default) for name, p in parameters.items()}).has_kink


def _rrelu_as_run(
    noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Curve:
    return curves.rrelu(lower, upper, training)


def _encoder_as_run(*args: Any, **kwargs: Any) -> Curve:
    _, _, _, _, _, _, uses_gelu, *_ = args  # sizes, and weights of the attention
    return curves.gelu() if uses_gelu else curves.relu()


# Functions of one number. SELU and ReLU6 are to ATen what stands before them, at arguments of their own.
ELEMENTWISE = (
    Bend("tanh", curves.tanh, (nn.Tanh,), (torch.tanh, F.tanh, torch.tanh_), ("tanh", "tanh_"), ("tanh",), ("Tanh",)),
    Bend(
        "sigmoid",
        curves.sigmoid,
        (nn.Sigmoid,),
        (torch.sigmoid, F.sigmoid, torch.sigmoid_),
        ("sigmoid", "sigmoid_"),
        ("sigmoid",),
        ("Sigmoid",),
    ),
    Bend(
        "logsigmoid",
        curves.logsigmoid,
        (nn.LogSigmoid,),
        (F.logsigmoid,),
        aten=("log_sigmoid_forward",),
        nodes=("LogSigmoid",),
    ),
    Bend("softplus", curves.softplus, (nn.Softplus,), (F.softplus,), aten=("softplus",), nodes=("Softplus",)),
    Bend("silu", curves.silu, (nn.SiLU,), (F.silu,), aten=("silu",), nodes=("Silu",)),
    Bend("gelu", curves.gelu, (nn.GELU,), (F.gelu,), aten=("gelu",), nodes=("Gelu",)),
    Bend("mish", curves.mish, (nn.Mish,), (F.mish,), aten=("mish",), nodes=("Mish",)),
    Bend("elu", curves.elu, (nn.ELU,), (F.elu,), aten=("elu",), nodes=("Elu",), run=curves.scaled_elu),
    Bend("scaled_elu", curves.scaled_elu, (), (F.elu_,), aten=("elu",), nodes=("Elu",), run=curves.scaled_elu),
    Bend(
        "selu",
        curves.selu,
        (nn.SELU,),
        (F.selu, torch.selu, torch.selu_),
        aten=("elu",),
        nodes=("Elu",),
        run=curves.scaled_elu,
    ),
    Bend("celu", curves.celu, (nn.CELU,), (F.celu, torch.celu, torch.celu_), aten=("celu",), nodes=("Celu",)),
    Bend("softsign", curves.softsign, (nn.Softsign,), (F.softsign,), parts=("abs", "add", "div")),
    Bend("tanhshrink", curves.tanhshrink, (nn.Tanhshrink,), (F.tanhshrink,), parts=("tanh", "sub")),
    Bend(
        "relu",
        curves.relu,
        (nn.ReLU,),
        (F.relu, torch.relu, torch.relu_),
        ("relu", "relu_"),
        ("relu",),
        ("Relu",),
    ),
    Bend(
        "leaky_relu",
        curves.leaky_relu,
        (nn.LeakyReLU,),
        (F.leaky_relu, F.leaky_relu_),
        aten=("leaky_relu",),
        nodes=("LeakyRelu",),
    ),
    Bend(
        "rrelu",
        curves.rrelu,
        (nn.RReLU,),
        (F.rrelu, torch.rrelu, torch.rrelu_),
        aten=("rrelu_with_noise",),
        nodes=("RreluWithNoise",),
        run=_rrelu_as_run,
    ),
    Bend("prelu", curves.prelu, (nn.PReLU,), (F.prelu,), ("prelu",), aten=("_prelu_kernel",), nodes=("PreluKernel",)),
    Bend(
        "hardtanh",
        curves.hardtanh,
        (nn.Hardtanh,),
        (F.hardtanh, F.hardtanh_),
        aten=("hardtanh",),
        nodes=("Hardtanh",),
        run=curves.hardtanh,
    ),
    Bend("relu6", curves.relu6, (nn.ReLU6,), (F.relu6,), aten=("hardtanh",), nodes=("Hardtanh",), run=curves.hardtanh),
    Bend(
        "hardsigmoid",
        curves.hardsigmoid,
        (nn.Hardsigmoid,),
        (F.hardsigmoid,),
        aten=("hardsigmoid",),
        nodes=("Hardsigmoid",),
    ),
    Bend("hardswish", curves.hardswish, (nn.Hardswish,), (F.hardswish,), aten=("hardswish",), nodes=("Hardswish",)),
    Bend(
        "softshrink", curves.softshrink, (nn.Softshrink,), (F.softshrink,), aten=("softshrink",), nodes=("Softshrink",)
    ),
    Bend(
        "abs",
        curves.absolute,
        (),
        (torch.abs, torch.abs_, torch.absolute, abs, operator.abs),
        ("abs", "abs_", "absolute", "absolute_"),
        ("abs",),
        ("Abs",),
        telling=False,
    ),
    Bend("sin", curves.sine, (), (torch.sin, torch.sin_), ("sin", "sin_"), ("sin",), ("Sin",)),
    Bend("cos", curves.sine, (), (torch.cos, torch.cos_), ("cos", "cos_"), ("cos",), ("Cos",)),
    Bend(
        "clamp",
        curves.clamp,
        (),
        (torch.clamp, torch.clamp_, torch.clip, torch.clip_),
        ("clamp", "clamp_", "clip", "clip_"),
        ("clamp",),
        ("Clamp",),
        telling=False,
    ),
    Bend(
        "clamp_min",
        curves.clamp_min,
        (),
        (torch.clamp_min, torch.clamp_min_),
        ("clamp_min", "clamp_min_"),
        ("clamp_min",),
        ("ClampMin",),
        telling=False,
    ),
    Bend(
        "clamp_max",
        curves.clamp_max,
        (),
        (torch.clamp_max, torch.clamp_max_),
        ("clamp_max", "clamp_max_"),
        ("clamp_max",),
        ("ClampMax",),
        telling=False,
    ),
    Bend(
        "hardshrink",
        curves.hardshrink,
        (nn.Hardshrink,),
        (F.hardshrink,),
        ("hardshrink",),
        ("hardshrink",),
        ("Hardshrink",),
        jumps=True,
    ),
    Bend(
        "threshold",
        curves.threshold,
        (nn.Threshold,),
        (F.threshold, torch.threshold, torch.threshold_),
        aten=("threshold",),
        nodes=("Threshold",),
        jumps=True,
    ),
)


def _jump(name: str, curve: Callable[..., Curve], *others: str) -> Bend:
    """A function of one number that ATen, autograd and Python call alike."""
    names = [spelling for function in (name, *others) for spelling in (function, f"{function}_")]
    functions = tuple(getattr(torch, spelling) for spelling in names if hasattr(torch, spelling))
    return Bend(name, curve, (), functions, tuple(names), (name,), (name.title(),), jumps=True)


JUMPS = (
    _jump("sign", curves.steps),
    _jump("sgn", curves.steps),
    _jump("round", curves.rounding),
    _jump("floor", curves.steps),
    _jump("ceil", curves.steps),
    _jump("trunc", curves.steps, "fix"),
    _jump("frac", curves.sawtooth),
)


def _choice(name: str, *others: str) -> Bend:
    """What picks among several numbers by their size."""
    functions = tuple(getattr(torch, spelling) for spelling in (name, *others))
    return Bend(name, None, (), functions, (name, *others), (name,), (name.title(),), telling=False)


CHOICES = (
    *map(_choice, ("max", "min", "amax", "amin", "aminmax", "maximum", "minimum", "fmax", "fmin")),
    *map(_choice, ("median", "nanmedian", "mode", "kthvalue", "topk", "cummax", "cummin")),
    _choice("sort", "msort"),
)


def _pooling(cls: type[nn.Module], name: str, aten: str, node: str, *others: str) -> Bend:
    """Maximum over windows; ``others`` are functions of torch that return the same."""
    functions = (getattr(F, name), *(getattr(torch, other) for other in others))
    return Bend(name, None, (cls,), functions, aten=tuple(aten.split()), nodes=tuple(node.split()))


MAX_POOLINGS = (
    _pooling(nn.MaxPool1d, "max_pool1d", "max_pool2d_with_indices", "MaxPool2DWithIndices", "max_pool1d"),
    _pooling(
        nn.MaxPool2d,
        "max_pool2d",
        "max_pool2d_with_indices max_pool2d mkldnn_max_pool2d",  # the second on Apple's devices
        "MaxPool2DWithIndices MaxPool2D MkldnnMaxPool2D",
        "max_pool2d",
    ),
    _pooling(
        nn.MaxPool3d,
        "max_pool3d",
        "max_pool3d_with_indices mkldnn_max_pool3d",
        "MaxPool3DWithIndices MkldnnMaxPool3D",
        "max_pool3d",
    ),
    _pooling(nn.AdaptiveMaxPool1d, "adaptive_max_pool1d", "adaptive_max_pool2d", "AdaptiveMaxPool2D"),
    _pooling(nn.AdaptiveMaxPool2d, "adaptive_max_pool2d", "adaptive_max_pool2d", "AdaptiveMaxPool2D"),
    _pooling(nn.AdaptiveMaxPool3d, "adaptive_max_pool3d", "adaptive_max_pool3d", "AdaptiveMaxPool3D"),
    _pooling(nn.FractionalMaxPool2d, "fractional_max_pool2d", "fractional_max_pool2d", "FractionalMaxPool2D"),
    _pooling(nn.FractionalMaxPool3d, "fractional_max_pool3d", "fractional_max_pool3d", "FractionalMaxPool3D"),
)
# What torch computes in one operation that holds another: the fast path of the encoder layer in evaluation.
FUSED = (Bend("transformer_encoder_layer", None, aten=("_transformer_encoder_layer_fwd",), run=_encoder_as_run),)
BENDS: tuple[Bend, ...] = (*ELEMENTWISE, *JUMPS, *CHOICES, *MAX_POOLINGS, *FUSED)
NAMED = {bend.name: bend for bend in BENDS}
# operations that share a name of ATen or autograd are the same there: the first stands for all
OF_ATEN = {name: bend for bend in reversed(BENDS) for name in bend.aten}
OF_NODE = {name: bend for bend in reversed(BENDS) for name in bend.nodes}
# code of functions that run as several operations, among them some with a kink that the whole has not
OF_CODE: dict[CodeType, Bend] = {f.__code__: bend for bend in BENDS if bend.parts for f in bend.functions}


def bends_in_graph(node: Any) -> str | None:
    """Name of an autograd node if it tells of a kink or a jump of the network, else None.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> [bends_in_graph(f(x).grad_fn) for f in (F.relu, F.selu, F.elu, F.silu)]
        ['Relu', 'Elu', None, None]
    """
    name = node.name().split("Backward")[0]
    bend = OF_NODE.get(name)
    return name if bend is not None and bend.telling and bend.node_has_kink(node) else None
