"""The table of what bends against torch: every name is what torch says, every range what the function does."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lcnn.bounds.rules.activations import CURVES, OURS
from lightning_lcnn.functional.bends import BENDS, CHOICES, ELEMENTWISE, JUMPS, MAX_POOLINGS, NAMED, OF_ATEN, Bend
from lightning_lcnn.functional.curves import Curve
from lightning_lcnn.functional.hessian_operator import graph_nodes, kinks_of
from lightning_lcnn.recording.run import record_run
from tests import ROOT

X = 3 * torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# arguments after the input, for every spelling of an operation
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.1, 0.2),
    "clamp": (-1.0, 0.5),
    "clamp_min": (0.1,),
    "clamp_max": (0.1,),
    **{name: (2 * X.flip(0),) for name in ("maximum", "minimum", "fmax", "fmin")},
    **dict.fromkeys(("kthvalue", "topk", "cummax", "cummin"), (2,)),
    **{bend.name: (2,) for bend in MAX_POOLINGS},
    "fractional_max_pool2d": (2, 3),
    "fractional_max_pool3d": (2, 2),
}
# what the CPU does not run, and why; it has to exist
ELSEWHERE = {
    "max_pool2d": "Apple's devices",
    "mkldnn_max_pool2d": "tensors in MKL-DNN's layout",
    "mkldnn_max_pool3d": "tensors in MKL-DNN's layout",
    "MaxPool2D": "Apple's devices",
    "MkldnnMaxPool2D": "tensors in MKL-DNN's layout",
    "MkldnnMaxPool3D": "tensors in MKL-DNN's layout",
}
TABLE = [bend for bend in BENDS if bend.name != "transformer_encoder_layer"]


def spellings(bend: Bend) -> list[tuple[str, Callable[[Tensor], Any]]]:
    """Every way to call an operation: modules, also in place, functions, methods."""
    arguments = ARGUMENTS.get(bend.name, ())
    weight = torch.full((1,), 0.3, dtype=torch.float64)
    calls: list[tuple[str, Callable[[Tensor], Any]]] = []
    for cls in bend.modules:
        module = cls(*arguments).double()
        calls.append((cls.__name__, module))
        if "inplace" in inspect.signature(cls).parameters:
            calls.append((f"{cls.__name__} in place", cls(*arguments, inplace=True)))
    if bend.name == "prelu":
        arguments = (weight,)
    for function in bend.functions:
        calls.append((function.__name__, lambda x, function=function: function(x, *arguments)))
    for method in bend.methods:
        calls.append((f".{method}", lambda x, method=method: getattr(x, method)(*arguments)))
    return calls


def example(bend: Bend) -> Tensor:
    if bend.name.endswith("3d"):
        return X[:, :, None].expand(2, 2, 4, 8, 8).contiguous()
    return X[0] if bend.name.endswith("1d") else X


class Seen(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[Tensor], Any], x: Tensor) -> list[str]:
    x = x.clone()
    with torch.no_grad(), Seen() as seen:
        call(x)
    return [name for name in seen.names if name in OF_ATEN]


def nodes(call: Callable[[Tensor], Any], x: Tensor) -> list[Any]:
    """Nodes behind the first tensor that comes out; the input of an in-place call is no leaf."""
    output = call(x.clone().requires_grad_() * 1)
    return graph_nodes(output if isinstance(output, Tensor) else output[0])


@pytest.mark.parametrize("bend", TABLE, ids=lambda bend: bend.name)
def test_aten_names_are_what_runs(bend: Bend) -> None:
    seen: set[str] = set()
    for spelling, call in spellings(bend):
        names = operations(call, example(bend))
        known = set(bend.aten) | set(bend.parts)
        assert names, spelling
        assert set(names) <= known, spelling
        seen |= set(names)
    assert set(bend.aten) - seen <= set(ELSEWHERE)
    for name in bend.aten:
        assert hasattr(torch.ops.aten, name)
        assert OF_ATEN[name].run == bend.run  # those that share a name run alike


@pytest.mark.parametrize("bend", TABLE, ids=lambda bend: bend.name)
def test_autograd_names_are_those_of_the_graph(bend: Bend) -> None:
    seen: set[str] = set()
    for spelling, call in spellings(bend):
        names = {node.name().split("Backward")[0] for node in nodes(call, example(bend))}
        assert bend.parts or names & set(bend.nodes), spelling
        seen |= names
    assert set(bend.nodes) - seen <= set(ELSEWHERE)


def test_autograd_names_of_other_devices_exist() -> None:
    header = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "autograd" / "generated" / "Functions.h"
    text = header.read_text()
    for name in (name for bend in BENDS for name in bend.nodes):
        assert f"struct TORCH_API {name}Backward" in text


def test_composed_functions_run_as_their_parts() -> None:
    for bend in TABLE:
        if bend.parts:
            for _, call in spellings(bend):
                with torch.no_grad(), Seen() as seen:
                    call(X)
                assert seen.names == list(bend.parts)


# name, the curve's arguments; the function is the first of the entry's
CURVED: list[tuple[str, dict[str, Any]]] = [
    *((bend.name, {}) for bend in (*ELEMENTWISE, *JUMPS) if bend.name not in ("clamp", "clamp_min", "clamp_max")),
    ("softplus", {"beta": 7.0, "threshold": 30.0}),
    ("softplus", {"threshold": 4.0}),
    ("gelu", {"approximate": "tanh"}),
    ("elu", {"alpha": 0.5}),
    ("elu", {"alpha": 2.0}),
    ("elu", {"alpha": -0.5}),
    ("scaled_elu", {"alpha": 2.0, "scale": 1.5, "input_scale": 0.5}),
    ("scaled_elu", {"alpha": 2.0, "scale": 1.5, "input_scale": 0.6}),
    ("scaled_elu", {"alpha": 0.3, "scale": 0.5, "input_scale": 2.0}),
    ("celu", {"alpha": 0.3}),
    ("celu", {"alpha": 2.0}),
    ("leaky_relu", {"negative_slope": 0.2}),
    ("leaky_relu", {"negative_slope": -0.5}),
    ("leaky_relu", {"negative_slope": 1.7}),
    ("leaky_relu", {"negative_slope": 1.0}),
    ("hardtanh", {"min_val": -2.0, "max_val": 0.5}),
    ("softshrink", {"lambd": 1.3}),
    ("clamp", {"min": -1.0, "max": 0.5}),
    ("clamp", {"min": 0.3}),
    ("clamp", {"max": 0.3}),
    ("clamp_min", {"min": 0.3}),
    ("clamp_max", {"max": 0.3}),
    ("prelu", {"weight": torch.tensor([0.3], dtype=torch.float64)}),
    ("prelu", {"weight": torch.tensor([1.0], dtype=torch.float64)}),
    ("threshold", {"threshold": 0.1, "value": 0.2}),
    ("threshold", {"threshold": 0.1, "value": -0.2}),
    ("threshold", {"threshold": 0.1, "value": 0.1}),
]
CURVED = [(name, values) for name, values in CURVED if values or name not in ("prelu", "threshold")]
# a dense line, both sides of 0 for slopes of slopes that jump there, and far out for limits
NEAR, FAR = torch.arange(1, 5, dtype=torch.float64) * 5e-8, torch.logspace(0.95, 5, 400, dtype=torch.float64)
LINE = torch.cat([torch.linspace(-8, 8, 160_001, dtype=torch.float64), NEAR, -NEAR, FAR, -FAR]).unique()
# steeper than this between neighbours on the line, where the finite ends are at most 4, is a jump
STEEP = 40.0


def differences(bend: Bend, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spacing of the line, differences of s, its slopes by autograd, and quotients of these slopes."""
    x = LINE.clone().requires_grad_()
    y = bend.functions[0](x * 1, **arguments)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return LINE.diff(), y.detach().diff(), slope, slope.diff() / LINE.diff()


