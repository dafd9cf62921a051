"""What bounds read is what ran: statements in place, aliases, hooks, sizes from shapes, and more operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lcnn.bounds import direction_bounds, network_bound
from lightning_lcnn.layers import CenteredSoftplus
from tests.bounds.ascent import slope_by_values

TIGHT, TRUE = "exact", "true"
Case = tuple[str, Callable[[], nn.Module], tuple[int, ...], str]


class Called(nn.Module):
    """A module whose forward is a given function of (module, x)."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **children: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def statement(change: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """A linear layer, a statement whose result nobody takes, a linear layer."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        change(h)
        return m.b(h)

    return lambda: Called(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3))


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu_": torch.relu_,
    "tanh_": torch.tanh_,
    "sigmoid_": lambda h: h.sigmoid_(),
    "elu_": F.elu_,
    "silu(inplace)": lambda h: F.silu(h, inplace=True),
    "leaky_relu_": F.leaky_relu_,
    "clamp_": lambda h: torch.clamp_(h, min=0),
    "mul_": lambda h: h.mul_(4.0),
    "neg_": torch.neg_,
    "zero_ of a slice": lambda h: h[:, :1].zero_(),
    "fill_ of a slice": lambda h: h[:, :1].fill_(2.0),
    "out=": lambda h: torch.mul(h, 3.0, out=h),
    "detach": lambda h: h.detach().mul_(5.0),
    "data": lambda h: h.data.add_(2 * h),
    "view": lambda h: h.view(-1).mul_(3.0),
    "to": lambda h: h.to(h.dtype).mul_(3.0),
    "setitem": lambda h: h.__setitem__((slice(None), 0), 2 * h[:, 1]),
    "rows": lambda h: h.t()[0].mul_(-4.0),
}


def residual(drop: nn.Module, act: nn.Module) -> Callable[[], nn.Module]:
    """An alias of the input goes through an activation in place and is added to the input."""
    return lambda: Called(
        lambda m, x: x + 0 * m.l(x) + m.act(m.drop(x := m.l(x))), l=nn.Linear(4, 4), drop=drop, act=act
    )


def hooked(hook: Callable[..., Any], pre: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(8, 2)
        layer.register_forward_pre_hook(hook) if pre else layer.register_forward_hook(hook)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), layer)

    return build


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    forward = layer.forward
    layer.forward = lambda x: 10 * forward(x)  # type: ignore[method-assign]
    return nn.Sequential(layer)


def model_with_hook() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net.register_forward_hook(lambda m, i, o: 10 * o)
    return net


def stale_pruning() -> nn.Module:
    layer = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    layer.load_state_dict({k: 50 * v if "orig" in k else v for k, v in layer.state_dict().items()})
    return layer


def spectral_by_hook() -> nn.Module:
    layer = nn.utils.spectral_norm(nn.Linear(4, 4))
    layer(torch.randn(2, 4))
    return layer


def twice_through_one_layer() -> nn.Module:
    return Called(lambda m, x: m.l(m.l(x)), l=nn.Linear(3, 3))


