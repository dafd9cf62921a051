"""Train every method of the comparison over seeds, measure all networks, write a table and pictures.

    python examples/compare_methods.py --preset digits
    python examples/compare_methods.py --data DIR --preset cifar10-small --seeds 0 1 2
    python examples/compare_methods.py --preset digits --search        choose hyper-parameters on the validation split

DIR holds train/<class>/*.jpg and test/<class>/*.jpg. Finished runs are kept under --output and are not repeated; an
interrupted run goes on at its last epoch. A run whose loss becomes NaN is recorded and the others go on. At the end
--output/<preset> holds results.json, results.md, accuracy.png, stability.png and adversarial.png, and one folder per
method and seed with its history, its weights and its measures.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comparison.methods import METHODS
from comparison.presets import PRESETS, Data, Options, Preset, Split, load_data
from comparison.tables import markdown
from comparison.timing import time_methods
from comparison.training import train, write

from lightning_lcnn.evaluation import evaluate
from lightning_lcnn.plots import accuracy_against_curvature, adversarial_curves, stability_curves


@dataclass(frozen=True)
class Comparison:
    """Methods and seeds of one preset on one device, with results in a folder."""

    preset: Preset
    methods: list[str]
    seeds: list[int]
    data: Data
    folder: Path
    device: str

    def run(self) -> list[dict[str, Any]]:
        """Train and measure all on the test images, seeds outermost: an interrupted study has whole comparisons."""
        records = []
        for seed in self.seeds:
            for name in self.methods:
                folder = self.folder / name / f"seed{seed}"
                records.append(self._run(name, METHODS[name].chosen(self.preset), seed, folder, self.data.test))
                print(
                    f"{len(records)} of {len(self.seeds) * len(self.methods)}  {summary(name, records[-1])}", flush=True
                )
        return records

    def search(self) -> None:
        """Train every setting of each method's grid and measure it on the validation split; print all, choose none."""
        records = []
        for name in self.methods:
            for options in METHODS[name].grid:
                label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
                for seed in self.seeds:
                    chosen = {**METHODS[name].defaults, **options}
                    folder = self.folder / "search" / label / f"seed{seed}"
                    records.append(self._run(name, chosen, seed, folder, self.data.validation))
                    print(summary(label, records[-1]), flush=True)
        write(self.folder / "search.json", records)

    def _run(self, name: str, options: Options, seed: int, folder: Path, split: Split) -> dict[str, Any]:
        start = time.perf_counter()
        record = train(METHODS[name], options, self.preset, self.data, seed, folder)
        if record["status"] == "finished":
            record["evaluation"] = self._measure(name, folder, split)
        else:
            warnings.warn(f"{name}, seed {seed}: {record['status']}; the run is recorded and not measured")
        record["wall_seconds"] = time.perf_counter() - start
        return record

    def _measure(self, name: str, folder: Path, split: Split) -> dict[str, Any]:
        file = folder / "evaluation.json"
        if not file.exists():
            record = evaluate(
                torch.load(folder / "network.pt", weights_only=False).to(self.device),
                *(split.images, split.labels),
                name=name,
                examples=self.preset.examples,
                attack_examples=self.preset.attack_examples,
                stability_radii=self.preset.stability_radii,
                attack_radii=self.preset.attack_radii,
            )
            write(file, record)
        return json.loads(file.read_text())


def summary(label: str, record: dict[str, Any]) -> str:
    """One line of progress."""
    start = f"{label}, seed {record['settings']['seed']}: "
    if record["status"] != "finished":
        return start + record["status"]
    result = record["evaluation"]
    attacked = ", ".join(f"{100 * value:.1f} at {radius}" for radius, value in result["adversarial_accuracy"].items())
    return (
        f"{start}accuracy {100 * result['accuracy']:.1f} %, "
        f"curvature of the margin {result['curvature']['margin']:.3g}, "
        f"accuracy under attack {attacked}, {record['wall_seconds']:.0f} s"
    )


def draw(records: list[dict[str, Any]], folder: Path) -> None:
    """Accuracy against curvature, stability curves, accuracy under attack."""
    evaluations = [record["evaluation"] for record in records if "evaluation" in record]
    plots = {
        "accuracy": accuracy_against_curvature,
        "stability": stability_curves,
        "adversarial": adversarial_curves,
    }
    for name, plot in plots.items() if evaluations else ():
        plot(evaluations).savefig(folder / f"{name}.png", dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and test/<class>/; digits need none")
    parser.add_argument("--preset", choices=list(PRESETS), default="digits")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--search", action="store_true", help="try each method's grid on the validation split")
    for option in ("epochs", "batch_size", "width", "limit_train"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, help="in place of the preset's")
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    """Search, or run all and write tables and pictures."""
    given = {key: getattr(args, key) for key in ("epochs", "batch_size", "width", "limit_train")}
    preset = replace(PRESETS[args.preset], **{key: value for key, value in given.items() if value is not None})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_data(preset, args.data, args.output / "cache", device)
    folder = args.output / args.preset
    comparison = Comparison(preset, args.methods, args.seeds, data, folder, device)
    if args.search:
        comparison.search()
        return
    records = comparison.run()
    finished = {record["settings"]["method"] for record in records if record["status"] == "finished"}
    timing = time_methods(preset, [name for name in args.methods if name in finished], data)
    write(folder / "results.json", {"runs": records, "time_per_step": timing})
    text = markdown(records, timing)
    (folder / "results.md").write_text(text)
    draw(records, folder)
    print(f"{text}\nTables and pictures: {folder}")


def main() -> None:
    """One line for what a user can put right."""
    for name in ("lightning.pytorch", "pytorch_lightning"):  # the second, if installed, logs for both
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # of an interrupted run
    try:
        compare(arguments())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where this stopped")


if __name__ == "__main__":
    main()
