"""Networks of torchvision and timm: conversion, a training step, the bound or why not, folding and export."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_lcnn.conversion import fold
from lightning_lcnn.penalties import CurvaturePenalty
from tests import ROOT

pytest.importorskip("torchvision")
pytest.importorskip("timm")
# what the bound says, the mode of the penalty that has a graph, and of which networks
EXPECTED = {
    ("finite", "bound"): (
        "torchvision resnet18",
        "torchvision vgg16",
        "torchvision vgg11_bn",
        "torchvision densenet121",
        "torchvision squeezenet1_1",
        "torchvision shufflenet_v2",
        "torchvision mobilenet_v2",
        "torchvision regnet_x",
        "torchvision convnext_tiny",
        "timm resnet26d",
        "timm resnext50_32x4d",
        "timm resnetblur18",
        "timm test_resnet",
        "timm resnetv2_50x1_bit",
        "timm repvgg_a0",
        "timm test_convnext",
        "timm convmixer_768_32",
        "timm mixer_s32_224",
        "timm resmlp_12_224",
    ),
    ("refused: gate", "bound"): (
        "torchvision mobilenet_v3",
        "torchvision regnet_y",
        "torchvision efficientnet_b0",
        "timm seresnet18",
        "timm test_nfnet",
        "timm test_byobnet",
        "timm test_efficientnet",
        "timm test_efficientnet_gn",
        "timm test_mambaout",
    ),
    ("refused: attention", "sum_log"): (
        "torchvision vit_b_16",
        "torchvision swin_t",
        "torchvision maxvit_t",
        "timm deit_tiny_patch16_224",
        "timm test_coatnet",
        "timm test_vit4",
    ),
    ("refused: `var`", "sum_log"): ("timm test_efficientnet_evos",),  # a norm that divides by its input's own variance
}
CASES = {name: (*outcome, name) for outcome, names in EXPECTED.items() for name in names}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import model_table

    return model_table


@pytest.mark.parametrize(("bound", "penalty", "name"), CASES.values(), ids=CASES)
def test_converts_trains_bounds_folds_and_exports(script, bound, penalty, name):
    """The examination raises where one of them fails; here is what it must find beside that."""
    (case,) = (case for case in script.SMALL if case.family == name)
    if case.onnx:
        pytest.importorskip("onnxscript")
    row = script.examine(case)
    assert row.bound.startswith(bound)
    assert row.penalty == penalty
    assert min(row.layers, row.activations) > 0


def test_the_page_tells_the_same(script):
    """All networks are expected something of, and the table of the documentation has it."""
    assert set(CASES) == {case.family for case in script.SMALL}
    table = (ROOT / "docs" / "models.md").read_text().split("<!-- small -->")[1].split("<!-- end of small -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    assert rows[0] == list(script.COLUMNS)
    found = {row[0]: (row[-1], row[-2]) for row in rows[2:]}
    assert set(found) == set(CASES)
    for name, (text, mode) in found.items():
        assert text.startswith(CASES[name][0])
        assert mode == CASES[name][1]


class WithoutGradient(CurvaturePenalty):
    """A penalty that no parameter feels."""

    def __call__(self, model):
        return 0 * super().__call__(model)


def convert_badly(to_low_curvature):
    def convert(*args, **options):
        result = to_low_curvature(*args, **options)
        network = result[0] if isinstance(result, tuple) else result
        with torch.no_grad():
            next(m for m in network.modules() if isinstance(m, nn.Linear)).bias[0] += 0.01
        return result

    return convert


def fold_badly(network):
    folded = fold(network)
    nn.init.zeros_(next(folded.parameters()))
    return folded


def some_groups(network, **_):
    return [p for name, p in network.named_parameters() if name.endswith("log_beta")]


BREAKAGES = {
    "conversion": ("to_low_curvature", convert_badly, "conversion changes the output"),
    "penalty": ("CurvaturePenalty", lambda _: WithoutGradient, "the penalty has the gradient zero in .*log_beta"),
    "step": ("lcnn_parameter_groups", lambda _: some_groups, "the step moves no"),
    "bound": (
        "network_bound",
        lambda _: lambda *_: SimpleNamespace(slope=1e3, curvature=1e-9, reasons=()),
        "exceeds its bound",
    ),
    "refusal": ("network_bound", lambda _: lambda *_: 1 / 0, "division by zero"),  # no other error passes for a reason
    "folding": ("fold", lambda _: fold_badly, "folding changes the output"),
}


@pytest.mark.parametrize(("attribute", "broken", "message"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_fault_is_found(script, monkeypatch, attribute, broken, message):
    monkeypatch.setattr(script, attribute, broken(getattr(script, attribute)))
    (case,) = (case for case in script.SMALL if "convmixer" in case.family)
    with pytest.raises((script.NotFulfilledError, ZeroDivisionError), match=message):
        script.examine(case)


def test_a_wrong_export_is_found(script, monkeypatch):
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda network, inputs: export(fold_badly(network), inputs))
    (case,) = (case for case in script.SMALL if "convmixer" in case.family)
    with pytest.raises(script.NotFulfilledError, match=r"torch\.export changes the output"):
        script.examine(case)