def case(name: str, arguments: dict[str, Any]) -> tuple[Curve, tuple[Tensor, Tensor, Tensor, Tensor]]:
    bend = NAMED[name]
    assert bend.curve is not None
    return bend.curve(**arguments), differences(bend, arguments)


@pytest.mark.parametrize(("name", "arguments"), CURVED)
def test_ranges_hold(name: str, arguments: dict[str, Any]) -> None:
    curve, (spacing, rise, slope, quotient) = case(name, arguments)
    low, high = curve.slope
    # 3e-9: the step of log1p(exp(-20)) at the default threshold of softplus, which its curve tells of
    assert bool((rise >= low * spacing - 3e-9).all())
    assert bool((rise <= high * spacing + 3e-9).all())
    assert low - 1e-7 <= slope.min()  # torch takes 1 / 6 in float32
    assert slope.max() <= high + 1e-7
    low, high = curve.bend
    # 3e-5: that step's 2e-9 over 1e-4 and rounding of slopes, 2e-16 over 5e-8
    assert low - 3e-5 <= quotient.min()
    assert quotient.max() <= high + 3e-5


@pytest.mark.parametrize(("name", "arguments"), CURVED)
def test_finite_ends_are_attained(name: str, arguments: dict[str, Any]) -> None:
    curve, (_, _, slope, quotient) = case(name, arguments)
    for values, (low, high) in ((slope, curve.slope), (quotient, curve.bend)):
        for end, attained in ((low, values.min()), (high, values.max())):
            # by the definition of a range from one side only: a jump of s has no slope to attain the other
            if abs(end) != torch.inf and not NAMED[name].jumps:
                assert attained == pytest.approx(end, abs=1e-6)


