"""to_low_curvature on small networks: what becomes of each layer, and that the function stays."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.conversion import to_low_curvature
from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    LogMeanExpPool2d,
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralLinear,
)

BETA = 1e9  # in float64: the softplus differs from ReLU by log(2)/β, less than rounding


def randomize(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that are not the trivial ones."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            nn.init.uniform_(module.running_var, 0.3, 3.0)
            nn.init.normal_(module.running_mean)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def convert(model, x, **options):
    """Convert in float64 and check that the function, also in training mode, and the original stay.

    γ is out of the way: the variances of a small batch may give larger slopes than the running ones.
    """
    model, x = randomize(model).double(), x.double()
    before = copy.deepcopy(model)
    converted, report = to_low_curvature(
        model, x, return_report=True, **({"beta": BETA, "gamma": 1e6, "output_layer": True} | options)
    )
    assert repr(model) == repr(before)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    for training in (False, True):
        pair = copy.deepcopy(before).train(training), copy.deepcopy(converted).train(training)
        expected, got = (net(x) for net in pair)
        # evaluation: log2/β and the float64 power iteration; training: ε stays while the variance becomes v/σ²
        tolerance = 1e-2 if training else 1e-6
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    return converted, report


def kinds(model: nn.Module) -> list[str]:
    return [type(child).__name__ for child in model.children()]


def notes(report) -> dict[str, str]:
    return {row.name: row.note for row in report.changed}


def reasons(report) -> dict[str, str]:
    return {row.name: row.reason for row in report.kept}


def block(conv, norm, *, bias=False, **options):
    return nn.Sequential(conv(2, 4, 3, bias=bias, **options), norm(4), nn.ReLU(inplace=True))


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (block(nn.Conv1d, nn.BatchNorm1d), torch.randn(5, 2, 9), (SpectralConv1d, LipschitzBatchNorm1d)),
        (block(nn.Conv2d, nn.BatchNorm2d), torch.randn(5, 2, 9, 7), (SpectralConv2d, LipschitzBatchNorm2d)),
        (block(nn.Conv3d, nn.BatchNorm3d), torch.randn(5, 2, 5, 4, 6), (SpectralConv3d, LipschitzBatchNorm3d)),
        (block(nn.Conv2d, nn.BatchNorm2d, bias=True, stride=2, padding=1), torch.randn(5, 2, 9, 7), ()),
        (block(nn.Conv2d, nn.BatchNorm2d, groups=2, dilation=2), torch.randn(5, 2, 9, 7), ()),
        (block(nn.Conv2d, nn.BatchNorm2d, padding="same"), torch.randn(5, 2, 9, 7), ()),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()),
            torch.randn(5, 3),
            (SpectralLinear, LipschitzBatchNorm1d),
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU()),
            torch.randn(5, 3),
            (SpectralLinear, LipschitzBatchNorm1d),
        ),
    ],
)
def test_layer_norm_activation(model, x, expected):
    converted, report = convert(model, x)
    kept = dict(model.named_parameters())
    for key, value in converted.named_parameters():
        if key in kept and key != "0.bias":  # raw weights are those of the original; a bias moves with the scale
            assert torch.equal(value, kept[key])
    assert all(type(layer) is cls for layer, cls in zip(converted, expected, strict=False))
    assert type(converted[2]) is CenteredSoftplus
    assert "moved into 1" in notes(report)["0"]
    assert converted[0].log_gamma is None
    assert converted[1].slope().item() == pytest.approx(converted[1].scale_and_shift()[0].abs().max().item())


def test_input_size_is_seen():
    converted, _ = convert(nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(3, 2, 3)), torch.randn(1, 2, 13, 9))
    assert converted[0].right_vector.shape == (2, 13, 9)
    assert converted[1].right_vector.shape == (3, 6, 4)


class Around(nn.Module):
    """A convolution and a batch norm, used as ``forward`` says."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.use = forward

    def forward(self, x):
        return self.use(self, x)


@pytest.mark.parametrize(
    ("forward", "moved"),
    [
        (lambda m, x: m.act(m.norm(m.conv(x))), True),
        (lambda m, x: m.act(m.norm(m.drop(m.conv(x)))), True),  # dropout at rest hands its input on
        (lambda m, x: m.norm(m.act(m.conv(x))), False),  # not directly
        (lambda m, x: (y := m.conv(x)) + m.norm(y), False),  # somebody else uses it
        (lambda m, x: m.norm(y := m.conv(x)) * y.mean(), False),
        (lambda m, x: m.norm(m.conv(m.conv(x))), False),  # called twice
        (lambda m, x: m.norm(m.norm(m.conv(x))), False),
        (lambda m, x: [y := m.conv(x), m.norm(y)], False),  # the model returns it
        (lambda m, x: m.conv(m.act(m.norm(x))), False),  # the other way round
    ],
)
def test_scale_moves_only_into_a_batch_norm_that_gets_all(forward, moved):
    converted, report = convert(Around(forward, drop=nn.Dropout(0.0)), torch.randn(3, 2, 6, 6))
    assert ("moved into norm" in notes(report)["conv"]) is moved
    assert (converted.conv.log_gamma is None) is moved


