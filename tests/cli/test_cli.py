"""The command lightning-lcnn: run folders, resuming, conversion, evaluation, users' modules, messages of mistakes."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli import main
from lightning_lcnn.cli.arguments import presets
from lightning_lcnn.data import Digits
from lightning_lcnn.functional import normalized_curvature
from lightning_lcnn.layers.upkeep import log_betas
from tests import ROOT

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = ["--config", "digits", "--model.network_args.width=2", "--data.limit_train=128", *QUIET]
SMALL += ["--trainer.log_every_n_steps=1"]
FEW = ["--examples", "8", "--attack_examples", "20", "--attack_radii", "0.1,0.3", "--stability_radii", "0.1"]

pytestmark = [
    # Lightning's advice, where a test has few batches on purpose
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    # Lightning itself still passes `skip_none` to jsonargparse
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

USER_CODE = """
    import torch
    from lightning.pytorch import Callback, LightningModule
    from torch import nn


    class LitNet(LightningModule):
        def __init__(self, hidden: int = 8):
            super().__init__()
            self.save_hyperparameters()
            self.net = make_net(hidden)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())


    def make_net(hidden=8):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


    class Interrupt(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                raise RuntimeError("power cut")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    return tmp_path


@pytest.fixture
def users_module(folder):
    """A module of the user's in the current folder."""
    (folder / "my_module.py").write_text(textwrap.dedent(USER_CODE))
    yield "my_module"
    sys.modules.pop("my_module", None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two runs of two epochs: ``low`` and ``standard``."""
    place = tmp_path_factory.mktemp("runs")
    for name, low in (("low", "true"), ("standard", "false")):
        options = [f"--output={place / name}", "--trainer.max_epochs=2", f"--model.low_curvature={low}"]
        assert main(["fit", *SMALL, *options]) == 0
    return place


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys, arguments: list[str], code: int = 1) -> str:
    """The one line of an error; nothing but it, and no traceback."""
    assert main(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_entry_point_and_module():
    command = [sys.executable, "-m", "lightning_lcnn", "fitt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no command 'fitt'; there are fit, validate, test" in done.stderr
    assert "Traceback" not in done.stderr
    project = (ROOT / "pyproject.toml").read_text()
    assert 'lightning-lcnn = "lightning_lcnn.cli:main"' in project


@pytest.mark.parametrize("command", ["", "fit", "validate", "test", "convert", "evaluate", "report"])
def test_help_has_an_example(capsys, command):
    assert main([command, "--help"] if command else ["--help"]) == 0
    shown = capsys.readouterr().out
    assert f"\n  lightning-lcnn {command}" in shown
    assert main([]) == 0


def test_run_folder(runs):
    for name in ("low", "standard"):
        run = runs / name
        assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "history.csv", "run.json"]
        record = json.loads((run / "run.json").read_text())
        assert record["seconds"] > 0
        del record["seconds"]
        assert record == {"method": name, "seed": 0, "epochs": 2, "resumed": False}
        steps = [int(row["step"]) for row in rows(run)]
        assert steps == sorted(steps)
        assert {"epoch", "train_loss", "val_loss", "val_accuracy"} <= set(rows(run)[0])
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["model"]["init_args"]["network_args"] == {"width": 2}
    assert "lcnn/log_ratio" in rows(runs / "low")[0]
    assert "lcnn/log_ratio" not in rows(runs / "standard")[0]
    low = LitClassifier.load_from_checkpoint(runs / "low/checkpoints/last.ckpt")
    assert low.hparams.num_classes == 10
    assert tuple(low.hparams.image_shape) == (1, 8, 8)
    assert len(log_betas(low)) == 17


def test_interrupted_fit_goes_on(folder, users_module, capsys):
    fit = ["fit", *SMALL, "--output=run", "--trainer.max_epochs=2"]
    assert main([*fit, "--trainer.callbacks=my_module.Interrupt"]) == 1
    shown = capsys.readouterr().err
    assert shown.rstrip().endswith("RuntimeError: power cut")
    assert 'raise RuntimeError("power cut")' in shown  # the user's line
    before = rows(folder / "run")
    assert not (folder / "run/run.json").exists()
    assert "run holds a run already: continue it with --ckpt_path last" in fails(capsys, fit)
    assert main([*fit, "--ckpt_path=last"]) == 0
    record = json.loads((folder / "run/run.json").read_text())
    assert (record["epochs"], record["resumed"]) == (2, True)
    after = rows(folder / "run")
    assert [row["step"] for row in after[: len(before)]] == [row["step"] for row in before]
    steps = [int(row["step"]) for row in after if row["train_loss"]]
    assert steps == list(range(4))  # two batches of 64 in each of two epochs
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert [p.name for p in (folder / "run/checkpoints").iterdir()] == ["last.ckpt"]
    assert "ckpt_path: null" in (folder / "run/config.yaml").read_text()  # it repeats the run elsewhere
    longer = [*fit[:-1], "--trainer.max_epochs=3", "--ckpt_path=last"]
    assert "learning rate ends after 4 steps" in fails(capsys, longer)


def test_going_on_needs_a_run(folder, capsys):
    line = fails(capsys, ["fit", *SMALL, "--output=new", "--ckpt_path=last"])
    assert "there is no run to continue in new: new/checkpoints/last.ckpt does not exist" in line


def test_validate_and_test_agree_with_the_checkpoint(runs, capsys):
    data = Digits()
    data.setup()
    network = LitClassifier.load_from_checkpoint(runs / "low/checkpoints/last.ckpt").eval()
    for command, held_out in (("validate", data.validation_set), ("test", data.test_set)):
        images, labels = held_out.tensors
        accuracy = (network(images.float() / 255).argmax(1) == labels).float().mean().item()
        options = ["--config", str(runs / "low/config.yaml"), "--ckpt_path", str(runs / "low/checkpoints/last.ckpt")]
        assert main([command, *options, *QUIET]) == 0
        assert str(accuracy)[:7] in capsys.readouterr().out


def test_evaluate_a_run_folder(runs, capsys):
    run = runs / "standard"
    assert main(["evaluate", str(run), *FEW, "--json"]) == 0
    printed = capsys.readouterr()
    record = json.loads((run / "evaluation.json").read_text())
    assert json.loads(printed.out) == record
    assert record["name"] == "standard"
    assert record["stand_in_beta"] == 1000
    assert (record["examples"], record["measured_examples"], record["attacked_examples"]) == (359, 8, 20)
    assert list(record["adversarial_accuracy"]) == ["0.1", "0.3"]
    assert "attack: 20 images" in printed.err
    assert json.loads((run / "run.json").read_text())["epochs"] == 2
    assert not list(run.glob("*.partial"))
    (run / "evaluation.json").unlink()


def test_evaluate_a_checkpoint_elsewhere(runs, folder, capsys):
    file = runs / "low/checkpoints/last.ckpt"
    assert main(["evaluate", str(file), "--data=digits", *FEW, "--output=out", "--name=mine", "--bound=none"]) == 0
    shown = capsys.readouterr().out
    record = json.loads((folder / "out/evaluation.json").read_text())
    about = json.loads((folder / "out/run.json").read_text())
    assert (record["name"], about["method"], about["checkpoint"]) == ("mine", "mine", str(file))
    assert record["certified"]["reason"] == "not asked for"
    data = Digits()
    data.setup("test")
    rows = torch.randperm(359, generator=torch.Generator().manual_seed(0))[:8]
    network = LitClassifier.load_from_checkpoint(file).eval()
    images, labels = (tensor[rows] for tensor in data.test_set.tensors)
    expected = normalized_curvature(network, images.float() / 255, labels).values.mean().item()
    assert record["curvature"]["margin"] == pytest.approx(expected, rel=1e-4)  # float32, other batches
    assert re.search(rf"curvature of the margin +{expected:.2f}"[:-1], shown)
    assert main(["evaluate", "out", "--data=digits", *FEW, "--bound=none"]) == 0  # by way of run.json
    assert json.loads((folder / "out/evaluation.json").read_text()) == record


def test_report(runs, folder, capsys):
    records = [runs / name / "evaluation.json" for name in ("standard", "low")]
    line = fails(capsys, ["report", str(runs / "low/history.csv"), "--output=none.html"])
    assert "history.csv" in line
    assert not (folder / "none.html").exists()
    for record in records:
        assert main(["evaluate", str(record.parent), *FEW, "--bound=none"]) == 0
    sources = [str(record.parent) for record in records]
    assert main(["report", *sources, "--output=plain.html"]) == 0  # the data are those of the runs
    page = (folder / "plain.html").read_text()
    assert "standard" in page
    assert "Input gradients" in page
    Path("users").mkdir()
    Path("users/config.yaml").write_text("data:\n  class_path: my_module.Data\n")
    Path("users/evaluation.json").write_text(records[0].read_text())
    assert main(["report", "users", "--output=users.html", "--title=Mine"]) == 0
    assert "no pictures of input gradients: say on which images" in capsys.readouterr().err
    assert "Mine" in (folder / "users.html").read_text()
    for record in records:
        record.unlink()


def test_convert_keeps_the_function(runs, folder, capsys):
    assert main(["convert", str(runs / "standard"), "--output=new/smooth.ckpt", "--beta=1e4"]) == 0
    shown = capsys.readouterr().out
    assert "CenteredSoftplus" in shown
    assert "0 of them with kinks" in shown
    standard = LitClassifier.load_from_checkpoint(runs / "standard/checkpoints/last.ckpt").eval()
    smooth = LitClassifier.load_from_checkpoint("new/smooth.ckpt").eval()
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(smooth(images), standard(images), atol=1e-3, rtol=1e-3)
    assert len(log_betas(smooth)) == 17
    assert [p.name for p in (folder / "new").iterdir()] == ["smooth.ckpt"]
    options = ["--model.weights=new/smooth.ckpt", "--output=tuned", "--trainer.max_epochs=1"]
    assert main(["fit", *SMALL, *options]) == 0
    assert "is low-curvature already" in fails(capsys, ["convert", "new/smooth.ckpt", "--output=again.ckpt"])
    assert not (folder / "again.ckpt").exists()


def test_weights_alone_need_their_network(runs, folder, capsys):
    content = torch.load(runs / "standard/checkpoints/last.ckpt", weights_only=True)
    torch.save(content["state_dict"], "weights.pt")
    evaluate = ["evaluate", "weights.pt", "--data=digits", *FEW]
    assert "holds weights and no network; name it with --network" in fails(capsys, evaluate)
    shape = ["--image_shape", "1", "8", "8", "--mean=0.5", "--std=0.25", "--bound=none"]
    wide = [*evaluate, "--network=resnet18", *shape]
    assert "do not fit the standard network ResNet: another shape of conv1.weight" in fails(capsys, wide)
    assert main([*wide, '--network_args={"width": 2}']) == 0
    record = json.loads((folder / "outputs/weights/evaluation.json").read_text())
    images = Digits()
    images.setup("test")
    lit = LitClassifier.load_from_checkpoint(runs / "standard/checkpoints/last.ckpt").eval()
    x, y = images.test_set.tensors
    assert record["accuracy"] == pytest.approx((lit(x.float() / 255).argmax(1) == y).float().mean().item())
    named = ["--network=resnet18", '--network_args={"width": 2}', *shape[:6]]
    assert main(["convert", "weights.pt", "--output=low.ckpt", *named]) == 0
    assert main(["evaluate", "low.ckpt", "--data=digits", *FEW, "--bound=none"]) == 0


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_users_module_is_trained_measured_and_converted(folder, users_module, runs, capsys):
    fit = ["fit", "--model=my_module.LitNet", "--data=Digits", "--output=run", *QUIET, "--trainer.max_epochs=1"]
    assert main([*fit, "--model.hidden=5", "--trainer.accelerator=cpu"]) == 0
    file = "run/checkpoints/last.ckpt"
    assert "lightning-lcnn evaluate run --model my_module.LitNet" in capsys.readouterr().err
    ours, config = str(runs / "low/checkpoints/last.ckpt"), str(runs / "low/config.yaml")
    line = fails(capsys, ["test", "--config", config, "--ckpt_path", file, *QUIET])
    assert "is a checkpoint of my_module.LitNet, and the model is lightning_lcnn." in line
    line = fails(capsys, ["evaluate", ours, "--model=my_module.LitNet", "--data=digits"])
    assert "is a checkpoint of LitClassifier and not of my_module.LitNet; leave out --model" in line
    named = "is a checkpoint of another LightningModule, my_module.LitNet; name its class with --model"
    assert named in fails(capsys, ["evaluate", file, "--data=digits"])
    assert main(["evaluate", file, "--data=digits", "--model=my_module.LitNet", *FEW, "--output=out"]) == 0
    assert json.loads((folder / "out/evaluation.json").read_text())["stand_in_beta"] == 1000
    shape = ["--image_shape", "1", "8", "8"]
    assert main(["convert", file, "--model=my_module.LitNet", "--output=low.pt", *shape]) == 0
    assert "with --trust" in fails(capsys, ["evaluate", "low.pt", "--data=digits"])
    assert main(["evaluate", "low.pt", "--data=digits", "--trust", *FEW, "--output=low"]) == 0
    assert json.loads((folder / "low/evaluation.json").read_text())["stand_in_beta"] is None
    line = fails(capsys, ["evaluate", file, "--data=digits", "--model=my_module.Interrupt"])
    assert "must name a LightningModule, got my_module.Interrupt" in line
    assert "'my_module.Nothing' cannot be imported" in fails(capsys, ["evaluate", file, "--model=my_module.Nothing"])


def test_users_network_by_import_path(folder, users_module, capsys):
    options = ["--model=LitClassifier", "--model.network=my_module.make_net", "--data=Digits", "--output=run", *QUIET]
    assert main(["fit", *options, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]) == 0
    line = fails(capsys, ["evaluate", "run", *FEW])
    assert "names code to import, 'my_module.make_net'" in line
    assert "--trust" in line
    assert main(["evaluate", "run", *FEW, "--trust"]) == 0


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_runs_without_trust(folder, capsys):
    torch.save({"state_dict": {"a": torch.ones(1)}, "trap": Trap(folder / "sprung")}, "bad.ckpt")
    for command in (["evaluate", "bad.ckpt"], ["convert", "bad.ckpt", "--output=x.ckpt"]):
        assert "Loading it runs code from the file" in fails(capsys, command)
    fit = ["fit", *SMALL, "--output=run"]
    assert "lightning-lcnn convert FILE --trust" in fails(capsys, [*fit, "--model.weights=bad.ckpt"])
    assert "--weights_only false" in fails(capsys, [*fit, "--ckpt_path=bad.ckpt"])
    assert not (folder / "sprung").exists()
    assert not (folder / "x.ckpt").exists()
    torch.load("bad.ckpt", weights_only=False)
    assert (folder / "sprung").exists()  # the trap works


def test_wrong_class_of_checkpoint(folder, users_module, runs, capsys):
    from lightning.pytorch import Trainer

    sys.path.insert(0, str(folder))
    from my_module import LitNet

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(LitNet())
    trainer.save_checkpoint("net.ckpt")
    content = torch.load("net.ckpt", weights_only=True)
    content["state_dict"]["net.3.weight"] = torch.ones(3, 3)
    torch.save(content, "other.ckpt")
    line = fails(capsys, ["evaluate", "other.ckpt", "--model=my_module.LitNet", "--data=digits"])
    assert "other.ckpt is no checkpoint of my_module.LitNet" in line


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["fit", "--model=LitClasifier"], 2, "names no LightningModule: did you mean LitClassifier"),
        (["fit", "--model=no_module.Net"], 2, "--model no_module.Net names no LightningModule"),
        (["fit", "--model=LitClassifier", "--data=Digit"], 2, "names no LightningDataModule: did you mean Digits?"),
        (["fit", "--config=nowhere.yaml"], 2, "nowhere.yaml"),
        (["fit", "--model=LitClassifier", "--data=Digits", "--modl=3"], 2, "modl"),
        (["fit", *SMALL, "--model.network=resnt18"], 1, "did you mean resnet18"),
        (["fit", *SMALL, "--model.network=torchvision/resnet19"], 1, "did you mean torchvision/resnet1"),
        (["fit", *SMALL, "--model.network=no_module.net"], 1, "'no_module.net' cannot be imported"),
        (["fit", *SMALL, "--model.num_classes=5"], 1, "`model.num_classes` is 5 and that of the data 10"),
        (["fit", *SMALL, "--output=/dev/null/run"], 1, "cannot write to /dev/null/run"),
        (["fit", *SMALL, "--model.weights=nowhere.ckpt"], 1, "there is no file nowhere.ckpt"),
        (["fit", "--model=LitClassifier", "--data=ImageFolder", "--data.folder=no"], 1, "no/train does not exist"),
        (["evaluate"], 2, "the following arguments are required: SOURCE"),
        (["evaluate", "nowhere.ckpt"], 1, "there is no file nowhere.ckpt"),
        (["evaluate", "nothing"], 1, "nothing holds no network: expected network.pt or checkpoints/last.ckpt"),
        (["evaluate", "torchvision/resnet81"], 1, "did you mean torchvision/resnet18"),
        (["evaluate", "nowhere.ckpt", "--output=/dev/null/out"], 1, "cannot write to /dev/null/out"),
        (["evaluate", "damaged.ckpt"], 1, "damaged.ckpt cannot be read: it is damaged or no file of torch.save"),
        (["evaluate", "empty.ckpt"], 1, "empty.ckpt cannot be read"),
        (["evaluate", "a", "--examples=0"], 2, "argument --examples: must be at least 1, got 0"),
        (["evaluate", "a", "--attack_radii=-1"], 2, "argument --attack_radii: must be positive numbers, got -1"),
        (["fit", "--config=misspelt.yaml"], 2, "'low_curvatur' is not accepted: did you mean low_curvature?"),
        (["fit", "--model.network=resnet18", *SMALL], 2, "name its class first, such as --model LitClassifier"),
        (["report", "nothing"], 1, "nothing holds no evaluation.json, and nothing to measure"),
        (["convert", "resnet18", "--output=new.ckpt"], 1, "no file resnet18. Did you mean torchvision/resnet18"),
        (["convert", "resnet81", "--output=new.ckpt"], 1, "no file resnet81. Did you mean torchvision/resnet18"),
        (["convert", "nowhere.ckpt"], 2, "the following arguments are required: --output"),
        (["convert", "nowhere.ckpt", "--output=new.ckpt"], 1, "there is no file nowhere.ckpt"),
        (["convert", "damaged.ckpt", "--output=damaged.ckpt"], 1, "is SOURCE itself; choose another file"),
        (["convert", "damaged.ckpt", "--output=."], 1, "--output . is a folder"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else "",
)
def test_mistakes(folder, capsys, arguments, code, message):
    (folder / "damaged.ckpt").write_bytes(b"no checkpoint")
    (folder / "empty.ckpt").touch()
    (folder / "nothing").mkdir()
    model = {"class_path": "LitClassifier", "init_args": {"low_curvatur": True}}
    (folder / "misspelt.yaml").write_text(json.dumps({"model": model, "data": "Digits"}))
    assert message in fails(capsys, arguments, code)
    assert sorted(p.name for p in folder.iterdir()) == ["damaged.ckpt", "empty.ckpt", "misspelt.yaml", "nothing"]


def test_images_that_cannot_be_used(folder, capsys):
    from PIL import Image

    for name in ("cats", "dogs"):
        Path("train", name).mkdir(parents=True)
        Image.effect_noise((64, 64), 50).save(f"train/{name}/0.png")
    fit = [
        "fit",
        "--model=LitClassifier",
        "--model.network_args.width=2",
        "--data=ImageFolder",
        "--data.folder=.",
        *QUIET,
    ]
    Path("test/cats").mkdir(parents=True)
    Image.effect_noise((64, 64), 50).save("test/cats/0.png")
    assert "test/dogs holds no images" in fails(capsys, fit)
    broken = Path("train/dogs/0.png")
    broken.write_bytes(broken.read_bytes()[:500])
    assert "train/dogs/0.png cannot be decoded as an image" in fails(capsys, fit)
    assert not list(folder.glob("outputs/**/*.ckpt"))


def test_data_of_evaluate(runs, folder, capsys):
    file = str(runs / "low/checkpoints/last.ckpt")
    assert "say on which images with --data" in fails(capsys, ["evaluate", file])
    assert "Did you mean digits?" in fails(capsys, ["evaluate", file, "--data=digitz"])
    line = fails(capsys, ["evaluate", file, "--data=MNIST", "--root=/dev/null/mnist"])
    assert "/dev/null/mnist" in line
    Path("config.yaml").write_text("data:\n  class_path: os.system\n  init_args:\n    command: touch sprung\n")
    Path("last.ckpt").write_bytes(Path(file).read_bytes())
    assert "config.yaml names os.system" in fails(capsys, ["evaluate", "."])
    assert not Path("sprung").exists()


def test_missing_extras_are_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert "pip install 'lightning-lcnn[cli]'" in fails(capsys, ["fit", *SMALL])
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'lightning-lcnn[timm]'" in fails(capsys, ["evaluate", "timm/resnet18", "--data=digits"])
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    torch.save(nn.Flatten(), "flat.pt")
    line = fails(capsys, ["evaluate", "flat.pt", "--trust", "--data=digits"])
    assert "pip install 'lightning-lcnn[data]'" in line


def test_debug_shows_the_traceback(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        main(["evaluate", "nowhere.ckpt", "--debug"])
    monkeypatch.setenv("LCNN_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        main(["evaluate", "nowhere.ckpt"])


@pytest.mark.parametrize("preset", presets())
def test_presets_run(preset, folder, runs, monkeypatch):
    """One batch of every preset, on a network of width 2 and a few generated images."""
    from PIL import Image

    options = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", *QUIET, "--model.network_args.width=2"]
    if preset == "torchvision_data":
        import torchvision

        class Few(torchvision.datasets.FakeData):
            def __init__(self, root, train, download):
                super().__init__(20, (1, 28, 28))

        monkeypatch.setattr(torchvision.datasets, "FashionMNIST", Few)
    elif preset != "digits":
        for split in ("train", "test"):
            for name in ("cats", "dogs"):
                (folder / split / name).mkdir(parents=True)
                for i in range(5):
                    Image.new("RGB", (32, 32), (40 * i, 100, 20)).save(folder / split / name / f"{i}.png")
        options += ["--data.folder=."]
    if preset == "fine_tuning":
        lit = LitClassifier(num_classes=2, network_args={"width": 2})
        torch.save(lit.state_dict(), "weights.pt")
        options += ["--model.weights=weights.pt"]
    assert main(["fit", "--config", preset, *options]) == 0
    assert not (folder / "outputs/run").exists()
