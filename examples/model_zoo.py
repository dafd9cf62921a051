"""Networks of torchvision and timm with random weights: small ones of every family, and full-size ones by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import BlurPool2d, GroupNormAct
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convmixer import ConvMixer
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision import models as tv
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.vgg import make_layers


@dataclass(frozen=True)
class Case:
    """A network to examine.

    Args:
        family: Name in the library.
        build: Makes it with random weights, for 10 classes.
        size: Height and width of the images.
        onnx: Whether to export it with ONNX too.
    """

    family: str
    build: Callable[[], nn.Module]
    size: int = 32
    onnx: bool = False


def vgg(batch_norm: bool) -> nn.Module:
    """VGG with four convolutions and a small head."""
    with torch.device("meta"):  # the original's head has 100 million weights
        model = tv.VGG(nn.Sequential(), num_classes=10)
    model.features = make_layers([16, "M", 32, "M", 32, 32, "M"], batch_norm)
    model.classifier = nn.Sequential(nn.Linear(32 * 49, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
    return model


def mobilenet_v3() -> nn.Module:
    """Three blocks, with squeeze-and-excitation and Hardswish in two."""
    rows = [(16, 3, 16, 16, True, "RE", 2, 1), (16, 3, 48, 24, False, "RE", 2, 1), (24, 5, 96, 40, True, "HS", 2, 1)]
    return tv.MobileNetV3([InvertedResidualConfig(*row, width_mult=1.0) for row in rows], 64, num_classes=10)


def efficientnet() -> nn.Module:
    """Three stages with squeeze-and-excitation and SiLU."""
    rows = [(1, 3, 1, 16, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1)]
    settings = [MBConvConfig(*row, width_mult=1.0, depth_mult=1.0) for row in rows]
    return tv.EfficientNet(settings, dropout=0.1, last_channel=64, num_classes=10)


def regnet(se_ratio: float | None) -> nn.Module:
    """Two stages of two blocks."""
    return tv.RegNet(BlockParams([2, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio), num_classes=10)


def convnext() -> nn.Module:
    """Two stages of one block."""
    return tv.ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=10)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 up to its fourth fire module."""
    model = tv.squeezenet1_1(num_classes=10)
    model.features = model.features[:7]
    model.classifier[1] = nn.Conv2d(256, 10, 1)
    return model


def resnet_of_timm(block: type[nn.Module], **options: Any) -> nn.Module:
    """ResNet of one narrow block in each stage."""
    return ResNet(block, (1, 1, 1, 1), num_classes=10, stem_width=8, channels=(8, 16, 24, 32), **options)


def resnet_v2() -> nn.Module:
    """BiT: weight standardisation, group norm and pre-activation."""
    norm = partial(GroupNormAct, num_groups=4)
    return ResNetV2([1, 1], (32, 64), num_classes=10, stem_chs=32, stem_type="fixed", norm_layer=norm)