def test_gamma_starts_above_the_slope_or_where_asked():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    nn.init.constant_(net[1].weight, 1e3)
    x = torch.randn(3, 2, 4, 4)
    free, _ = to_low_curvature(net.eval(), x, return_report=True)
    assert free[1].gamma.item() == pytest.approx(free[1].slope().item())
    assert free[1].gamma > 100
    assert free[4].gamma.item() == pytest.approx(10.0)
    clipped, report = to_low_curvature(net, x, gamma=2.0, return_report=True)
    assert clipped[1].slope().item() == pytest.approx(2.0)
    assert notes(report)["1"].startswith("γ 2 clips slope")
    assert "clips" not in notes(report)["4"]


def test_max_pooling():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    kept, report = convert(net, x)
    assert type(kept[2]) is nn.MaxPool2d
    assert reasons(report) == {"2": "max_pool='keep'"}
    average = to_low_curvature(net, x, max_pool="average")
    torch.testing.assert_close(average[2](x), nn.AvgPool2d(2)(x))
    assert network_bound(average.float().eval(), x.float()[:1]).curvature < float("inf")
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d((3, 2), 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True)):
        smooth, _ = convert(nn.Sequential(pool), x, max_pool="smooth")
        assert type(smooth[0]) is LogMeanExpPool2d
        assert smooth[0].temperature == 1 / BETA
    net = nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d(6), nn.MaxPool2d(2, dilation=2))
    with pytest.warns(UserWarning, match="left 2 operation.s. with kinks"):
        _, report = to_low_curvature(net, x, max_pool="smooth", return_report=True)
    assert reasons(report)["1"].endswith("use max_pool='average'")
    assert reasons(report)["2"] == "dilated, or asked for indices"
    others = [nn.MaxPool1d(3, 2, 1), nn.MaxPool3d(2, ceil_mode=True), nn.AdaptiveMaxPool2d(2)]
    for pool, shape in zip(others, [(2, 9), (2, 5, 5, 5), (2, 7, 7)], strict=True):
        smooth = to_low_curvature(nn.Sequential(nn.ReLU(), pool), torch.ones(1, *shape), max_pool="average")
        torch.testing.assert_close(smooth[1](torch.ones(1, *shape)), pool(torch.ones(1, *shape)))


def test_shared_modules_and_tied_weights_stay_shared():
    relu, tied = nn.ReLU(), nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = tied.weight
    converted, _ = convert(nn.Sequential(tied, relu, other, relu, tied), torch.randn(4, 3))
    assert converted[1] is converted[3]
    assert converted[0] is converted[4]
    assert converted[0].weight is converted[2].weight
    assert len([p for p in converted.parameters() if p.dim() == 2]) == 1


def test_a_convolution_called_at_two_sizes_takes_the_larger():
    model = Around(lambda m, x: m.conv(x).mean() + m.conv(x[..., :4, 2:]).mean())
    converted, _ = convert(model, torch.randn(2, 2, 6, 8))
    assert converted.conv.right_vector.shape == (2, 6, 8)


def test_flags_hooks_and_frozen_parameters_are_taken_over():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    net[1].eval().requires_grad_(False)
    net[3].requires_grad_(False)
    net[0].note = "mine"
    calls = []
    for i in (0, 2):
        net[i].register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    net[3].register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre"), with_kwargs=True)
    converted, report = to_low_curvature(net, torch.randn(1, 2, 8, 8), output_layer=True, return_report=True)
    assert [m.training for m in converted] == [True, False, True, True] == [m.training for m in net]
    frozen = {name for name, p in converted.named_parameters() if not p.requires_grad}
    assert frozen == {"1.weight", "1.bias", "1.log_gamma", "3.weight", "3.bias", "3.log_gamma"}
    calls.clear()
    converted(torch.randn(1, 2, 8, 8))
    assert calls == ["SpectralConv2d", "CenteredSoftplus", "pre"]
    assert converted[0].note == "mine"
    assert notes(report)["0"].startswith("gain")  # the hook sees the output as it was


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)).to(dtype).eval()
    x = torch.randn(2, 2, 8, 8, dtype=dtype)
    converted = to_low_curvature(net, x, beta=1e4)
    assert {t.dtype for t in converted.state_dict().values() if t.is_floating_point()} == {dtype}
    error = torch.linalg.vector_norm(converted(x) - net(x)) / torch.linalg.vector_norm(net(x))
    assert error < (0.03 if dtype is torch.bfloat16 else 1e-3)  # bfloat16 keeps 8 bits, log γ among them


