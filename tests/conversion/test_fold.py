"""fold: plain layers with the same outputs, for inference and export."""

from __future__ import annotations

import copy
import pickle

import onnx.reference
import pytest
import torch
from torch import nn

from lightning_lcnn.conversion import fold, to_low_curvature
from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm1d,
    LipschitzBatchNorm2d,
    LipschitzBatchNorm3d,
    PiecewiseSoftplus,
    SpectralConv1d,
    SpectralConv2d,
    SpectralConv3d,
    SpectralLinear,
)
from lightning_lcnn.models import resnet18, vgg11

OURS = ("right_vector", "spectral_gradient", "log_gamma")
CASES = [
    (SpectralLinear(3, 4, gamma=2.0), LipschitzBatchNorm1d(4, gamma=0.3), (5, 3)),
    (SpectralLinear(3, 4, bias=False), LipschitzBatchNorm1d(4, affine=False, gamma=0.3), (5, 3)),
    (SpectralConv1d(3, 4, 3, gamma=0.5), LipschitzBatchNorm1d(4, gamma=None), (5, 3, 8)),
    (
        SpectralConv2d(4, 4, 3, stride=2, groups=2, dilation=2, padding="valid"),
        LipschitzBatchNorm2d(4, eps=0.1),
        (5, 4, 9, 8),
    ),
    (SpectralConv2d(3, 4, 3, padding="same", bias=False), LipschitzBatchNorm2d(4, gamma=0.1), (5, 3, 6, 6)),
    (SpectralConv3d(2, 4, 2, gamma=3.0), LipschitzBatchNorm3d(4, momentum=None), (5, 2, 4, 4, 4)),
]


def trained(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Move all parameters and statistics from where they start."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    with torch.no_grad():
        for _ in range(3):
            model.train()(2 * torch.randn(shape) + 1)
    return model.eval()


def leaves(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if not list(m.children())]


@pytest.mark.parametrize(("layer", "norm", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers(layer, norm, shape, dtype):
    acts = [CenteredSoftplus(3.0), PiecewiseSoftplus((0.0, 6.0), (1.0, -1.0))]
    model = trained(copy.deepcopy(nn.Sequential(layer, norm, *acts)), shape).to(dtype)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(shape, dtype=dtype)
    kept, fused = fold(model), fold(model, x, batch_norm="fuse")
    stock = [type(layer).__name__.removeprefix("Spectral"), type(norm).__name__.removeprefix("Lipschitz")]
    assert leaves(kept) == [*stock, "CenteredSoftplus", "CenteredSoftplus"]
    assert leaves(fused) == [stock[0], "Identity", "CenteredSoftplus", "CenteredSoftplus"]
    for folded in (kept, fused):
        # sums of a few dozen products, rounded in another order
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)
        assert not [key for key in folded.state_dict() if key.endswith(OURS)]
        assert not [key for key, _ in folded.named_parameters() if "log_beta" in key]
        assert {p.dtype for p in folded.parameters()} == {dtype}
        assert torch.equal(pickle.loads(pickle.dumps(folded))(x), folded(x))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("build", [resnet18, vgg11])
def test_networks_fold_and_export(build):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = trained(build(width=4, low_curvature=True, gamma=2.0), x.shape)
    expected = model(x)
    for folded in (fold(model), fold(model, x, batch_norm="fuse")):
        error = (folded(x) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5
        exported = torch.export.export(folded, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=1e-5, atol=1e-5)
    assert leaves(folded).count("Identity") >= leaves(model).count("LipschitzBatchNorm2d")


def test_onnx():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    folded = fold(trained(resnet18(width=2, low_curvature=True, input_size=(16, 16)), x.shape))
    program = torch.onnx.export(folded, (x,), dynamo=True, verbose=False)
    session = onnx.reference.ReferenceEvaluator(program.model_proto)
    (got,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), folded(x), rtol=1e-5, atol=1e-5)


def test_a_plain_batch_norm_behind_a_plain_convolution_fuses_too():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(3), CenteredSoftplus())
    x = torch.randn(4, 2, 6, 6)
    folded = fold(trained(net, x.shape), x, batch_norm="fuse")
    assert leaves(folded) == ["Conv2d", "Identity", "CenteredSoftplus"]
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-6)


def test_a_batch_norm_over_another_dimension_stays():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = SpectralLinear(4, 5), LipschitzBatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.fc(x))  # (N, 5, 5): the norm's channels are the tokens

    x = torch.randn(3, 5, 4)
    model = trained(Tokens(), x.shape)
    folded = fold(model, x, batch_norm="fuse")
    assert leaves(folded) == ["Linear", "BatchNorm1d"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_batch_norm_that_does_not_get_all_stays():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = SpectralConv2d(2, 2, 1), LipschitzBatchNorm2d(2), CenteredSoftplus()

        def forward(self, x):
            x = self.conv(x)
            return x + self.act(self.norm(x))

    x = torch.randn(4, 2, 6, 6)
    model = trained(Branch(), x.shape)
    folded = fold(model, x, batch_norm="fuse")
    assert leaves(folded) == ["Conv2d", "BatchNorm2d", "CenteredSoftplus"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)


def test_flags_hooks_and_shared_layers():
    layer = SpectralLinear(3, 3)
    layer.requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    model = nn.Sequential(layer, CenteredSoftplus(2.0, num_channels=3), layer).train()
    folded = fold(model)
    assert model.training
    assert not folded.training
    assert folded[0] is folded[2]
    assert not folded[0].weight.requires_grad
    x = torch.randn(2, 3)
    torch.testing.assert_close(folded(x), model.eval()(x))
    assert calls == ["Linear"] * 2 + ["SpectralLinear"] * 2


def test_a_rewritten_module_folds():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return torch.relu(self.fc(x))

    x = torch.randn(2, 3)
    converted = to_low_curvature(Net(), x)
    folded = fold(converted)
    assert leaves(folded) == ["Linear", "CenteredSoftplus"]
    torch.testing.assert_close(folded(x), converted(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.ones(3)}, TypeError, "`model` must be an nn.Module"),
        ({"model": nn.Linear(3, 3)}, ValueError, r"`model` \(Linear\) has nothing to fold"),
        ({"model": SpectralLinear(3, 3), "batch_norm": "drop"}, ValueError, "`batch_norm` must be one of"),
        ({"model": SpectralLinear(3, 3), "batch_norm": "fuse"}, ValueError, "needs `example_input`"),
        (
            {"model": SpectralLinear(3, 3), "batch_norm": "fuse", "example_input": torch.ones(1, 2)},
            ValueError,
            "does not pass through `model`",
        ),
        ({"model": LipschitzBatchNorm1d(3, track_running_stats=False)}, ValueError, "keeps no running statistics"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fold(**arguments)
