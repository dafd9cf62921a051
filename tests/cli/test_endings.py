"""How commands begin and end: help at once, exit codes, tracebacks of the user's code, runs that start again."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_lcnn import to_low_curvature
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli import evaluate, main, report
from lightning_lcnn.cli.arguments import COMMANDS, PRESETS, presets
from lightning_lcnn.models.by_name import build_network
from tests import ROOT
from tests.cli.test_cli import FEW, SMALL, fails, folder, pytestmark, rows, runs

__all__ = ["folder", "pytestmark", "runs"]  # fixtures and filters that pytest finds here

USER_CODE = """
    import os
    import signal

    import torch
    from lightning.pytorch import Callback, LightningModule
    from torch import nn


    class Ends(Callback):
        def __init__(self, how: str, at_step: int = 0):
            self.how, self.at_step = how, at_step

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step != self.at_step:
                return
            if self.how == "raise":
                raise ValueError("a message of the user's")
            os.kill(os.getpid(), getattr(signal, self.how))


    class LitNet(LightningModule):
        def __init__(self, hidden: int = 8):
            super().__init__()
            if hidden < 1:
                raise ValueError("hidden must be positive")
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 9))

        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - torch.ones(3)).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())
"""


@pytest.fixture
def users_module(folder):
    (folder / "my_ends.py").write_text(textwrap.dedent(USER_CODE))
    yield "my_ends"
    sys.modules.pop("my_ends", None)


def ends(how, step=0):
    return ["--trainer.callbacks=my_ends.Ends", f"--trainer.callbacks.how={how}", f"--trainer.callbacks.at_step={step}"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_at_once(command):
    """User and system time of the whole process, without torch: 0.05 s where importing it takes 3 s and more."""
    program = (
        "import sys; from lightning_lcnn.cli import main; code = main(); print('torch' in sys.modules); sys.exit(code)"
    )
    arguments = [command, "--help"] if command else ["--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "False"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_all_of_lightnings_options(capsys):
    assert main(["fit", "--help_all"]) == 0
    shown = capsys.readouterr().out
    assert "--trainer.accumulate_grad_batches" in shown
    assert "--trainer.max_epochs" in shown


def test_the_package_gives_its_names_when_asked():
    program = """
        import sys, lightning_lcnn
        assert "torch" not in sys.modules
        assert set(lightning_lcnn.__all__) <= set(dir(lightning_lcnn))
        for name in lightning_lcnn.__all__:
            getattr(lightning_lcnn, name)
        from lightning_lcnn import *
        assert LitClassifier.__name__ == "LitClassifier" and lightning_lcnn.callbacks.PowerIteration is PowerIteration
        try:
            lightning_lcnn.nothing
        except AttributeError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "module 'lightning_lcnn' has no attribute 'nothing'\n"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_exit_codes_of_signals(users_module, folder, name, code):
    """In training, where Lightning takes the signal; the run has no checkpoint and starts again."""
    command = [sys.executable, "-m", "lightning_lcnn", "fit", *SMALL, "--output=run", "--trainer.max_epochs=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *ends(name)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    assert Path("run/config.yaml").exists()
    assert not Path("run/run.json").exists()
    if name == "SIGINT":
        assert "lightning-lcnn fit: interrupted." in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_outside_of_training(folder, monkeypatch, capsys, number, code):
    """Half-written files go."""

    def killed(options):
        with report.write_report.__globals__["written_whole"](Path("page.html")) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), number)

    monkeypatch.setattr(report, "run", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["report", "run"]) == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(folder.iterdir()) == []


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(users_module, folder, capsys):
    fit = ["fit", *SMALL, "--output=run", "--trainer.max_epochs=1"]
    assert main([*fit, *ends("raise", 1)]) == 1
    assert "ValueError: a message of the user's" in capsys.readouterr().err
    assert Path("run/config.yaml").exists()
    Path("run/history.csv").write_text("step,train_loss,mark\n0,9.0,old\n")
    line = fails(capsys, [*fit, "--ckpt_path=last"])
    assert "it stopped before its first checkpoint, so start it again without --ckpt_path" in line
    assert main(fit) == 0
    assert "mark" not in rows(folder / "run")[0]
    assert "my_ends" not in Path("run/config.yaml").read_text()
    assert "continue it with --ckpt_path last, or choose another --output" in fails(capsys, fit)
    Path("run/checkpoints/last.ckpt").rename("run/checkpoints/other.ckpt")
    assert fails(capsys, fit).endswith("run holds a run already: choose another --output.")
    Path("run/checkpoints/other.ckpt").unlink()
    assert fails(capsys, fit).endswith("run holds a run already: choose another --output.")  # it is done: run.json