FAULTS: list[Case] = [
    *((name, statement(change), (1, 3), TRUE) for name, change in IN_PLACE.items()),
    ("eval dropout aliases", residual(nn.Dropout(0.1), nn.SiLU(inplace=True)), (1, 4), TRUE),
    ("identity aliases", residual(nn.Identity(), nn.ReLU(inplace=True)), (1, 4), TRUE),
    ("forward hook", hooked(lambda m, i, o: 10 * o), (1, 4), TRUE),
    ("forward hook in place", hooked(lambda m, i, o: (o.mul_(7), None)[1]), (1, 4), TRUE),
    ("pre-hook", hooked(lambda m, i: (10 * i[0],), pre=True), (1, 4), TRUE),
    ("hook on the model", model_with_hook, (1, 4), TIGHT),
    ("replaced forward", replaced, (1, 4), TIGHT),
    ("alpha of add", lambda: Called(lambda m, x: torch.add(x, torch.sin(x), alpha=10)), (1, 1), TRUE),
    ("alpha of sub", lambda: Called(lambda m, x: torch.sub(x, torch.sin(x), alpha=10)), (1, 1), TRUE),
    ("alpha, constant first", lambda: Called(lambda m, x: torch.add(torch.ones(1, 3), x, alpha=10)), (1, 3), TIGHT),
    (
        "softplus in place first",
        lambda: nn.Sequential(CenteredSoftplus(5.0, inplace=True), nn.Linear(4, 2)),
        (1, 4),
        TRUE,
    ),
    ("relu in place first", lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), (1, 4), TRUE),
    ("twice", twice_through_one_layer, (1, 3), TRUE),
    ("pruning by hook", stale_pruning, (1, 4), TIGHT),
    ("spectral norm by hook", spectral_by_hook, (1, 4), TIGHT),
    ("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), (1, 4), TIGHT),
    ("orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), (1, 4), TIGHT),
    (
        "view after permute",
        lambda: Called(lambda m, x: m.h(torch.tanh(x.permute(0, 2, 1)).flatten(1)), h=nn.Linear(6, 3)),
        (1, 3, 2),
        TRUE,
    ),
    ("expand_as of a constant", lambda: Called(lambda m, x: x + m.b.expand_as(x), b=torch.ones(1, 4)), (1, 4), TIGHT),
    (
        "indices of a pooling",
        lambda: Called(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0]),
        (1, 2, 4, 4),
        TRUE,
    ),
]


