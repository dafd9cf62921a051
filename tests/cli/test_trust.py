"""Every command, given a file that means harm, is broken, or has diverged: one line, and nothing of the file's runs."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_lcnn.checkpoints import load_classifier
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli import main
from lightning_lcnn.cli.convert import lightning_checkpoint
from lightning_lcnn.report import write_report
from tests.cli.test_cli import QUIET, fails, folder, pytestmark

__all__ = ["folder", "pytestmark"]  # fixtures and filters that pytest finds here

OURS = ["--model=LitClassifier", "--data=Digits", "--trainer.accelerator=cpu", *QUIET]
TRAP = "from pathlib import Path\nPath('sprung').touch()\n\n\nclass Net:\n    pass\n"
ATTACKS = {
    "network": {"network": "os.system", "network_args": {"command": "touch sprung"}},
    "module": {"network": "trap.Net"},
    "class": {"_class_path": "trap.Net", "_instantiator": "lightning.pytorch.cli.instantiate_module"},
    "instantiator": {"_instantiator": "trap.Net"},
    "timm": {"network": "timm/resnet10t", "network_args": {"checkpoint_path": "weights.pth"}},
    "torchvision": {"network": "torchvision/resnet18", "network_args": {"weights": "DEFAULT"}},
    "metric": {"metrics": {"a": {"class_path": "trap.Net"}}},
    "penalty": {"penalties": [{"class_path": "trap.Net"}]},
    "pretrained": {"pretrained": True},
    "weights": {"weights": "weights.pth"},
}


class Trap:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def plain_checkpoint(**changes):
    """A checkpoint of tensors and plain values; ``changes`` in its hyperparameters."""
    content = lightning_checkpoint(LitClassifier("resnet18", 10, (1, 8, 8), network_args={"width": 2}))
    content["hyper_parameters"] |= changes
    return content


@pytest.fixture
def traps(folder):
    """A folder with a module whose import leaves a trace, and a pickle that does so when it is loaded."""
    Path("trap.py").write_text(TRAP)
    torch.save({"a": Trap()}, "weights.pth")
    yield folder
    sys.modules.pop("trap", None)


def one_line(capsys, arguments):
    line = fails(capsys, arguments, code=1)
    assert not Path("sprung").exists()
    return line


@pytest.mark.parametrize("attack", ATTACKS)
def test_hyperparameters_that_mean_harm(traps, capsys, attack):
    content = plain_checkpoint(**ATTACKS[attack])
    torch.save(content, "bad.ckpt")
    torch.load("bad.ckpt", weights_only=True)  # plain values: torch itself has no objection
    with pytest.raises(ValueError, match=r"bad\.ckpt "):
        LitClassifier.load_from_checkpoint("bad.ckpt")
    with open("bad.ckpt", "rb") as file, pytest.raises(ValueError, match=r"give it yourself with|damaged"):
        LitClassifier.load_from_checkpoint(file)
    by_lightning = ("class", "instantiator")  # which load_classifier never reads
    if attack not in by_lightning:
        with pytest.raises(ValueError, match=r"bad\.ckpt "):
            load_classifier("bad.ckpt")
        with pytest.raises(ValueError, match=r"bad\.ckpt "):
            write_report(["bad.ckpt"], "page.html", images=torch.rand(2, 1, 8, 8), labels=torch.tensor([0, 1]))
    assert not Path("sprung").exists()
    assert "bad.ckpt" in one_line(capsys, ["fit", *OURS, "--output=run", "--ckpt_path=bad.ckpt"])
    assert not Path("run").exists()


@pytest.mark.parametrize("attack", ["network", "class"])
@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test(traps, capsys, command, attack):
    torch.save(plain_checkpoint(**ATTACKS[attack]), "bad.ckpt")
    line = one_line(capsys, [command, *OURS, "--model.network_args.width=2", "--ckpt_path=bad.ckpt"])
    assert "bad.ckpt" in line
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6", "a": Trap()}, "bad.ckpt")
    line = one_line(capsys, [command, *OURS, "--ckpt_path=bad.ckpt"])
    assert "allow that with --weights_only false" in line


@pytest.mark.parametrize("command", [["convert", "--output=new.ckpt"], ["evaluate"], ["report", "--output=page.html"]])
def test_convert_evaluate_and_report(traps, capsys, command):
    torch.save(plain_checkpoint(**ATTACKS["network"]), "bad.ckpt")
    data = [] if command[0] == "convert" else ["--data=digits"]
    assert "names code to import, 'os.system'" in one_line(capsys, [*command, "bad.ckpt", *data])
    torch.save(plain_checkpoint(**ATTACKS["timm"]), "bad.ckpt")
    assert "'checkpoint_path', which a file may not" in one_line(capsys, [*command, "bad.ckpt", *data])
    torch.save({"state_dict": {}, "a": Trap()}, "bad.ckpt")
    assert "--trust" in one_line(capsys, [*command, "bad.ckpt", *data])
    assert {path.name for path in traps.iterdir()} == {"bad.ckpt", "trap.py", "weights.pth"}


def test_the_traps_work(traps):
    """Without the checks each of them leaves its trace."""
    sys.path.append(str(traps))
    with pytest.raises(ModuleNotFoundError, match="no_module"):
        load_classifier_trusting("no_module.Net")
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module"):
        load_classifier_trusting("trap.Net")
    assert Path("sprung").exists()
    Path("sprung").unlink()
    torch.load("weights.pth", weights_only=False)
    assert Path("sprung").exists()


def load_classifier_trusting(network):
    torch.save(plain_checkpoint(network=network, network_args={}), "trusted.ckpt")
    try:
        load_classifier("trusted.ckpt", trust=True)
    except ValueError as error:
        cause = error.__cause__
        raise (cause.__cause__ or cause) if cause is not None else error from None


USER_CODE = """
    from collections.abc import Callable
    import torch
    from lightning.pytorch import LightningModule
    from torch import nn


    class LitNet(LightningModule):
        def __init__(self, activation: Callable = torch.relu, hidden: int = 4):
            super().__init__()
            self.save_hyperparameters()
            self.activation = activation
            self.first, self.second = nn.Linear(64, hidden), nn.Linear(hidden, 10)

        def training_step(self, batch, batch_idx):
            logits = self.second(self.activation(self.first(batch[0].flatten(1))))
            return nn.functional.cross_entropy(logits, batch[1])

        def test_step(self, batch, batch_idx):
            self.log("test_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)


    def make_net(hidden=8):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
"""


@pytest.fixture
def users_module(folder):
    (folder / "my_own.py").write_text(textwrap.dedent(USER_CODE))
    yield "my_own"
    sys.modules.pop("my_own", None)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_code_that_the_user_names_too(users_module, folder, capsys):
    """A run goes on, and is tested, with its own configuration; the checkpoint alone names nothing."""
    fit = ["fit", "--model=my_own.LitNet", "--model.activation=torch.tanh", "--data=Digits", "--output=run", *QUIET]
    assert main([*fit, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.limit_train=64"]) == 0
    file = "run/checkpoints/last.ckpt"
    test = ["test", "--ckpt_path", file]
    assert main([*test, "--config=run/config.yaml", *QUIET]) == 0
    alone = [*test, "--model=my_own.LitNet", "--data=Digits", *QUIET]
    line = fails(capsys, alone)
    assert "names code to import, 'torch.tanh', as hyperparameter activation" in line
    assert "--weights_only false" in line
    assert main([*alone, "--model.activation=torch.tanh"]) == 0
    assert main([*alone, "--weights_only=false"]) == 0
    evaluate = ["evaluate", file, "--model=my_own.LitNet", "--data=digits"]
    assert "names code to import, 'torch.tanh'" in fails(capsys, evaluate)


def test_networks_of_the_users_own(users_module, folder, capsys):
    fit = ["fit", "--model=LitClassifier", "--model.network=my_own.make_net", "--model.network_args.hidden=3"]
    fit += ["--data=Digits", "--data.limit_train=64", "--output=run", "--trainer.max_epochs=1", *QUIET]
    assert main([*fit, "--trainer.accelerator=cpu"]) == 0
    file = "run/checkpoints/last.ckpt"
    assert main(["test", "--config=run/config.yaml", "--ckpt_path", file, *QUIET]) == 0
    line = fails(capsys, ["test", *OURS, "--ckpt_path", file])
    assert "names code to import, 'my_own.make_net'; give it yourself with --model.network" in line
    with pytest.raises(ValueError, match=r"give it yourself with network=\.\.\. and network_args=\.\.\."):
        LitClassifier.load_from_checkpoint(file)
    named = {"network": "my_own.make_net", "network_args": {"hidden": 3}}
    x = torch.rand(2, 1, 8, 8)
    expected = load_classifier(file, trust=True).module(x)
    assert torch.equal(LitClassifier.load_from_checkpoint(file, **named).eval()(x), expected)
    assert torch.equal(LitClassifier.load_from_checkpoint(file, weights_only=False).eval()(x), expected)


def test_a_subclass_keeps_its_own_hyperparameters(folder):
    class Mine(LitClassifier):
        def __init__(self, scale: float = 1.0, act: str = "", **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()

    options = {"network": "resnet18", "num_classes": 3, "image_shape": (1, 8, 8), "network_args": {"width": 2}}
    content = lightning_checkpoint(Mine(2.0, "relu", **options))
    torch.save(content, "mine.ckpt")
    assert Mine.load_from_checkpoint("mine.ckpt").hparams.scale == 2.0
    for changes in ({"act": "os.system"}, {"network_args": {"pretrained": True}}, {"network": "os.system"}):
        torch.save({**content, "hyper_parameters": content["hyper_parameters"] | changes}, "bad.ckpt")
        with pytest.raises(ValueError, match=r"bad\.ckpt "):
            Mine.load_from_checkpoint("bad.ckpt")


def damaged_files():
    """A checkpoint with one byte of a name changed, cut short, of another kind, with a changed size."""
    torch.save(plain_checkpoint(), "whole.ckpt")
    whole = Path("whole.ckpt").read_bytes()
    torch.save(plain_checkpoint(), "old.ckpt", _use_new_zipfile_serialization=False)
    old = Path("old.ckpt").read_bytes()
    place = whole.index(b"_rebuild_tensor_v2")
    return {
        "name": whole[: place + 3] + b"X" + whole[place + 4 :],
        "cut": whole[: len(whole) // 2],
        "cut_old": old[: len(old) // 4],
        "text": b"no checkpoint",
        "empty": b"",
    }


def test_damage_is_called_damage(folder, capsys):
    """No message advises to trust a file for which that would not help."""
    for name, content in damaged_files().items():
        Path("bad.ckpt").write_bytes(content)
        for arguments in (["evaluate", "bad.ckpt"], ["fit", *OURS, "--output=run", "--ckpt_path=bad.ckpt"]):
            line = one_line(capsys, arguments)
            assert "bad.ckpt cannot be read: it is damaged or no file of torch.save" in line, name
            assert "trust" not in line
            assert "weights_only" not in line


def test_weights_that_are_no_numbers(folder, capsys):
    content = plain_checkpoint()
    content["state_dict"]["network.layer3.1.conv2.weight"][0, 0, 1, 1] = float("nan")
    Path("run/checkpoints").mkdir(parents=True)
    torch.save(content, "run/checkpoints/last.ckpt")
    file = "run/checkpoints/last.ckpt"
    named = "holds NaN in network.layer3.1.conv2.weight"
    for arguments in (
        ["evaluate", file, "--data=digits"],
        ["convert", file, "--output=x.ckpt"],
        ["report", "run", "--data=digits", "--output=x.html"],
        ["test", *OURS, "--ckpt_path", file],
        ["fit", *OURS, "--output=run", "--ckpt_path=last"],
        ["fit", *OURS, "--output=new", f"--model.weights={file}", "--model.network_args.width=2"],
    ):
        assert named in one_line(capsys, arguments), arguments
    with pytest.raises(ValueError, match=named):
        LitClassifier.load_from_checkpoint(file)
    torch.save({"a": torch.full((1,), float("nan")).expand(1 << 40)}, "large.pt")  # 4 bytes that say they are 4 TB
    assert "large.pt holds NaN in a" in one_line(capsys, ["evaluate", "large.pt", "--network=resnet18"])


def test_files_of_a_run_folder(folder, capsys):
    Path("run/checkpoints").mkdir(parents=True)
    torch.save(plain_checkpoint(), "run/checkpoints/last.ckpt")
    config = Path("run/config.yaml")
    for content, message in {
        "data: !!python/object/apply:os.system ['touch sprung']": "config.yaml is no plain YAML: could not determine",
        "data: {class_path: [": "run/config.yaml is no plain YAML",
        "a: \x00": "run/config.yaml is no plain YAML",
        "[" * 5000: "run/config.yaml is no plain YAML",
        "- 1": "run/config.yaml names None",
        "data: {class_path: trap.Net}": "run/config.yaml names trap.Net",
        "data: {class_path: lightning_lcnn.data_of_mine.Digits}": "names lightning_lcnn.data_of_mine.Digits",
        "data: {class_path: lightning_lcnn.data.Digits, init_args: {seed: 3}}": "config.yaml does not describe Digits",
        "data: {class_path: lightning_lcnn.data.Digits, init_args: [3]}": "run/config.yaml does not describe Digits",
    }.items():
        config.write_text(content)
        assert message in one_line(capsys, ["evaluate", "run"]), content[:60]
    config.write_text("data: {class_path: lightning_lcnn.data.Digits}")
    for content in ("{", "[1]", "\xff", "[" * 100000):
        Path("run/run.json").write_text(content, encoding="latin1")
        for arguments in (["evaluate", "run"], ["report", "run", "--output=x.html"]):
            assert "run/run.json " in one_line(capsys, arguments), content[:10]
    Path("run/run.json").unlink()
    Path("run/evaluation.json").write_text("{")
    assert "run/evaluation.json is no valid JSON" in one_line(capsys, ["report", "run", "--output=x.html"])


def test_a_run_folder_does_not_say_where_to_write(folder, capsys):
    from PIL import Image

    Path("run/checkpoints").mkdir(parents=True)
    torch.save(plain_checkpoint(image_shape=(3, 8, 8)), "run/checkpoints/last.ckpt")
    data = {"class_path": "lightning_lcnn.data.TorchvisionData", "init_args": {"dataset": "MNIST", "root": "elsewhere"}}
    Path("run/config.yaml").write_text(json.dumps({"data": data}))
    content = plain_checkpoint()
    torch.save(content, "run/checkpoints/last.ckpt")
    assert "Dataset not found" in one_line(capsys, ["evaluate", "run"])
    Path("images/train/cats").mkdir(parents=True)
    Path("images/test/cats").mkdir(parents=True)
    for split in ("train", "test"):
        Image.new("RGB", (8, 8)).save(f"images/{split}/cats/0.png")
    data = {"class_path": "lightning_lcnn.data.ImageFolder", "init_args": {"folder": "images", "cache": "elsewhere"}}
    Path("run/config.yaml").write_text(json.dumps({"data": data}))
    main(["evaluate", "run", "--cache=mine"])  # ends with an error: the network takes one channel
    assert len(list(Path("mine").iterdir())) == 1
    assert not Path("elsewhere").exists()


def test_a_file_of_hyperparameters_beside_the_checkpoint(folder):
    torch.save(plain_checkpoint(), "net.ckpt")
    Path("good.yaml").write_text(
        "network: resnet18\nnum_classes: 10\nimage_shape: [1, 8, 8]\nnetwork_args: {width: 2}\n"
    )
    Path("bad.yaml").write_text("network: os.system\nnetwork_args: {command: touch sprung}\n")
    assert LitClassifier.load_from_checkpoint("net.ckpt", hparams_file="good.yaml").hparams.num_classes == 10
    with pytest.raises(ValueError, match=r"bad\.yaml names code to import"):
        LitClassifier.load_from_checkpoint("net.ckpt", hparams_file="bad.yaml")
    url = Path("net.ckpt").resolve().as_uri()
    assert LitClassifier.load_from_checkpoint(url).hparams.network == "resnet18"
    torch.save({"a": torch.ones(1)}, "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is no checkpoint of Lightning"):
        LitClassifier.load_from_checkpoint("weights.pt")


def test_tags_in_a_configuration_of_fit(folder, capsys):
    for content in ("model: !!python/object/apply:os.system ['touch sprung']", "model: {class_path: [", "a: \x00"):
        Path("bad.yaml").write_text(content)
        line = fails(capsys, ["fit", "--config=bad.yaml"], code=2)
        assert "bad.yaml" in line
        assert not Path("sprung").exists()


def test_a_file_in_the_current_folder_replaces_no_package(folder, capsys):
    for name in ("yaml", "jsonargparse", "timm", "json"):
        Path(f"{name}.py").write_text("from pathlib import Path\nPath('sprung').touch()\n")
    torch.save(plain_checkpoint(), "net.ckpt")
    few = ["--examples=2", "--attack_examples=2", "--bound=none", "--attack_radii=0.1", "--stability_radii=0.1"]
    assert main(["evaluate", "net.ckpt", "--data=digits", *few]) == 0
    assert json.loads(Path("outputs/net/evaluation.json").read_text())["measured_examples"] == 2
    assert sys.path.index(str(folder)) == len(sys.path) - 1
    assert not Path("sprung").exists()
