"""Lightning's own commands, and the logger that keeps one CSV file per run over interruptions."""

from __future__ import annotations

import csv
import sys
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

from lightning_lcnn._files import check_writable, write_json, written_whole
from lightning_lcnn.callbacks import CurvatureMonitor
from lightning_lcnn.checkpoints import import_class
from lightning_lcnn.classifier import LitClassifier
from lightning_lcnn.cli.parser import EXAMPLES, TrainingParser
from lightning_lcnn.layers.upkeep import log_betas

SHARED = ("num_classes", "image_shape")  # what a model takes over from its data


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one of Lightning's commands."""
    TrainingCLI([command, *arguments])


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
        """Take the hyperparameters from the checkpoint, as Lightning does, if the class is the same."""
        command = self.config.get("subcommand")
        given = self.config.get(f"{command}.model.class_path")
        super()._parse_ckpt_path()
        of_checkpoint = self.config.get(f"{command}.model.class_path")
        if given != of_checkpoint and import_class(given) is not import_class(of_checkpoint):
            file = self.config.get(f"{command}.ckpt_path")
            raise ValueError(f"{file} is a checkpoint of {of_checkpoint}, and the model is {given}.")

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
        last = output / "checkpoints" / "last.ckpt"
        if resumed == "last" and not last.is_file():
            raise FileNotFoundError(f"there is no run to continue in {output}: {last} does not exist.")
        if resumed is None and ((output / "config.yaml").exists() or last.exists()):
            raise ValueError(
                f"{output} holds a run already: continue it with --ckpt_path last, or choose another --output."
            )
        check_writable(output)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load checkpoints without running code, unless the user said otherwise."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if "weights_only" in arguments and arguments["weights_only"] is None:
            arguments["weights_only"] = True
        return arguments

    def before_fit(self) -> None:
        """Note the time."""
        self._start = time.perf_counter()

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


def _as_list(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]


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

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.file = self.folder / "history.csv"
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