@pytest.mark.parametrize(("name", "arguments"), CURVED)
def test_kinks_are_where_the_slope_jumps(name: str, arguments: dict[str, Any]) -> None:
    curve, (spacing, rise, _, quotient) = case(name, arguments)
    jumps = bool(((rise / spacing).abs() > STEEP).any())
    assert (jumps or bool((quotient.abs() > STEEP).any())) == curve.has_kink
    assert jumps == any(abs(end) == torch.inf for end in curve.slope)
    assert bool(curve.reason) == curve.has_kink
    if NAMED[name].jumps and arguments != {"threshold": 0.1, "value": 0.1}:
        assert jumps


@pytest.mark.parametrize(("name", "arguments"), CURVED)
def test_a_run_and_a_graph_say_the_same(name: str, arguments: dict[str, Any]) -> None:
    bend = NAMED[name]
    assert bend.curve is not None
    expected = bend.curve(**arguments).has_kink
    call = lambda x: bend.functions[0](x, **arguments)  # noqa: E731
    assert kinked_run(call) == (expected and not bend.parts)
    found = [node for node in nodes(call, X) if node.name().split("Backward")[0] in bend.nodes]
    if bend.name not in ("prelu", "threshold"):  # whose second argument no node keeps
        assert any(bend.node_has_kink(node) for node in found) == expected or not bend.telling


def kinked_run(call: Callable[[Tensor], Any]) -> bool:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return call(x)

    return bool(record_run(Net(), X).kinks)


@pytest.mark.parametrize("bend", [*CHOICES, *MAX_POOLINGS], ids=lambda bend: bend.name)
def test_choices_have_kinks(bend: Bend) -> None:
    """On the way from the input to its opposite the slope of a weighted sum of the outputs jumps."""
    call = spellings(bend)[-1][1]

    def slope(t: float) -> float:
        torch.manual_seed(0)  # fractional pooling draws its windows
        point = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        output = call(example(bend) * (1 - 2 * point))
        output = output if isinstance(output, Tensor) else output[0]
        weights = torch.linspace(1, 2, output.numel(), dtype=torch.float64).view_as(output)
        return float(torch.autograd.grad((output * weights).sum(), point)[0])

    low, high = 0.01, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        first = abs(slope(middle) - slope(low)) > abs(slope(high) - slope(middle))
        low, high = (low, middle) if first else (middle, high)
    assert abs(slope(high) - slope(low)) > 1e-3
    assert bend.has_kink()


def test_mkldnn_pooling_runs_under_its_own_name() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without MKL-DNN")
    x = torch.randn(1, 2, 8, 8).to_mkldnn()
    assert operations(lambda x: F.max_pool2d(x, 2), x) == ["mkldnn_max_pool2d"]


@pytest.mark.parametrize(("activation", "kinked"), [("relu", True), ("gelu", False)])
def test_the_fast_path_of_the_encoder_shows_its_activation(activation: str, kinked: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation).eval()
    record = record_run(layer, torch.randn(2, 3, 8))
    assert bool(record.kinks) == kinked


def test_measures_see_what_tells_of_a_kink() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    kinked = [F.relu, F.selu, lambda x: F.elu(x, 0.5), F.hardtanh, lambda x: F.softplus(x, 1, 5), torch.round]
    for function in kinked:
        assert kinks_of(graph_nodes(function(x)))
    smooth = [F.elu, F.celu, F.softsign, F.normalize, F.silu, F.softplus, lambda x: x - x.amax(1, keepdim=True)]
    for function in smooth:
        assert not kinks_of(graph_nodes(function(x)))


def test_names_are_unique_and_classes_and_functions_belong_to_one_entry() -> None:
    for values in (
        [bend.name for bend in (*BENDS, *OURS)],
        [cls for bend in (*BENDS, *OURS) for cls in bend.modules],
        [id(function) for bend in BENDS for function in bend.functions],
        [method for bend in BENDS for method in bend.methods],
    ):
        assert len(values) == len(set(values))


def test_every_activation_of_torch_is_in_the_table() -> None:
    """What is missing couples numbers, or is no function of the input alone."""
    other = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
    classes = {name for name in vars(nn.modules.activation)["__all__"] if name not in other}
    assert classes == {cls.__name__ for bend in ELEMENTWISE for cls in bend.modules}
    assert {cls for bend in ELEMENTWISE if not bend.jumps for cls in bend.modules} <= set(CURVES)
    written = {name for name in dir(F) if name.endswith("_") and not name.startswith("_")}
    functions = {function for bend in BENDS for function in bend.functions}
    assert {name for name in written if getattr(F, name) not in functions} == set()


def test_nothing_else_lists_these_names() -> None:
    """No other module quotes names of ATen or autograd that mean one operation and are no words besides."""
    words = {
        "max",
        "min",
        "mode",
        "median",
        "amax",
        "relu",
        "tanh",
    }  # choices of ours and arguments of torch's functions
    names = {name for bend in BENDS for name in (*bend.aten, *bend.nodes)} - words
    for path in sorted((ROOT / "lightning_lcnn").rglob("*.py")):
        constants = {
            getattr(node, "value", "")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
        }
        assert path.name in ("bends.py", "curves.py") or not constants & names, path
