"""LitClassifier and the networks that it finds by name: weights, forms, heads, penalties, metrics, checkpoints."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_lcnn import to_low_curvature
from lightning_lcnn.bounds import network_bound
from lightning_lcnn.callbacks import PowerIteration
from lightning_lcnn.checkpoints import load_classifier
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.data import Digits
from lightning_lcnn.layers import SpectralConv2d
from lightning_lcnn.layers.upkeep import log_betas
from lightning_lcnn.metrics import NormalizedCurvature
from lightning_lcnn.models.by_name import build_network, known_names, load_weights
from lightning_lcnn.models.normalize import Normalize
from lightning_lcnn.penalties import CurvaturePenalty
from tests.lightning_helpers import FILTERS, trainer

pytestmark = FILTERS
SMALL = {"num_classes": 3, "image_shape": (3, 32, 32), "arguments": {"width": 2}}


@pytest.mark.parametrize(
    ("name", "max_pool"),
    [("resnet18", "keep"), ("resnet34", "smooth"), ("vgg11", "keep"), ("vgg11", "smooth"), ("vgg11", "average")],
)
def test_built_and_converted_networks_load_each_other(name, max_pool):
    """A checkpoint is rebuilt by its name, whether the network was built low-curvature or converted from weights."""
    standard = build_network(name, **SMALL).eval()
    options = {"low_curvature": True, "beta": 1e4, "max_pool": max_pool}
    converted = build_network(name, weights=standard.state_dict(), **options, **SMALL).eval()
    rebuilt = build_network(name, **options, **SMALL).eval()
    rebuilt.load_state_dict(converted.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(rebuilt(x), converted(x))
    if max_pool != "average":
        torch.testing.assert_close(converted(x), standard(x), atol=2e-3, rtol=2e-3)


def test_names():
    assert isinstance(build_network("torchvision/resnet18", 4), torchvision.models.ResNet)
    tiny = build_network("timm/resnet10t", 4, (1, 32, 32), low_curvature=True)
    assert tiny(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    assert log_betas(tiny)
    assert build_network("torch.nn.Linear", arguments={"in_features": 2, "out_features": 3}).out_features == 3
    assert {"resnet18", "torchvision/vgg11", "timm/resnet18"} <= set(known_names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "'resnet' is unknown: did you mean resnet"),
        ("resnet50", "did you mean .*torchvision/resnet50"),
        ("torchvision/resnet17", "did you mean torchvision/resnet1"),
        ("timm/resnet18x", "did you mean timm/resnet18"),
        ("qqqqqqqq", "ours are resnet18, resnet34, vgg11"),
        ("torch.nn.Lineer", "cannot be imported"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        build_network(name)


def test_a_function_must_return_a_module():
    with pytest.raises(TypeError, match=re.escape("`network` 'builtins.dict' must return a torch.nn.Module, got dict")):
        build_network("builtins.dict")
    with pytest.raises(ValueError, match="`pretrained` needs a network of torchvision or timm, got 'resnet18'"):
        build_network("resnet18", pretrained=True)


def test_pretrained_weights_are_asked_for_and_the_head_is_new(monkeypatch):
    asked = {}

    def get_model(name, weights=None, **arguments):
        asked.update(name=name, weights=weights)
        return getattr(torchvision.models, name)(**arguments)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    lit = LitClassifier("torchvision/resnet18", 7, (3, 32, 32), pretrained=True)
    assert asked == {"name": "resnet18", "weights": "DEFAULT"}
    assert lit.network.fc.out_features == 7
    assert lit.hparams.pretrained is False  # a checkpoint brings its weights
    original = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **a: asked.update(timm=pretrained) or original(name, **a)
    )
    build_network("timm/resnet10t", 5, pretrained=True)
    assert asked["timm"] is True


def test_weights_of_another_number_of_classes_keep_the_head_new():
    network = build_network("resnet18", **SMALL)
    other = build_network("resnet18", **(SMALL | {"num_classes": 8}))
    head = network.fc.weight.clone()
    load_weights(network, {f"module.{key}": value for key, value in other.state_dict().items()})
    assert torch.equal(network.conv1.weight, other.conv1.weight)
    assert torch.equal(network.fc.weight, head)


def test_weights_that_do_not_fit():
    network = build_network("resnet18", **SMALL)
    wide = build_network("resnet18", **(SMALL | {"arguments": {"width": 4}})).state_dict()
    with pytest.raises(ValueError, match=r"standard network ResNet: another shape of conv1.weight, .* \.\.\."):
        load_weights(network, wide)
    with pytest.raises(ValueError, match=r"no conv1\.weight, .*; unknown features\.0\.weight"):
        load_weights(network, build_network("vgg11", **SMALL).state_dict())
    low = build_network("resnet18", low_curvature=True, **SMALL)
    with pytest.raises(ValueError, match="the standard network ResNet: unknown"):
        build_network("resnet18", weights=low.state_dict(), **SMALL)


def test_penalties_follow_the_form():
    options = {"num_classes": 3, "image_shape": (3, 8, 8), "network_args": {"width": 2}}
    assert LitClassifier(**options).configure_penalties() == []
    (penalty,) = LitClassifier(low_curvature=True, **options).configure_penalties()
    assert isinstance(penalty, CurvaturePenalty)
    chosen = [CurvaturePenalty(weight=0.5)]
    assert LitClassifier(low_curvature=True, penalties=chosen, **options).configure_penalties() is chosen


def test_recompute_trains_the_same_network():
    weights = []
    for recompute in (False, True):
        torch.manual_seed(0)
        lit = LitClassifier("resnet18", 10, (1, 8, 8), {"width": 2}, low_curvature=True, recompute=recompute)
        trainer(max_epochs=1).fit(lit, datamodule=Digits(limit_train=128))
        assert lit.hparams.recompute is recompute
        weights.append(lit.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_fit_logs_metrics_and_the_checkpoint_is_the_same_to_the_last_bit(tmp_path):
    lit = LitClassifier(
        "resnet18",
        10,
        (1, 8, 8),
        network_args={"width": 2},
        low_curvature=True,
        metrics={"curvature": NormalizedCurvature(max_examples=4)},
        mean=[0.3],
        std=[0.2],
    )
    data = Digits(limit_train=128)
    fit = trainer(max_epochs=1)
    before = [value.item() for value in log_betas(lit).values()]
    fit.fit(lit, datamodule=data)
    assert {"train_loss", "val_loss", "val_accuracy", "val_curvature"} <= set(fit.callback_metrics)
    assert [value.item() for value in log_betas(lit).values()] != before
    assert any(isinstance(callback, PowerIteration) for callback in fit.callbacks)
    decays = {group["weight_decay"] for group in fit.optimizers[0].param_groups}
    assert decays == {5e-4, 0.0}
    fit.save_checkpoint(tmp_path / "lit.ckpt")
    x = torch.rand(3, 1, 8, 8)
    expected = lit.eval()(x)
    loaded = load_classifier(tmp_path / "lit.ckpt")
    assert torch.equal(loaded.module(x), expected)
    assert torch.equal(LitClassifier.load_from_checkpoint(tmp_path / "lit.ckpt").eval()(x), expected)
    assert torch.equal(lit.classifier()(x), expected)
    (tested,) = fit.test(lit, datamodule=data, verbose=False)
    assert tested["test_curvature"] > 0


def test_normalisation_is_part_of_the_bound():
    """Slope of x / std is 1 / min(std), of the shift nothing."""
    linear = nn.Linear(12, 2, bias=False).double()
    model = nn.Sequential(Normalize([0.1, 0.2, 0.3], [0.5, 0.25, 0.4]).double(), nn.Flatten(), linear).eval()
    slope = network_bound(model, torch.zeros(1, 3, 2, 2)).slope
    norm = torch.linalg.matrix_norm(linear.weight, 2).item()
    assert slope == pytest.approx(4 * norm, rel=1e-5)
    with pytest.raises(ValueError, match="`std` must be a finite number > 0"):
        Normalize(0.0, 0.0)


def test_untrusted_hyperparameters_import_nothing(tmp_path):
    lit = LitClassifier("resnet18", 3, (3, 8, 8), network_args={"width": 2})
    from lightning_lcnn.cli.convert import lightning_checkpoint

    content = lightning_checkpoint(lit)
    content["hyper_parameters"] |= {"network": "os.system", "network_args": {"command": f"touch {tmp_path}/sprung"}}
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"names code to import, 'os\.system'"):
        load_classifier(tmp_path / "bad.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_checkpoint_of_a_subclass_is_not_taken_for_ours(tmp_path):
    class Mine(LitClassifier):
        pass

    from lightning_lcnn.cli.convert import lightning_checkpoint

    mine = Mine("resnet18", 3, (3, 8, 8), network_args={"width": 2})
    torch.save(lightning_checkpoint(mine), tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"is a checkpoint of another LightningModule, .*Mine; name its class"):
        load_classifier(tmp_path / "mine.ckpt")


def test_a_pickled_conversion_is_loaded_with_trust(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    smooth = to_low_curvature(net, torch.zeros(1, 3, 8, 8)).eval()
    assert isinstance(smooth[0], SpectralConv2d)
    torch.save(smooth, tmp_path / "smooth.pt")
    with pytest.raises(ValueError, match="Loading it runs code from the file"):
        load_classifier(tmp_path / "smooth.pt")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(load_classifier(tmp_path / "smooth.pt", trust=True).module(x), smooth(x))
    (tmp_path / "run").mkdir()
    (tmp_path / "smooth.pt").rename(tmp_path / "run/network.pt")
    assert load_classifier(tmp_path / "run", trust=True).name == "run"
