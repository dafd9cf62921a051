"""What a file may ask for: names of networks, their arguments, classes to build."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.models.by_name import OWN, build_network
from lightning_lcnn.models.from_file import (
    ARGUMENTS,
    SETTINGS,
    Source,
    check_class_path,
    check_network,
    classifier_settings,
    users_settings,
)

SOURCE = Source("some.ckpt")


def content(**settings):
    return {"hyper_parameters": settings, "state_dict": {}}


def test_every_hyperparameter_that_the_class_writes_is_known():
    assert set(SETTINGS) == set(inspect.signature(LitClassifier).parameters) - {"penalties", "metrics"}
    lit = LitClassifier("resnet18", 3, (1, 8, 8), {"width": 2}, mean=[0.1], std=[0.2], gamma=3.0)
    assert classifier_settings(content(**lit.hparams), SOURCE) == dict(lit.hparams)


@pytest.mark.parametrize("name", OWN)
def test_our_networks_take_from_a_file_what_they_take_in_python(name):
    given = {"width": 2, "beta": 3.0, "gamma": 2.0, "in_channels": 1}
    given |= {"pooling": "smooth"} if name == "vgg11" else {}
    check_network(name, given, SOURCE)
    for key in ("num_classes", "low_curvature", "input_size", "anything"):
        with pytest.raises(ValueError, match=f"the argument '{key}', which a file may not"):
            check_network(name, {key: 1}, SOURCE)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("torchvision/densenet121", {"bn_size": 2, "drop_rate": 0.1}),
        ("torchvision/vit_b_16", {"image_size": 32, "dropout": 0.1}),
        ("timm/resnet10t", {"drop_path_rate": 0.1, "act_layer": "gelu", "global_pool": "max"}),
        ("timm/resnet10t.c3_in1k", {"stem_width": 8}),
    ],
)
def test_harmless_arguments_of_libraries_are_built(name, arguments):
    check_network(name, arguments, SOURCE)
    build_network(name, 3, arguments=arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("os.system", {"command": "touch sprung"}, "names code to import, 'os.system'"),
        ("os.system", None, "names code to import"),
        ("resnet19", {}, "names no network, 'resnet19'"),
        ("", {}, "names no network"),
        (3, {}, "names the network 3"),
        (["os.system"], {}, "names the network"),
        ("timm/hf-hub:someone/net", {}, "names the network 'timm/hf-hub"),
        ("timm/hf_hub:someone/net", {}, "names the network"),
        ("timm/local-dir:here", {}, "names the network"),
        ("timm/../net", {}, "names the network"),
        ("timm/", {}, "names the network"),
        ("os/system", {}, "names the network 'os/system'"),
        ("timm/resnet18", {"checkpoint_path": "x.pth"}, "the argument 'checkpoint_path', which a file may not"),
        ("timm/resnet18", {"pretrained": True}, "'pretrained'"),
        ("timm/resnet18", {"pretrained_cfg": {"url": "http://x"}}, "'pretrained_cfg'"),
        ("timm/resnet18", {"pretrained_cfg_overlay": {"file": "x"}}, "'pretrained_cfg_overlay'"),
        ("timm/resnet18", {"features_only": True}, "'features_only'"),
        ("timm/resnet18", {"cache_dir": "x"}, "'cache_dir'"),
        ("timm/resnet18", {"in_chans": 3}, "'in_chans'"),
        ("timm/resnet18", {"act_layer": "torch.nn.ReLU"}, "the argument act_layer = 'torch.nn.ReLU'"),
        ("timm/resnet18", {"act_layer": {"class_path": "x"}}, "the argument act_layer"),
        ("timm/resnet18", {"drop_rate": float("nan")}, "the argument drop_rate = nan"),
        ("timm/resnet18", {"depths": [[[[1]]]]}, "the argument depths"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "'weights'"),
        ("torchvision/resnet18", {"progress": True}, "'progress'"),
        ("torchvision/resnet18", {"norm_layer": "os.system"}, "'norm_layer'"),
        ("resnet18", {"width": "a/b"}, "the argument width = 'a/b'"),
    ],
)
def test_everything_else_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_network(name, arguments, SOURCE)
    assert str(caught.value).startswith("some.ckpt ")


def test_no_argument_that_reads_or_fetches_is_on_the_list():
    forbidden = {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "weights",
        "features_only",
    }
    forbidden |= {"cache_dir", "scriptable", "exportable", "progress", "num_classes", "in_chans", "hf_hub_id", "file"}
    for names in ARGUMENTS.values():
        assert not forbidden & set(names.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretrained": True}, "has the hyperparameter pretrained = True"),
        ({"weights": "/etc/passwd"}, "has the hyperparameter weights"),
        ({"beta": "10"}, "has the hyperparameter beta"),
        ({"beta": float("inf")}, "has the hyperparameter beta"),
        ({"num_classes": 1 << 60}, "has the hyperparameter num_classes"),
        ({"num_classes": True}, "has the hyperparameter num_classes"),
        ({"image_shape": (3, 32)}, "has the hyperparameter image_shape"),
        ({"image_shape": (3, 32, torch.ones(1))}, "has the hyperparameter image_shape"),
        ({"network_args": [1]}, "has the hyperparameter network_args"),
        ({"metrics": {"x": {"class_path": "os.system"}}}, "unknown hyperparameter 'metrics'"),
        ({"penalties": [{"class_path": "os.system"}]}, "unknown hyperparameter 'penalties'"),
        ({"_instantiator": "os.system"}, "names its own function to build the module with"),
        ({1: 2}, "has no table of names and values"),
    ],
)
def test_hyperparameters_that_the_class_does_not_write(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        classifier_settings({"hyper_parameters": settings}, SOURCE)


def test_what_lightning_reads_beside_the_hyperparameters():
    code = {"network": "os.system", "network_args": {"command": "true"}}
    with pytest.raises(ValueError, match="names code to import"):
        classifier_settings({"hparams": code}, SOURCE)
    with pytest.raises(ValueError, match="hyperparameters for the argument 'network_args'"):
        classifier_settings({"hyper_parameters": {}, "hparams_name": "network_args"}, SOURCE)
    with pytest.raises(ValueError, match="has no table"):
        classifier_settings({"hyper_parameters": ["network"]}, SOURCE)


def test_what_the_user_gave_may_stand_in_the_file_too():
    settings = {"network": "my_module.make_net", "network_args": {"sizes": (1, 2)}}
    given = {"network": "my_module.make_net", "network_args": {"sizes": [1, 2]}, "beta": 3.0}
    assert classifier_settings(content(**settings), SOURCE, given) == settings
    for other in ({}, {"network": "my_module.make_net"}, given | {"network_args": {"sizes": [1, 3]}}):
        with pytest.raises(ValueError, match="give it yourself with --network"):
            classifier_settings(content(**settings), SOURCE, other)


def test_settings_of_a_users_class_name_no_code():
    plain = {"hidden": 8, "path": "data/train.csv", "rates": [0.1, {"a": None}], "name": "net"}
    assert users_settings(content(**plain), SOURCE) == plain
    for value in ("torch.nn.ReLU", ["os.system"], {"class_path": "os.system", "init_args": {}}, {"a": {"b": "c.d"}}):
        with pytest.raises(ValueError, match="as hyperparameter activation"):
            users_settings(content(activation=value), SOURCE)
        assert users_settings(content(activation=value), SOURCE, {"activation": value}) == {"activation": value}
    deep: list = []
    for _ in range(50):
        deep = [deep]
    with pytest.raises(ValueError, match="a very deep value"):
        users_settings(content(activation=deep), SOURCE)


def test_a_class_is_not_imported_on_a_files_word(tmp_path, monkeypatch):
    (tmp_path / "trap_of_a_class.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("trap_of_a_class.Net", "os.system", "lightning_lcnn.models.ResNet", "", 3, ["x"]):
        with pytest.raises(ValueError, match="asks for the class"):
            check_class_path(content(_class_path=path), LitClassifier, SOURCE)
    for path in ("lightning_lcnn.LitClassifier", "lightning_lcnn.classifier.LitClassifier"):
        check_class_path(content(_class_path=path), LitClassifier, SOURCE)
    check_class_path(content(), LitClassifier, SOURCE)
    assert not (tmp_path / "sprung").exists()