def test_synchronised_batch_norm():
    net = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.ReLU()).eval()
    converted, report = to_low_curvature(net, torch.randn(5, 3), return_report=True)
    assert type(converted[1]) is LipschitzBatchNorm1d
    assert converted[1].synchronized
    assert "moved into 1" in notes(report)["0"]


class Same(nn.Conv2d):
    """A subclass that might do anything."""


def zero(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    return layer


def pruned() -> nn.Module:
    layer = nn.utils.prune.random_unstructured(nn.Conv2d(2, 2, 1), "weight", 1)
    layer.weight = layer.weight.detach()  # as a run without gradients leaves it
    return layer


def dead_norm() -> nn.Module:
    return nn.BatchNorm2d(2, track_running_stats=False)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda: nn.ConvTranspose2d(2, 2, 3, padding=1), "no counterpart"),
        (lambda: Same(2, 2, 3, padding=1), "a subclass of Conv2d"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(2, 2, 1)), "its parameters are parametrised"),
        (pruned, "computed by a hook"),
        (lambda: zero(nn.Conv2d(2, 2, 1)), "its weight is zero or not finite"),
        (lambda: nn.GroupNorm(1, 2), "no counterpart"),
        (dead_norm, "keeps no running statistics"),
    ],
)
def test_left_alone_with_a_reason(layer, reason):
    _, report = convert(nn.Sequential(nn.Conv2d(2, 2, 1), layer()), torch.randn(2, 2, 6, 6))
    assert reason in reasons(report)["1"]


def test_what_the_example_does_not_reach_is_left_alone():
    converted, report = convert(Around(lambda m, x: m.norm(x)), torch.randn(2, 2, 6, 6))
    assert type(converted.conv) is nn.Conv2d
    assert set(reasons(report)) == {"conv", "act"}
    assert "does not reach it in evaluation mode" in reasons(report)["conv"]


def test_a_weight_that_others_read_is_left_alone():
    def forward(m, x):
        return m.act(m.conv(x) + m.conv.weight.sum())

    _, report = convert(Around(forward), torch.randn(2, 2, 6, 6))
    assert reasons(report)["conv"] == "another module reads its weight"


def test_transformer_encoder_keeps_the_layers_of_its_fast_path():
    net = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)).eval()
    x = torch.randn(2, 3, 4)
    converted = to_low_curvature(net, x, skip=nn.TransformerEncoderLayer)
    torch.testing.assert_close(converted(x), net(x), rtol=1e-4, atol=1e-5)
    net.requires_grad_(False)  # torch's condition for the fast path
    with pytest.warns(UserWarning, match="kinks"):
        converted = to_low_curvature(net, x)
    torch.testing.assert_close(converted(x), net(x), rtol=1e-4, atol=1e-5)
    assert type(converted[1].linear1) is nn.Linear


def test_a_lazy_module_stays_lazy_in_the_original():
    net = nn.Sequential(nn.LazyConv2d(3, 3), nn.ReLU())
    converted = to_low_curvature(net, torch.randn(1, 2, 6, 6))
    assert kinds(converted) == ["SpectralConv2d", "CenteredSoftplus"]
    assert kinds(net) == ["LazyConv2d", "ReLU"]


def test_skip_and_spectral():
    net = nn.Sequential(block(nn.Conv2d, nn.BatchNorm2d), block(nn.Conv2d, nn.BatchNorm2d), nn.ReLU())
    net[1][0] = nn.Conv2d(4, 4, 1)
    x = torch.randn(2, 2, 8, 8)
    converted, report = convert(net, x, skip=["0", nn.BatchNorm2d])
    assert kinds(converted[0]) == kinds(net[0])
    assert kinds(converted[1]) == ["SpectralConv2d", "BatchNorm2d", "CenteredSoftplus"]
    assert notes(report)["1.0"].startswith("gain")
    assert reasons(report)["0.0"] == reasons(report)["1.1"] == "in `skip`"
    converted, report = convert(net, x, spectral=False)
    assert reasons(report)["0.0"] == "spectral=False"
    assert kinds(converted[0]) == ["Conv2d", "LipschitzBatchNorm2d", "CenteredSoftplus"]


def test_the_root_itself_can_be_converted():
    x = torch.randn(2, 3)
    assert type(to_low_curvature(nn.ReLU(), x)) is CenteredSoftplus
    assert type(to_low_curvature(nn.Linear(3, 2), x, output_layer=True)) is SpectralLinear


