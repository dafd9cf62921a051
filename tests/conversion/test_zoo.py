"""Conversion and folding of networks of torchvision and timm, with random weights and small images."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from lightning_lcnn.conversion import fold, to_low_curvature
from lightning_lcnn.conversion.options import OUTPUT_LAYER

# In float64 the softplus differs from ReLU by log(2) / β = 7e-10 and the γ of batch norms by rounding
BETA = 1e9


def vgg11_bn() -> nn.Module:
    """With a small head: the original's has 100 million weights."""
    model = models.vgg11_bn(num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return model


# how the network is made, classes that change, what is left alone and why
ZOO = {
    "resnet18": (
        lambda: models.resnet18(num_classes=10),
        {"Conv2d": 20, "BatchNorm2d": 20, "ReLU": 9},
        {("MaxPool2d", "max_pool='keep'"): 1},
    ),
    "resnet50": (
        lambda: models.resnet50(num_classes=10),
        {"Conv2d": 53, "BatchNorm2d": 53, "ReLU": 17},
        {("MaxPool2d", "max_pool='keep'"): 1},
    ),
    "vgg11_bn": (
        vgg11_bn,
        {"Conv2d": 8, "BatchNorm2d": 8, "ReLU": 9, "Linear": 1},
        {("MaxPool2d", "max_pool='keep'"): 5},
    ),
    "mobilenet_v2": (
        lambda: models.mobilenet_v2(num_classes=10),
        {"Conv2d": 52, "BatchNorm2d": 52, "ReLU6": 35},
        {},
    ),
    "densenet121": (  # its last ReLU is a call of F.relu
        lambda: models.densenet121(num_classes=10),
        {"Conv2d": 120, "BatchNorm2d": 121, "ReLU": 121},
        {("MaxPool2d", "max_pool='keep'"): 1},
    ),
    "googlenet": (  # all of its ReLUs are
        lambda: models.googlenet(num_classes=10, aux_logits=False, init_weights=False),
        {"Conv2d": 57, "BatchNorm2d": 57, "ReLU": 57},
        {("MaxPool2d", "max_pool='keep'"): 13},
    ),
    "timm resnet18": (
        lambda: timm.create_model("resnet18", num_classes=10),
        {"Conv2d": 20, "BatchNorm2d": 20, "ReLU": 17},
        {("MaxPool2d", "max_pool='keep'"): 1},
    ),
    "timm efficientnet_lite0": (  # BatchNormAct2d
        lambda: timm.create_model("efficientnet_lite0", num_classes=10),
        {"Conv2d": 49, "BatchNorm2d": 49, "ReLU6": 33},
        {},
    ),
    "timm mobilenetv3_small_050": (
        lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
        {"Conv2d": 53, "BatchNorm2d": 34, "ReLU": 14, "Hardsigmoid": 9, "Hardswish": 19},
        {},
    ),
    "timm convnext_atto": (
        lambda: timm.create_model("convnext_atto", num_classes=10),
        {"Conv2d": 40, "GELU": 12},
        {("LayerNorm2d", "no counterpart"): 17, ("ConvNeXtBlock", "holds parameters of its own"): 12},
    ),
    "timm regnetx_002": (
        lambda: timm.create_model("regnetx_002", num_classes=10),
        {"Conv2d": 44, "BatchNorm2d": 44, "ReLU": 40},
        {},
    ),
    "timm vit_tiny_patch16_224": (
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32),
        {"Linear": 48, "Conv2d": 1, "GELU": 12},
        {
            ("LayerNorm", "no counterpart"): 25,
            ("VisionTransformer", "holds parameters of its own"): 1,
        },
    ),
}


def calibrate(model: nn.Module) -> nn.Module:
    """Give the batch norms weights that are not one, and statistics of data; in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 32, 32) + 0.3)
    return model.eval()


@pytest.mark.filterwarnings("ignore:to_low_curvature left")  # Hardswish
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    torch.manual_seed(0)
    make, changed, kept = ZOO[name]
    model = calibrate(make()).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    converted, report = to_low_curvature(model, x, beta=BETA, return_report=True)
    assert Counter(row.before for row in report.changed) == changed
    output_layer = Counter({("Linear", OUTPUT_LAYER): 1})
    assert Counter((row.what, row.reason) for row in report.kept) == Counter(kept) + output_layer
    with torch.no_grad():
        expected, got, folded = model(x), converted(x), fold(converted)(x)
    assert expected.std(0).min() > 0  # the images do make a difference
    error = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
    assert error < 1e-6
    torch.testing.assert_close(folded, got, rtol=1e-8, atol=1e-10)


def test_float32_and_gradients():
    """In the user's own precision, within the promised 1e-4; and every new parameter can be trained."""
    torch.manual_seed(0)
    model, x = calibrate(models.resnet18(num_classes=10)), torch.randn(2, 3, 32, 32)
    converted = to_low_curvature(model, x, beta=1e6)
    expected = model(x)
    error = torch.linalg.vector_norm(converted(x) - expected) / torch.linalg.vector_norm(expected)
    assert error < 1e-4
    smooth = to_low_curvature(model, x, max_pool="average").train()
    smooth(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in smooth.parameters())