def test_the_users_code_keeps_its_traceback(users_module, folder, capsys):
    fit = ["fit", "--model=my_ends.LitNet", "--data=Digits", "--output=run", "--trainer.accelerator=cpu"]
    fit += ["--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1"]
    assert main(fit) == 1
    shown = capsys.readouterr().err
    assert "return (self.net(batch[0]) - torch.ones(3)).sum()" in shown
    assert shown.rstrip().splitlines()[-1].startswith("RuntimeError: The size of tensor a (9)")
    assert main([*fit, "--model.hidden=-1"]) == 1
    shown = capsys.readouterr().err
    assert 'raise ValueError("hidden must be positive")' in shown
    assert shown.rstrip().endswith("ValueError: hidden must be positive")  # and not what jsonargparse says about it


def test_what_is_no_argument_keeps_its_traceback(folder, capsys, monkeypatch):
    """An error of torch's in training, or one that nobody expects: where it comes from is what matters."""
    monkeypatch.setattr(LitClassifier, "training_step", lambda self, batch, i: torch.ones(2) @ torch.ones(3))
    assert main(["fit", *SMALL, "--output=run", "--trainer.max_epochs=1"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "run", lambda options: {}["missing"])
    assert main(["evaluate", "run"]) == 1
    assert "KeyError: 'missing'" in capsys.readouterr().err


def test_a_checkpoint_of_another_size_is_one_line(runs, folder, capsys):
    file = str(runs / "low/checkpoints/last.ckpt")
    content = torch.load(file, weights_only=True)
    content["state_dict"]["network.fc.bias"] = torch.zeros(3)
    torch.save(content, "other.ckpt")
    line = fails(capsys, ["test", "--config", str(runs / "low/config.yaml"), "--ckpt_path=other.ckpt"])
    assert "Error(s) in loading state_dict for LitClassifier" in line


def test_converted_networks_are_validated_and_tested(runs, folder, capsys):
    """With the configuration of the standard network: the checkpoint says what it is now."""
    assert main(["convert", str(runs / "standard"), "--output=smooth.ckpt", "--beta=30"]) == 0
    assert main(["evaluate", "smooth.ckpt", "--data=digits", *FEW, "--bound=none", "--output=out"]) == 0
    capsys.readouterr()
    accuracy = {}
    for command in ("validate", "test"):
        for options in (["--config", str(runs / "standard/config.yaml")], ["--model=LitClassifier", "--data=Digits"]):
            assert main([command, *options, "--ckpt_path=smooth.ckpt", "--trainer.accelerator=cpu"]) == 0
            accuracy.setdefault(command, []).append(capsys.readouterr().out.split("accuracy")[1].split()[1])
    assert accuracy["test"][0] == accuracy["test"][1]
    assert accuracy["validate"][0] == accuracy["validate"][1]
    recorded = torch.load("smooth.ckpt", weights_only=True)["hyper_parameters"]
    assert (recorded["low_curvature"], recorded["beta"]) == (True, 30.0)


def test_presets_have_names(folder, capsys):
    assert {"digits", "cifar10_standard", "cifar10_low_curvature", "fine_tuning", "torchvision_data"} == set(presets())
    assert "did you mean digits?" in fails(capsys, ["fit", "--config=digit"], 2)
    assert "presets are cifar10_low_curvature" in fails(capsys, ["fit", "--config", "nothing_like_it"], 2)
    assert main(["fit", "--config=digits", "--print_config"]) == 0
    assert "width: 8" in capsys.readouterr().out
    Path("digits").write_text((PRESETS / "digits.yaml").read_text().replace("width: 8", "width: 5"))
    assert main(["fit", "-c", "digits", "--print_config"]) == 0  # a file of the user's goes first
    assert "width: 5" in capsys.readouterr().out
    assert '"cli/presets/*.yaml"' in (ROOT / "pyproject.toml").read_text()


def test_one_default_of_each_kind():
    """The same in Python and on the command line."""
    from inspect import signature

    from lightning_lcnn.cli.arguments import parser_of
    from lightning_lcnn.models import resnet18, resnet34, vgg11
    from lightning_lcnn.report import write_report

    options = parser_of("convert").parse_args(["a", "--output=b"])
    for name, value in (("max_pool", "smooth"), ("beta", 10.0), ("gamma", None)):
        assert {signature(function).parameters[name].default for function in (build_network, LitClassifier)} == {value}
        assert getattr(options, name) == value
    assert signature(to_low_curvature).parameters["beta"].default == 10.0
    assert signature(to_low_curvature).parameters["gamma"].default is None
    assert {signature(network).parameters["beta"].default for network in (resnet18, resnet34, vgg11)} == {10.0}
    devices = {parser_of(command).parse_args(["a"]).device for command in ("evaluate", "report")}
    assert devices | {signature(write_report).parameters["device"].default} == {"auto"}


def test_devices(folder, capsys):
    line = fails(capsys, ["evaluate", "nowhere.ckpt", "--device=nodevice"])
    assert "there is no device 'nodevice' here" in line
