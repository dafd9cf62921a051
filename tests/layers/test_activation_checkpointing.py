"""Blocks that are computed again in backward (torch.utils.checkpoint) train as the others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.layers import CenteredSoftplus, LipschitzBatchNorm2d, SpectralConv2d, SpectralLayer, spectral_layers
from lightning_lcnn.mixin import LCNNMixin
from lightning_lcnn.models import resnet18
from tests.lightning_helpers import FILTERS, examples, loader, plain_classifier, trainer

pytestmark = FILTERS
Plain = plain_classifier()


def block(norm: Callable[[int], nn.Module], unknown_size: bool = False) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        size = None if unknown_size else (6, 6)
        conv = SpectralConv2d(1, 3, 3, padding=1, input_size=size, gamma=2.0)
        return nn.Sequential(conv, norm(3), CenteredSoftplus(4.0, inplace=True))


def one_step(net: nn.Module, again: bool, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients by input and parameters, and the buffers afterwards."""
    x = examples(5)[0].requires_grad_()
    output = checkpoint(net, x, **options) if again else net(x)
    output.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in net.parameters())], dict(net.named_buffers())


@pytest.mark.parametrize("unknown_size", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_equal_to_the_last_bit(reentrant: bool, unknown_size: bool) -> None:
    def norm(channels: int) -> nn.Module:
        return LipschitzBatchNorm2d(channels, gamma=0.5)

    expected, buffers = one_step(block(norm, unknown_size), again=False)
    got, again = one_step(block(norm, unknown_size), again=True, use_reentrant=reentrant)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for name in ("0.spectral_gradient", "0.right_vector"):  # forward refreshes nothing, so nothing is refreshed twice
        assert torch.equal(again[name], buffers[name])


@pytest.mark.parametrize("again", [False, True])
def test_running_statistics_are_counted_as_torch_counts_them(again: bool) -> None:
    _, expected = one_step(block(nn.BatchNorm2d), again, use_reentrant=False)
    _, ours = one_step(block(lambda channels: LipschitzBatchNorm2d(channels, gamma=1e-3)), again, use_reentrant=False)
    assert ours["1.num_batches_tracked"] == (2 if again else 1)  # torch counts a batch for each forward
    for name in ("1.num_batches_tracked", "1.running_mean", "1.running_var"):
        torch.testing.assert_close(ours[name], expected[name])


def test_resnet_blocks() -> None:
    """Every residual block computed again: same gradients as without."""
    torch.manual_seed(0)
    net = resnet18(width=4, low_curvature=True)
    x = torch.randn(4, 3, 8, 8)
    gradients = []
    for again in (False, True):
        net.zero_grad()
        handles = [_computed_again(module) for module in net.modules() if again and _is_block(module)]
        assert len(handles) == (8 if again else 0)
        net(x).logsumexp(1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _is_block(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Block")


def _computed_again(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
    return module


class Low(LCNNMixin, Plain):
    """The convolution, batch norm and activation are computed again if asked to."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.features, self.head, self.again = self.net[:3], self.net[3:], again
        self.features[1].momentum = 0.0  # torch counts a batch twice, and the penalty reads the running statistics
        del self.net

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.features, x, use_reentrant=False) if self.again else self.features(x)
        return self.head(x)


def test_training_with_callbacks_refreshes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    update = SpectralLayer.update_spectral_norm

    def counted(layer: SpectralLayer, num_iterations: int = 5) -> Tensor:
        counts[-1] += 1
        return update(layer, num_iterations)

    monkeypatch.setattr(SpectralLayer, "update_spectral_norm", counted)
    states = []
    for again in (False, True):
        counts.append(0)
        module = Low(again)
        trainer(callbacks=[PowerIteration(every_n_steps=2)]).fit(module, loader(32))
        states.append(module.state_dict())
        layers = len(list(spectral_layers(module)))
    assert counts == [3 * layers] * 2  # 8 steps: after 2, 4 and 6
    for name, value in states[0].items():
        if name != "features.1.num_batches_tracked":
            assert torch.equal(value, states[1][name]), name
