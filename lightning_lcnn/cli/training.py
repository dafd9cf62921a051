"""Lightning's own commands, and the logger that keeps one CSV file per run over interruptions."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from typing_extensions import override

from lightning_lcnn._compat import CLASS_PATH, INSTANTIATOR
from lightning_lcnn._files import check_writable, read_checkpoint, write_json, written_whole
from lightning_lcnn.callbacks import CurvatureMonitor
from lightning_lcnn.checkpoints import class_of, import_class
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli.arguments import EXAMPLES, config_files
from lightning_lcnn.cli.parser import TrainingParser
from lightning_lcnn.layers.upkeep import log_betas
from lightning_lcnn.models.from_file import Source, check_class_path, classifier_settings, imported, users_settings

LAST = Path("checkpoints", "last.ckpt")
WAY = "--weights_only false"
SHARED = ("num_classes", "image_shape")  # what a model takes over from its data


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one of Lightning's commands."""
    for file in config_files(arguments):
        _check_yaml(file)
    TrainingCLI([command, *arguments])


def _check_yaml(file: Path) -> None:
    """Raise ``ArgumentTypeError`` naming the file where it is no plain YAML, which jsonargparse does not."""
    import yaml  # comes with lightning

    try:
        yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{file} is no plain YAML: {' '.join(str(error).split())[:300]}.") from error


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` to the run folder, whole."""

    @override
    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write it on the first process, without ``--ckpt_path last``: it repeats the run from its start."""
        config = self.config.clone()
        if config.ckpt_path == "last":
            config.ckpt_path = None
        with written_whole(Path(config.output) / "config.yaml") as partial:
            self.parser.save(config, partial, skip_none=False, overwrite=True)


class TrainingCLI(LightningCLI):
    """LightningCLI whose runs each have a folder: ``config.yaml``, ``history.csv``, ``run.json``, ``checkpoints``.

    Args:
        arguments: Command and its options.

    Source:
        Ours.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._start = 0.0
        super().__init__(
            args=list(arguments),
            parser_class=TrainingParser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False, "overwrite": True},
            trainer_defaults={"max_epochs": 30},  # Lightning's own default of 1000 would spread the one-cycle schedule
            seed_everything_default=0,
            parser_kwargs={
                "prog": "lightning-lcnn",
                **{name: {"description": EXAMPLES[name]} for name in self.subcommands()},
            },
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """Lightning's without ``predict``."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    @override
    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse without Lightning's warning that there are arguments of the process too."""
        self.config = parser.parse_args(args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Take the hyperparameters from the checkpoint, as Lightning does, after a check of what they ask for."""
        command = self.config.get("subcommand")
        given = self.config[command]
        file = self._checkpoint_file(given)
        if file is None:
            return
        trust = given.get("weights_only") is False
        content = read_checkpoint(file, trust, WAY)
        if given.get("ckpt_path") == "last" or not isinstance(content, dict):
            return
        model = given.get("model.class_path") or f"{LitClassifier.__module__}.LitClassifier"
        written_by = class_of(content)
        if written_by and written_by != model and imported(written_by) is not import_class(model):
            raise ValueError(f"{file} is a checkpoint of {written_by}, and the model is {model}.")
        settings = dict(content.get("hyper_parameters") or {}) if trust else self._checked(content, file, given, model)
        parameters = inspect.signature(import_class(model)).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            # the class leaves out what Lightning adds: what was linked to it, and what it builds modules with
            settings = {key: value for key, value in settings.items() if key in parameters}
        for key in (INSTANTIATOR, CLASS_PATH):
            settings.pop(key, None)
        if settings:
            described = {command: {"model": {"class_path": model, "dict_kwargs": settings}}}
            self.config = self.parser.parse_object(described, self.config)

    def _checked(self, content: dict[str, Any], file: Path, given: Any, model: str) -> dict[str, Any]:
        """The hyperparameters; import paths only where the command line or its configuration has the same."""
        dumped = self.parser.dump(self.config, skip_link_targets=False, skip_none=False, format="json")
        own = (json.loads(dumped).get(self.config.subcommand, {}).get("model") or {}).get("init_args")
        cls = import_class(model)
        named = "the options of --model" if cls is not LitClassifier else "--model.network and --model.network_args"
        source = Source(file, WAY, named)
        check_class_path(content, cls, source)
        if issubclass(cls, LitClassifier):
            return classifier_settings(content, source, own, further=cls is not LitClassifier)
        return users_settings(content, source, own)

    def _checkpoint_file(self, given: Any) -> Path | None:
        """The file of --ckpt_path; None for URLs and for words that Lightning knows."""
        path = given.get("ckpt_path")
        if path == "last":
            path = Path(given.get("output")) / LAST
        return Path(path) if path and Path(path).is_file() else None

    @override
    def add_arguments_to_parser(self, parser: Any) -> None:
        """The run folder, and what the model takes over from the data."""
        parser.add_argument("--output", default="outputs/run", help="The run folder.")
        parser.add_argument("--name", type=str | None, default=None, help="Of the run, by default the folder's.")
        for key in SHARED:
            parser.link_arguments(
                "data", f"model.init_args.{key}", lambda data, key=key: self._shared(key, data), apply_on="instantiate"
            )

    def _shared(self, key: str, data: Any) -> Any:
        """The data's value; the model's own where the data do not say."""
        arguments = self.config[self.config.subcommand].get("model.init_args") or {}
        own, of_data = arguments.get(key), getattr(data, key, None)
        default = {"num_classes": 10, "image_shape": (3, 32, 32)}[key]
        if of_data is None:
            return own
        if own not in (None, default, of_data):
            raise ValueError(f"`model.{key}` is {own} and that of the data {of_data}; leave it out.")
        return of_data

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what a run folder needs and the user did not choose otherwise."""
        config = self._of_command(self.config_init, "trainer", {})
        fits = self.subcommand == "fit"
        if not fits:
            self.save_config_callback = None
        output = Path(self._of_command(self.config, "output"))
        if fits and not config["fast_dev_run"]:
            self._check_output(output)
        config["default_root_dir"] = config["default_root_dir"] or str(output)
        if config["logger"] is None:
            config["logger"] = History(output) if fits else False
        if fits:
            config["callbacks"] = [*_as_list(config["callbacks"]), *self._callbacks(config, output)]
        return super().instantiate_trainer(**kwargs)

    def _of_command(self, config: Any, key: str, default: Any = None) -> Any:
        """An option of the command that runs."""
        return config.get(str(self.subcommand), config).get(key, default)

    def _callbacks(self, config: Any, output: Path) -> list[Any]:
        present = _as_list(config["callbacks"])
        added: list[Any] = []
        wants_checkpoints = config["enable_checkpointing"] is not False and not config["fast_dev_run"]
        if wants_checkpoints and not any(isinstance(c, ModelCheckpoint) for c in present):
            # one file, which every epoch overwrites
            added.append(ModelCheckpoint(output / "checkpoints", "last", enable_version_counter=False))
        watched = isinstance(self.model, LitClassifier) and log_betas(self.model) and config["logger"]
        if watched and not any(isinstance(c, CurvatureMonitor) for c in present):
            added.append(CurvatureMonitor())
        return added

    def _check_output(self, output: Path) -> None:
        """Raise before the training starts if the folder cannot take, or has, a run."""
        resumed = self._of_command(self.config, "ckpt_path")
        last = output / LAST
        started = (output / "config.yaml").exists()
        if resumed == "last" and not last.is_file():
            way = "; it stopped before its first checkpoint, so start it again without --ckpt_path" if started else ""
            raise FileNotFoundError(f"there is no run to continue in {output}: {last} does not exist{way}.")
        if resumed is None and last.exists():
            raise ValueError(
                f"{output} holds a run already: continue it with --ckpt_path last, or choose another --output."
            )
        if resumed is None and started and ((output / "run.json").exists() or any(output.rglob("*.ckpt"))):
            raise ValueError(f"{output} holds a run already: choose another --output.")
        check_writable(output)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints without running code, unless the user said otherwise."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if "weights_only" in arguments and arguments["weights_only"] is None:
            arguments["weights_only"] = True
        return arguments

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Leave SIGTERM to Lightning, which ends after the batch."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Note the time; what an attempt that ended before its first checkpoint has logged goes."""
        self._start = time.perf_counter()
        anew = self._of_command(self.config, "ckpt_path") is None and not getattr(self.trainer, "fast_dev_run", False)
        if anew and self.trainer.is_global_zero:
            (Path(self._of_command(self.config, "output")) / History.NAME).unlink(missing_ok=True)

    def after_fit(self) -> None:
        """Write ``run.json`` and say what to do next."""
        if getattr(self.trainer, "fast_dev_run", False) or not self.trainer.is_global_zero:
            return
        output = Path(self._of_command(self.config, "output"))
        record = {
            "method": self._of_command(self.config, "name") or output.resolve().name,
            "seed": self._of_command(self.config, "seed_everything"),
            "epochs": self.trainer.current_epoch,
            "seconds": round(time.perf_counter() - self._start, 1),
            "resumed": self._of_command(self.config, "ckpt_path") is not None,
        }
        write_json(output / "run.json", record)
        cls = type(self.model)
        model = "" if isinstance(self.model, LitClassifier) else f" --model {cls.__module__}.{cls.__qualname__}"
        print(f"The run is in {output}. Measure it: lightning-lcnn evaluate {output}{model}", file=sys.stderr)


class History(Logger):
    """Writes ``history.csv``: a row for every call, columns ``step``, ``epoch`` and whatever is logged.

    A resumed run continues the file; rows of steps that are done again are replaced. (Lightning's CSVLogger deletes the
    file of the run that it resumes.)

    Args:
        folder: Where the file is.

    Source:
        Ours.

    Example:
        >>> import tempfile
        >>> history = History(tempfile.mkdtemp())
        >>> history.log_metrics({"loss": 0.5}, step=3)
        >>> print(history.file.read_text())
        step,loss
        3,0.5
        <BLANKLINE>
    """

    NAME = "history.csv"

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.file = self.folder / self.NAME
        self._columns: list[str] | None = None

    @property
    @override
    def name(self) -> str:
        """Nothing: the folder is the run's own."""
        return ""

    @property
    @override
    def version(self) -> str:
        """Nothing."""
        return ""

    @property
    @override
    def log_dir(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    @override
    def save_dir(self) -> str:
        """The folder."""
        return str(self.folder)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is in a file of its own."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row."""
        row = {"step": step, **{key: v.item() if isinstance(v, Tensor) else v for key, v in metrics.items()}}
        if self._columns is None:
            self._continue(step)
        columns: list[str] = self._columns or []
        new = [key for key in row if key not in columns]
        if new:
            rows = _read(self.file)
            self._columns = columns = columns + new
            self._rewrite(rows)
        with self.file.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)

    def _continue(self, step: int | None) -> None:
        """Take over the rows of earlier steps."""
        rows = [row for row in _read(self.file) if step is None or int(row["step"] or 0) < step]
        self._columns = list(rows[0]) if rows else []
        if rows:
            self._rewrite(rows)
        else:
            self.file.unlink(missing_ok=True)

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with written_whole(self.file) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns or [])
            writer.writeheader()
            writer.writerows(rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _as_list(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