def repvgg() -> nn.Module:
    """Parallel 3×3, 1×1 and identity branches, each with its batch norm."""
    blocks = tuple(ByoBlockCfg(type="rep", d=2, c=channels, s=2, gs=0) for channels in (16, 32))
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type="rep", stem_chs=16), num_classes=10)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of timm with some options changed."""
    return partial(timm.create_model, name, num_classes=10, **options)


_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
_MIXER: dict[str, Any] = {"num_classes": 10, "img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 48}
_SE = {"block_args": {"attn_layer": "se"}}

SMALL: tuple[Case, ...] = (
    Case("torchvision resnet18", lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], 10), onnx=True),
    Case("torchvision vgg16", partial(vgg, False)),
    Case("torchvision vgg11_bn", partial(vgg, True)),
    Case("torchvision densenet121", lambda: tv.DenseNet(8, (2, 2), 16, num_classes=10)),
    Case("torchvision squeezenet1_1", squeezenet, 48),
    Case("torchvision shufflenet_v2", lambda: tv.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], 10)),
    Case("torchvision mobilenet_v2", lambda: tv.MobileNetV2(10, 0.25, [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]])),
    Case("torchvision mobilenet_v3", mobilenet_v3),
    Case("torchvision regnet_x", partial(regnet, None)),
    Case("torchvision regnet_y", partial(regnet, 0.25)),
    Case("torchvision efficientnet_b0", efficientnet),
    Case("torchvision convnext_tiny", convnext, onnx=True),
    Case("torchvision vit_b_16", lambda: tv.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10), onnx=True),
    Case("torchvision swin_t", lambda: tv.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)),
    Case("torchvision maxvit_t", lambda: tv.MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10)),
    Case("timm resnet26d", lambda: resnet_of_timm(Bottleneck, stem_type="deep", avg_down=True)),
    Case("timm resnext50_32x4d", lambda: resnet_of_timm(Bottleneck, cardinality=4, base_width=32)),
    Case("timm seresnet18", lambda: resnet_of_timm(BasicBlock, **_SE)),
    Case("timm resnetblur18", lambda: resnet_of_timm(BasicBlock, aa_layer=BlurPool2d)),
    Case("timm test_resnet", of_timm("test_resnet")),
    Case("timm resnetv2_50x1_bit", resnet_v2, 64),
    Case("timm test_nfnet", of_timm("test_nfnet")),
    Case("timm repvgg_a0", repvgg),
    Case("timm test_byobnet", of_timm("test_byobnet")),
    Case("timm test_efficientnet", of_timm("test_efficientnet")),
    Case("timm test_efficientnet_gn", of_timm("test_efficientnet_gn")),
    Case("timm test_efficientnet_evos", of_timm("test_efficientnet_evos")),
    Case("timm test_convnext", of_timm("test_convnext")),
    Case("timm test_mambaout", of_timm("test_mambaout")),
    Case("timm convmixer_768_32", lambda: ConvMixer(24, 2, 5, 4, num_classes=10)),
    Case("timm mixer_s32_224", lambda: MlpMixer(**_MIXER)),
    Case("timm resmlp_12_224", lambda: MlpMixer(**_MIXER, block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4)),
    Case("timm deit_tiny_patch16_224", of_timm("deit_tiny_patch16_224", **_VIT)),
    Case("timm test_vit4", of_timm("test_vit4", img_size=32)),
    Case("timm test_coatnet", of_timm("test_coatnet", img_size=64), 64),
)

# by size of the images
TORCHVISION = {
    32: "resnet18 resnet34 resnet50 resnet101 wide_resnet50_2 resnext50_32x4d vgg11 vgg16_bn densenet121 densenet169 "
    "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 "
    "efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf googlenet convnext_tiny",
    64: "alexnet squeezenet1_0 squeezenet1_1 swin_t swin_v2_t",
    96: "inception_v3",
    224: "vit_b_16 maxvit_t",
}
TIMM = {
    32: "resnet18 resnet18d resnet26d resnet26t seresnet18 legacy_seresnet18 ecaresnet26t resnetblur18 skresnet18 "
    "resnetv2_18 resnetv2_50x1_bit nf_regnet_b0 nfnet_l0 regnetx_002 regnety_002 rexnet_100 repvgg_a0 repghostnet_050 "
    "ghostnet_050 mobilenetv3_small_050 mobilenetv4_conv_small efficientnet_lite0 semnasnet_050 mixnet_s tinynet_e "
    "hardcorenas_a lcnet_035 fbnetc_100 mobileone_s0 dla34 darknet17 cspresnet50 res2net50_14w_8s vovnet39a gernet_s "
    "selecsls42 convmixer_768_32 convnext_atto",
    64: "resnest14d hrnet_w18_small xception41 edgenext_xx_small fastvit_t8 efficientvit_b0 poolformer_s12 "
    "starnet_s050 mambaout_femto shvit_s1 mobilevit_xxs inception_next_atto pvt_v2_b0 xcit_nano_12_p8_224 "
    "twins_svt_small",
    224: "vit_tiny_patch16_224 deit_tiny_patch16_224 swin_tiny_patch4_window7_224 levit_128s efficientformer_l1 "
    "efficientvit_m0 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 visformer_tiny beit_base_patch16_224",
}


def full_size() -> tuple[Case, ...]:
    """The networks as they are, with random weights."""
    cases = []
    for size, names in TORCHVISION.items():
        for name in names.split():
            extra = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
            cases.append(Case(f"torchvision {name}", partial(tv.get_model, name, num_classes=10, **extra), size))
    for size, names in TIMM.items():
        cases += [Case(f"timm {name}", of_timm(name), size) for name in names.split()]
    return tuple(cases)
