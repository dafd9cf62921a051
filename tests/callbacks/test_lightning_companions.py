"""Our callbacks beside Lightning's own: checkpoints, early stopping, progress bars, summary, dry run, profilers."""

from __future__ import annotations

import copy
import functools
import importlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lcnn.bounds import network_bound
from lightning_lcnn.callbacks import AdversarialTraining, CurvatureMonitor, PenaltyCallback, PowerIteration
from lightning_lcnn.layers import lcnn_parameter_groups
from lightning_lcnn.mixin import LCNNMixin
from tests.lightning_helpers import FILTERS, PACKAGES, examples, loader, plain_classifier, trainer

pytestmark = FILTERS


def low(package: str = "lightning.pytorch", mixin: bool = True) -> Any:
    class Low(*((LCNNMixin,) if mixin else ()), plain_classifier(package)):  # type: ignore[misc]
        """With validation, and an example of its input for the summary."""

        example_input_array = examples(2)[0]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(lcnn_parameter_groups(self), lr=0.01)

    return Low()


def ours(mixin: bool = True) -> list[Any]:
    rest = [] if mixin else [PenaltyCallback()]
    return [AdversarialTraining(0.1, bounds=None), PowerIteration(every_n_steps=2), CurvatureMonitor(), *rest]


# --- checkpoints and early stopping


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("monitor_first", [True, False])
@pytest.mark.parametrize("validate", [True, False])
def test_checkpoints_keep_the_epoch_of_least_curvature(
    package: str, monitor_first: bool, validate: bool, tmp_path: Path
) -> None:
    """The order of the callbacks does not matter."""
    library = importlib.import_module(f"{package}.callbacks")
    best = library.ModelCheckpoint(tmp_path, monitor="lcnn/log_ratio", save_top_k=-1, filename="{epoch}")
    stop = library.EarlyStopping("lcnn/log_ratio", patience=1, min_delta=1e9)
    callbacks = [CurvatureMonitor(), best, stop]
    module = low(package)
    runner = trainer(
        package,
        callbacks=callbacks if monitor_first else callbacks[::-1],
        enable_checkpointing=True,
        max_epochs=5,
        limit_val_batches=1.0 if validate else 0,
    )
    runner.fit(module, loader(8), loader(4))
    assert runner.current_epoch == 2  # nothing falls by 1e9
    scores = {Path(path).name: float(score) for path, score in best.best_k_models.items()}
    assert scores.keys() == {"epoch=0.ckpt", "epoch=1.ckpt"}
    assert Path(best.best_model_path).name == min(scores, key=scores.__getitem__)
    # the score belongs to the weights that were saved with it
    twin = low(package)
    twin.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    ratio = CurvatureMonitor()._surrogate(twin).log_ratio.item()  # type: ignore[union-attr]
    assert scores[Path(best.best_model_path).name] == pytest.approx(ratio, rel=1e-5)


def test_checkpoints_of_steps_follow_the_penalty(tmp_path: Path) -> None:
    """Totals come at the end of an epoch; the penalty's value is there at each logging step."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(tmp_path, monitor="lcnn/curvature", every_n_train_steps=2, save_top_k=-1)
    trainer(callbacks=[best], enable_checkpointing=True).fit(low(), loader(16))
    assert len(best.best_k_models) == 2
    assert best.best_model_score is not None


# --- progress, summary, dry run


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("mixin", [True, False])
def test_rich_progress_bar_and_summary(
    package: str, mixin: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    library = importlib.import_module(f"{package}.callbacks")
    callbacks = [*ours(mixin), library.RichProgressBar(), library.RichModelSummary(max_depth=2)]
    trainer(package, callbacks=callbacks, enable_progress_bar=True, enable_model_summary=True).fit(
        low(package, mixin), loader(8), loader(4)
    )
    shown = capsys.readouterr().out
    assert "SpectralConv2d" in shown
    assert "Epoch 0" in shown


@pytest.mark.parametrize("package", PACKAGES)
def test_model_summary_counts_our_layers_and_changes_nothing(package: str) -> None:
    summary = importlib.import_module(f"{package}.utilities.model_summary").ModelSummary
    module = low(package)
    before = copy.deepcopy(module.state_dict())
    found = summary(module, max_depth=-1)
    rows = dict(
        zip(found.layer_names, zip(found.layer_types, found.in_sizes, found.out_sizes, strict=True), strict=True)
    )
    assert rows["net.0"] == ("SpectralConv2d", [2, 1, 6, 6], [2, 4, 6, 6])
    assert rows["net.1"] == ("LipschitzBatchNorm2d", [2, 4, 6, 6], [2, 4, 6, 6])
    assert rows["net.2"] == ("CenteredSoftplus", [2, 4, 6, 6], [2, 4, 6, 6])
    assert found.total_parameters == sum(parameter.numel() for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("mixin", [True, False])
def test_fast_dev_run(package: str, mixin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With loggers and checkpoints switched on, as users have them: Lightning replaces them for the dry run."""
    monkeypatch.chdir(tmp_path)
    certified = CurvatureMonitor(certified=True)
    callbacks = [certified if isinstance(callback, CurvatureMonitor) else callback for callback in ours(mixin)]
    runner = trainer(package, fast_dev_run=True, callbacks=callbacks, logger=True, enable_checkpointing=True)
    runner.fit(low(package, mixin), loader(8), loader(4))
    assert runner.global_step == 1
    assert "lcnn/certified_curvature" in runner.callback_metrics
    assert not list(tmp_path.iterdir())