def test_the_output_layer_stays_unless_asked_for():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    converted, report = to_low_curvature(net, x, return_report=True)
    assert [type(m) for m in converted] == [SpectralLinear, CenteredSoftplus, nn.Linear]
    assert reasons(report) == {"2": "gives the output, so no activation follows; output_layer=True converts it"}
    assert type(to_low_curvature(net, x, output_layer=True)[2]) is SpectralLinear


@pytest.mark.parametrize("affine", [True, False])
def test_moved_scale_is_in_the_state_dict_also_for_channels_without_variance(affine):
    """ε is no entry of a ``state_dict``, so another conversion must be able to load this one's."""
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine), nn.ReLU())
        nn.init.normal_(net[0].weight, std=10.0 ** (1 - seed))
        net[1].running_var.mul_(torch.tensor([0.0, 1e-6, 1.0, 1e3]))
        nets.append(net.double().eval())
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    first, second = (to_low_curvature(net, x, beta=BETA, gamma=1e6) for net in nets)
    torch.testing.assert_close(first(x), nets[0](x), rtol=1e-6, atol=1e-6)
    if affine:  # otherwise one of them has a gain
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(x), second(x))


def test_copies_pickles_and_state_dicts_of_the_result():
    net = randomize(nn.Sequential(block(nn.Conv2d, nn.BatchNorm2d), nn.Flatten(), nn.Linear(144, 2)))
    x = torch.randn(2, 2, 8, 8)
    converted = to_low_curvature(net, x).eval()
    fresh = to_low_curvature(copy.deepcopy(net).apply(lambda m: getattr(m, "reset_parameters", int)()), x).eval()
    fresh.load_state_dict(converted.state_dict())
    fresh[0][1].eps = converted[0][1].eps  # no entry of a state_dict
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), fresh):
        assert torch.equal(other(x), converted(x))


def test_report_is_a_table():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    _, report = to_low_curvature(net, torch.randn(2, 2, 8, 8), return_report=True)
    lines = str(report).splitlines()
    assert lines[1].split()[:4] == ["changed", "1", "BatchNorm2d", "LipschitzBatchNorm2d"]
    assert lines[3].split() == ["kink", "3", "MaxPool2d", "max_pool='keep'"]
    assert lines[4] == "3 changed, 1 left alone, 1 of them with kinks"


def test_nothing_is_left_behind_in_the_original():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).train()
    with pytest.raises(ValueError, match="does not pass"):
        to_low_curvature(net, torch.randn(2, 3, 8, 8))
    to_low_curvature(net, torch.randn(2, 2, 8, 8))
    assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in net.modules())
    assert kinds(net) == ["Conv2d", "ReLU", "MaxPool2d"]
    assert net(torch.randn(1, 2, 8, 8)).requires_grad


def pruned_with_graph() -> nn.Module:
    return nn.utils.prune.random_unstructured(nn.Linear(3, 3), "weight", 1)


NET = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
X = torch.randn(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((NET.forward, X), {}, TypeError, "`model` must be an nn.Module, got method"),
        ((NET, [X]), {}, TypeError, "`example_input` must be a tensor, one batch of inputs, got list"),
        ((NET, X[:, :2]), {}, ValueError, r"`example_input` of shape \(2, 2\), torch.float32, on cpu does not pass"),
        ((NET, X.to("meta")), {}, ValueError, "`example_input` is on meta and the model on cpu"),
        ((NET, X.long()), {}, ValueError, "`example_input` of shape .*torch.int64"),
        ((nn.Flatten(), X), {}, ValueError, r"`model` \(Flatten\) has nothing to convert"),
        ((NET, X), {"skip": ""}, ValueError, "`skip` names ''"),
        ((NET, X), {"skip": ["0", "1"]}, ValueError, "nothing to convert"),
        ((nn.Sequential(pruned_with_graph(), nn.ReLU()), X), {}, ValueError, "`model` cannot be copied"),
        ((to_low_curvature(NET, X), X), {}, ValueError, "nothing to convert"),
        ((NET, X), {"beta": 0}, ValueError, "`beta` must be a finite number > 0"),
        ((NET, X), {"beta": "10"}, TypeError, "`beta` must be a number"),
        ((NET, X), {"gamma": -1.0}, ValueError, "`gamma` must be a finite number > 0"),
        ((NET, X), {"max_pool": "mean"}, ValueError, "`max_pool` must be one of"),
        ((NET, X), {"skip": "layer9"}, ValueError, "`skip` names 'layer9', which is no module"),
        ((NET, X), {"skip": [3]}, TypeError, "`skip` must hold module paths or classes"),
        ((NET, X), {"activations": ["SiLU"]}, TypeError, "`activations` must hold classes"),
        ((torch.compile(NET), X), {}, ValueError, "compiled or scripted.*convert it first"),
        ((nn.DataParallel(NET), X), {}, ValueError, "wrapped in DataParallel; convert `model.module`"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        to_low_curvature(*arguments, **options)