class SameConv(nn.Conv2d):
    """Pads by what the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.size()[-2:], self.weight.size()[-2:], self.stride, strict=True):
            pads.append(max((math.ceil(size / stride) - 1) * stride + kernel - size, 0))
        x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class UNet(nn.Module):
    """Crops by sizes, joins by concatenation, a transposed convolution upwards."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head, self.pool = nn.Conv2d(6, 2, 3), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.down(x))
        up = self.up(torch.tanh(self.deep(self.pool(skip))))
        top, left = ((a - b) // 2 for a, b in zip(skip.shape[2:], up.shape[2:], strict=True))
        return self.head(torch.cat([skip[:, :, top : top + up.shape[2], left : left + up.shape[3]], up], 1))


def frames(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A network of images on the frames of a film."""
    return lambda: Called(lambda m, x: m.net(x.flatten(0, 1)).unflatten(0, x.shape[:2]), net=nn.Sequential(*layers))


def called(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Called(lambda m, x: function(x))


W = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = (1, 4, 6, 6)
MORE: list[Case] = [
    ("avg_pool by size", called(lambda x: F.avg_pool2d(x, x.size(3))), IMAGE, TIGHT),
    ("SAME convolution", lambda: SameConv(4, 3, 3, stride=2), (1, 4, 5, 5), TRUE),
    ("padding=same", lambda: nn.Conv2d(4, 3, 4, padding="same"), (1, 4, 4, 4), TRUE),
    ("interpolate by size", called(lambda x: F.interpolate(x, size=(x.shape[2] * 2, 9))), (1, 1, 4, 4), TRUE),
    ("bilinear", called(lambda x: F.interpolate(x, size=7, mode="bilinear", align_corners=True)), (1, 1, 4, 4), TRUE),
    ("area", called(lambda x: F.interpolate(x, size=(3, 4), mode="area")), (1, 1, 6, 6), TIGHT),
    ("U-Net", UNet, (1, 2, 14, 14), TRUE),
    (
        "compiled inside",
        lambda: Called(lambda m, x: m.c(x), c=torch.compile(nn.Linear(4, 5), backend="eager")),
        (1, 4),
        TIGHT,
    ),
    ("transposed", lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1), (1, 4, 3, 3), TIGHT),
    ("transposed groups", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 3, 3), TRUE),
    ("transposed 1d", lambda: nn.ConvTranspose1d(4, 3, 5, stride=3, dilation=2), (1, 4, 5), TRUE),
    ("chunk", called(lambda x: torch.tanh(x.chunk(2, 1)[0]) - 2 * x.chunk(2, 1)[1]), (1, 4, 2), TRUE),
    ("split and cat", called(lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1)), (1, 4, 2), TIGHT),
    ("unbind and stack", called(lambda x: torch.stack(x.unbind(1), 2)), (1, 4, 2), TIGHT),
    ("stack and sum", called(lambda x: torch.stack([torch.sin(x), torch.tanh(x), x]).sum(0)), (1, 3), TRUE),
    ("list of indices", called(lambda x: x[:, [0, 2, 2]]), (1, 4, 2), TIGHT),
    ("constant mask", called(lambda x: x[:, torch.tensor([True, False, True, True])]), (1, 4, 2), TIGHT),
    ("einsum", called(lambda x: torch.einsum("nchw,wk->nchk", x, W.to(x.dtype))), (1, 2, 2, 6), TIGHT),
    ("matmul", called(lambda x: x @ W.to(x.dtype)), (1, 2, 6), TIGHT),
    ("matmul from the left", called(lambda x: W.T.to(x.dtype) @ x), (1, 6, 2), TIGHT),
    ("tokens", lambda: nn.Linear(6, 2), (1, 3, 6), TIGHT),
    (
        "permute before an activation",
        lambda: Called(lambda m, x: m.l(torch.tanh(x.permute(0, 2, 3, 1))), l=nn.Linear(4, 3)),
        (1, 4, 2, 2),
        TRUE,
    ),
    (
        "batch second",
        lambda: Called(lambda m, x: m.l(torch.tanh(x.permute(1, 0, 2))).transpose(0, 1), l=nn.Linear(4, 3)),
        (1, 5, 4),
        TRUE,
    ),
    ("frames", frames(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2)), (1, 3, 2, 4, 4), TRUE),
    ("frames, kinks", frames(nn.Conv2d(2, 3, 3), nn.PReLU(3), nn.MaxPool2d(2)), (1, 3, 2, 4, 4), TRUE),
    ("F.instance_norm", called(F.instance_norm), (1, 2, 3, 3), TRUE),
    ("F.group_norm", called(lambda x: F.group_norm(x, 2)), (1, 4, 2, 2), TRUE),
    ("F.rms_norm", called(lambda x: F.rms_norm(x, (6,), eps=1e-5)), (1, 2, 6), TRUE),
    ("circular padding", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (1, 2, 4, 4), TRUE),
    ("where", called(lambda x: torch.where(torch.arange(8) > 3, 3 * x, -x)), (1, 8), TRUE),
    ("masked_fill", called(lambda x: x.masked_fill(torch.arange(8) > 3, 0.0)), (1, 8), TRUE),
    ("addcmul", called(lambda x: torch.addcmul(x, x, torch.ones(1, 8), value=3.0)), (1, 8), TRUE),
    ("logsumexp", called(lambda x: torch.logsumexp(x, 1)), (1, 8), TRUE),
    ("unfold", called(lambda x: F.unfold(x, 2)), (1, 2, 3, 3), TIGHT),
    ("cumsum", called(lambda x: x.cumsum(1)), (1, 5), TRUE),
    ("transposed matrix", called(lambda x: x + x.mT), (1, 3, 3), TRUE),
    ("parts of a split", called(lambda x: x + torch.cat(x.chunk(3, 1), 1)), (1, 3), TIGHT),
    ("checkpoint", lambda: Called(_checkpointed, l=nn.Linear(4, 4)), (1, 4), TRUE),
    ("class token", lambda: Called(_with_token, p=nn.Conv2d(3, 5, 2, 2), c=torch.randn(1, 1, 5)), (1, 3, 4, 4), TRUE),
]


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(m.l, x, use_reentrant=False)


def _with_token(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.c.expand(len(x), -1, -1), m.p(x).flatten(2).transpose(1, 2)], 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # it costs a copy
@pytest.mark.parametrize(("build", "shape", "kind"), [c[1:] for c in FAULTS + MORE], ids=[c[0] for c in FAULTS + MORE])
def test_slope_holds_and_nothing_is_changed(build: Callable[[], nn.Module], shape: tuple[int, ...], kind: str) -> None:
    torch.manual_seed(0)
    net = build().double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}, x.clone()
    bounds = [network_bound(net, x, method).slope for method in ("fast", "tight")]
    measured = slope_by_values(net, x)
    for bound in bounds:
        assert measured <= bound
        assert kind != TIGHT or bound <= 1.01 * measured  # linear maps of known norm
    assert torch.equal(x, before[1])
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("where", ["weight", "bias", "running_var"])
def test_nan_and_infinity_make_the_bound_infinite_and_name_the_layer(where: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).eval()
    layer = 1 if where == "running_var" else 0
    getattr(net[layer], where).data.view(-1)[1] = math.nan if where != "bias" else math.inf
    for method in ("fast", "tight"):
        bound = network_bound(net, torch.randn(1, 3), method)
        assert bound.slope == bound.curvature == math.inf
        assert bound.reasons[0] == f"{layer}: its parameters or constants hold NaN or infinity"


def test_wrong_shapes_say_so_and_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"`example_input` of shape \(1, 4\) does not fit `model`"):
        network_bound(nn.Sequential(nn.Linear(3, 2)).eval(), torch.zeros(1, 4))
    assert not caplog.records


def test_flags_attributes_and_hooks_of_a_refused_model_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.kept = 1

        def forward(self, x: Tensor) -> Tensor:
            self.kept = 2
            return self.inner(x) * float(x.sum())

    net = Odd().eval()
    net.inner.weight.requires_grad_(False)
    call = nn.Module.__call__
    with pytest.raises(ValueError, match="branches on values"):
        network_bound(net, torch.randn(1, 2))
    assert net.kept == 1
    assert nn.Module.__call__ is call
    assert not net.inner.weight.requires_grad
    assert net.inner._forward_hooks == {}


def test_models_in_other_types() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    exact = network_bound(net.double(), torch.randn(1, 3, dtype=torch.float64)).slope
    for dtype in (torch.float32, torch.bfloat16):
        assert network_bound(net.to(dtype), torch.randn(1, 3, dtype=dtype)).slope == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("scale", "count"), [(1e20, 9), (1e40, 9), (1e170, 1), (1e-170, 1), (1e-40, 5)])
def test_products_that_leave_the_range_of_float64_are_never_below_the_truth(scale: float, count: int) -> None:
    layers: list[nn.Module] = [nn.Linear(2, 2, bias=False).double() for _ in range(2 * count)]
    for i, layer in enumerate(layers):
        nn.init.eye_(layer.weight).data.mul_(1 / scale if i < count else scale)
    x = torch.randn(1, 2, dtype=torch.float64)
    for net in (nn.Sequential(*layers), nn.Sequential(*layers, nn.Tanh()), nn.Sequential(*layers, nn.Softplus())):
        fast, tight = (network_bound(net.eval(), x, method) for method in ("fast", "tight"))
        slope = 0.5 if isinstance(net[-1], nn.Softplus) else 1.0
        assert slope * (1 - 1e-9) <= tight.slope <= fast.slope == pytest.approx(1.0, rel=1e-4)
        if isinstance(net[-1], nn.Tanh):
            assert 0.7698 <= tight.curvature <= fast.curvature
        heads = direction_bounds(net, x, torch.eye(2))
        assert (heads.slope >= slope * (1 - 1e-9)).all()