# --- profilers

PHASES = {f"[lightning_lcnn]{name}" for name in ("attack", "certified_bound", "monitor", "penalty", "power_iteration")}


def profiled(package: str, profiler: Any, mixin: bool) -> Any:
    callbacks = [*ours(mixin)[:2], CurvatureMonitor(certified=True), *ours(mixin)[3:]]
    logger = importlib.import_module(f"{package}.loggers.logger").DummyLogger()
    runner = trainer(package, profiler=profiler, callbacks=callbacks, logger=logger, num_sanity_val_steps=0)
    runner.fit(low(package, mixin), loader(24), loader(4))
    return runner.profiler


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("mixin", [True, False])
def test_simple_profiler_times_each_phase(package: str, mixin: bool) -> None:
    times = profiled(package, "simple", mixin).recorded_durations
    assert times.keys() >= PHASES
    counts = {name: len(times[f"[lightning_lcnn]{name}"]) for name in ("attack", "monitor", "penalty")}
    assert counts == {"attack": 6, "monitor": 6, "penalty": 6}
    assert len(times["[lightning_lcnn]power_iteration"]) == 3  # at the start, and at steps 2 and 4
    step = sum(times["run_training_batch"])
    assert 0 < sum(times["[lightning_lcnn]penalty"]) < step


def test_torch_profilers_show_each_phase(tmp_path: Path) -> None:
    """Lightning's, and one of the user's around the fit."""
    from lightning.pytorch.profilers import PyTorchProfiler

    # all rows: by default the report has the 20 that took longest, which are others on a busy machine
    options = {"export_to_chrome": False, "schedule": None, "row_limit": -1}
    lightning_own = PyTorchProfiler(dirpath=tmp_path, filename="profile", **options)
    trainer(profiler=lightning_own, callbacks=ours(), limit_train_batches=1).fit(low(), loader(4))
    (report,) = tmp_path.glob("*.txt")
    phases = {phase for phase in PHASES if "certified" not in phase}
    assert all(phase in report.read_text() for phase in phases)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer(callbacks=ours(), limit_train_batches=1).fit(low(), loader(4))
    assert {event.key for event in profile.key_averages()} >= phases


def test_certified_bounds_pass_over_hooks_that_cannot_be_copied() -> None:
    """Lightning's PyTorchProfiler hangs such hooks into every module."""
    module = low().eval()
    bound = network_bound(module.net, examples(1)[0])
    for layer in module.modules():
        layer.register_forward_hook(functools.partial(lambda lock, *_: None, threading.Lock()))
        layer.register_forward_pre_hook(functools.partial(lambda lock, *_: None, threading.Lock()))
    assert network_bound(module.net, examples(1)[0]).curvature == bound.curvature
    assert all(len(layer._forward_hooks) == 1 for layer in module.modules())


def test_a_penalty_without_a_trainer_is_labelled_too() -> None:
    module = low()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        penalty: Tensor = module.curvature_penalty()
    assert penalty.requires_grad
    assert "[lightning_lcnn]penalty" in {event.key for event in profile.key_averages()}
