"""Averaged networks: Lightning's callbacks and torch's tools, with spectral norms and running statistics that fit."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.optim.swa_utils import update_bn as torch_update_bn

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.layers import (
    CenteredSoftplus,
    LipschitzBatchNorm2d,
    SpectralConv2d,
    SpectralLinear,
    lcnn_parameter_groups,
    spectral_layers,
    update_bn,
    update_spectral_norm,
)
from lightning_lcnn.mixin import LCNNMixin
from tests.lightning_helpers import FILTERS, examples, loader, plain_classifier, probe, small_net, trainer

pytestmark = FILTERS
Plain = plain_classifier()
pytest.importorskip("lightning.pytorch.callbacks.weight_averaging", reason="came with Lightning 2.6")
callbacks = importlib.import_module("lightning.pytorch.callbacks")


class Low(LCNNMixin, Plain):
    """Steps so large that averaged singular vectors fit nothing."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(lcnn_parameter_groups(self), lr=0.1)


def norms(net: nn.Module) -> list[float]:
    """Norms of the layers as forward uses them, from dense matrices: 1, or γ, where they are normalised."""
    found = []
    for layer in spectral_layers(net):
        shape = tuple(layer.right_vector.shape)
        basis = torch.eye(layer.right_vector.numel()).reshape(-1, *shape)
        weight = layer.normalized_weight().detach()
        image = basis @ weight.T if weight.ndim == 2 else nn.functional.conv2d(basis, weight, padding=1)
        found.append(torch.linalg.matrix_norm(image.flatten(1), 2).item() / layer.slope().item())
    return found


def off(net: nn.Module) -> float:
    return max(abs(norm - 1) for norm in norms(net))


def fit(runner: Any, module: Any, **kwargs: Any) -> None:
    runner.fit(module, loader(32), loader(8), **kwargs)


@pytest.mark.parametrize("first", ["averaging", "power iteration"])
def test_averaged_network_is_normalised_wherever_it_is_used(first: str, tmp_path: Path) -> None:
    seen: dict[str, float] = {}
    average = callbacks.EMAWeightAveraging(decay=0.8)

    def look(runner: Any, module: Any) -> None:
        if runner.training:
            seen["step"] = off(average._average_model)
        elif not runner.sanity_checking:
            seen["validation"] = off(module.net)

    order = [average, PowerIteration(every_n_steps=4)]
    order = order if first == "averaging" else order[::-1]
    module = Low()
    probes = [probe("on_validation_batch_start", look), probe("on_train_batch_start", look)]
    runner = trainer(callbacks=[*order, *probes], max_epochs=2)
    fit(runner, module)
    runner.save_checkpoint(tmp_path / "averaged.ckpt")
    saved = small_net()
    state = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    saved.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    assert seen["step"] > 3e-3  # left alone, the averaged vectors do not fit
    # 1e-3 is the tolerance of the convergence, of σ²
    assert off(module.net) < 1e-3
    assert off(saved) < 1e-3
    assert seen["validation"] < 1e-3
    assert torch.equal(module.net[0].weight, saved[0].weight)


def trained_average(use_buffers: bool) -> AveragedModel:
    """EMA of a network in a loop without Lightning."""
    net = small_net()
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.8), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(lcnn_parameter_groups(net), lr=0.1)
    x, y = examples(64)
    for step in range(16):
        batch = slice(4 * step, 4 * step + 4)
        if step % 4 == 0:
            update_spectral_norm(net)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        average.update_parameters(net)
    return average


@pytest.mark.parametrize("use_buffers", [True, False])
def test_update_bn_makes_an_average_valid(use_buffers: bool) -> None:
    average = trained_average(use_buffers)
    assert not use_buffers or off(average) > 0.01  # what there is to repair: an average of G is no G
    x, _ = examples(12)
    update_bn([(x[:4],), (x[4:8],), (x[8:],)], average)
    assert off(average) < 1e-3
    conv, norm = average.module[0], average.module[1]
    features = conv(x).detach().reshape(3, 4, 4, 36)
    torch.testing.assert_close(norm.running_mean, features.mean((0, 1, 3)))
    variances = features.transpose(1, 2).flatten(2).var(2)  # of each batch, unbiased
    torch.testing.assert_close(norm.running_var, variances.mean(0))
    assert (norm.momentum, average.training) == (0.1, True)
    bound = network_bound(average.module.eval(), x[:1])
    slopes = [norm.slope().item(), 2.0 if average.module[4].gamma is None else average.module[4].gamma.item()]
    head = torch.linalg.matrix_norm(average.module[6].weight, 2).item()
    assert bound.slope <= 1.001 * slopes[0] * slopes[1] * head * 1.1  # the norm bound of a convolution: up to 9 % above


def test_update_bn_does_what_torchs_does() -> None:
    x, _ = examples(12)
    ours = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.0)).eval()
    theirs = copy.deepcopy(ours)
    update_bn(x.split(5), ours)
    torch_update_bn(x.split(5), theirs)
    assert ours.training is theirs.training is False
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_update_bn_restores_the_network_after_an_error() -> None:
    net = nn.Sequential(LipschitzBatchNorm2d(3, momentum=0.3)).eval()
    with pytest.raises(ValueError, match="4-dimensional"):
        update_bn([torch.zeros(2, 3)], net)
    assert (net[0].momentum, net.training, net[0].training) == (0.3, False, False)


def test_averaging_refuses_layers_of_unknown_input_size() -> None:
    module = Low()
    module.net = nn.Sequential(
        SpectralConv2d(1, 4, 3, padding=1), CenteredSoftplus(), nn.Flatten(), SpectralLinear(144, 3)
    )
    runner = trainer(callbacks=[callbacks.EMAWeightAveraging()])
    with pytest.raises(ValueError, match=r"net.0 \(SpectralConv2d\) has not seen an input.*`input_size`"):
        fit(runner, module)
    module.net(torch.zeros(1, 1, 6, 6))
    fit(trainer(callbacks=[callbacks.EMAWeightAveraging()]), module)


def test_stochastic_weight_averaging_then_update_bn() -> None:
    """The older callback averages parameters alone, and renews running statistics in an epoch of its own."""
    module = Low()
    swa = callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1, annealing_epochs=1)
    fit(trainer(callbacks=[swa], max_epochs=3), module)
    assert off(module.net) < 1e-3
    before = module.net[1].running_mean.clone()
    update_bn(loader(32), module.net)
    features = [module.net[0](x).detach() for x, _ in loader(32)]
    expected = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    torch.testing.assert_close(module.net[1].running_mean, expected)
    assert torch.allclose(before, expected, rtol=1e-2)  # up to the norms, which Lightning does not renew first


def test_resumed_averaging_is_equal_to_the_last_bit(tmp_path: Path) -> None:
    straight, half, resumed = Low(), Low(), Low()
    fit(trainer(callbacks=[callbacks.EMAWeightAveraging(decay=0.8)], max_epochs=2), straight)
    runner = trainer(callbacks=[callbacks.EMAWeightAveraging(decay=0.8), _save_at_epoch_end(tmp_path)], max_epochs=1)
    fit(runner, half)
    fit(
        trainer(callbacks=[callbacks.EMAWeightAveraging(decay=0.8)], max_epochs=2),
        resumed,
        ckpt_path=tmp_path / "half.ckpt",
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def _save_at_epoch_end(folder: Path) -> Any:
    return probe("on_train_epoch_end", lambda runner, module: runner.save_checkpoint(folder / "half.ckpt"))
