"""The tree shows the direction of dependencies; this reads every import and fails on an arrow that runs upwards."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "lightning_lcnn"
FLOORS = [  # from the ground up; a module imports from lower floors, and from its own folder
    {"__about__", "_checks", "_files", "_compat"},
    {"kernels"},
    {"functional"},
    {"layers"},
    {"recording"},
    {"bounds"},
    {"conversion"},
    {"models"},  # whose networks by name can be converted
    {"networks"},
    {"penalties"},
    {"metrics"},
    {"callbacks", "data"},
    {"evaluation", "mixin"},
    {"classifier", "plots"},
    {"checkpoints"},
    {"report"},
    {"cli"},
    {"__main__"},
]
LEVELS = {name: level for level, floor in enumerate(FLOORS) for name in floor}
FIRST_FLOOR_OF = {
    "torchmetrics": "metrics",
    "torchattacks": "metrics",
    "lightning": "callbacks",
    "pytorch_lightning": "callbacks",
    "matplotlib": "plots",
}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    own = part(path)
    level = LEVELS[own]
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "lightning_lcnn":
            other = rest[0] if rest else "__init__"
            assert other == own or LEVELS.get(other, 99) < level, f"{own} (level {level}) imports {name}"
        elif top in FIRST_FLOOR_OF:
            assert level >= LEVELS[FIRST_FLOOR_OF[top]], f"{own} (level {level}) imports {top}"


def test_core_imports_nothing_but_its_dependencies() -> None:
    core = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "lightning_lcnn"}
    core |= {"typing_extensions", "lightning_utilities"}  # torch, and both lightning and torchmetrics, depend on them
    import sys

    for path in FILES:
        for node in ast.parse(path.read_text()).body:  # top-level statements only: extras are imported where used
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in imported_names(node):
                    top = name.split(".")[0]
                    assert top in core or top in sys.stdlib_module_names, f"{path.name} imports {name} at the top"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_stay_in_their_file(path: Path) -> None:
    """What two files share has a public name, in the same folder too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_lcnn."):
            shared = [alias.name for alias in node.names if is_private(alias.name)]
            assert not shared, f"{node.module} keeps {shared} to itself"


# Files of equal name, where the folder says the rest.
EQUAL_NAMES = {
    "base.py": "what the files of a folder share",
    "convert.py": "conversion itself, and the command that asks for it",
    "options.py": "of the conversion, and of the commands",
    "training.py": "the commands, and the curves",
    "pooling.py": "the layer, and the rules for it and its kin",
    "curvature.py": "the metrics, and the penalty",
    "report.py": "the command",
}


def test_file_names_are_unique_or_the_folder_says_the_rest() -> None:
    names = [path.name for path in FILES if path.name != "__init__.py"]
    assert {name for name in names if names.count(name) > 1} <= set(EQUAL_NAMES)


# Files of fewer than 60 lines with at most one importer, and why they stand alone.
SMALL = {
    "__main__.py": "what `python -m` runs",
    "networks.py": "an old path",
    "conversion/source.py": "an old path",
    "cli/report.py": "a command; the table of commands imports it by name",
    "bounds/rules/aten_activations.py": "one file for each subject of the rules for recorded operations",
    "recording/untouched.py": "what recording must leave behind, apart from what it records",
    "functional/softplus.py": "the formula of the method, with its documentation",
}


def test_few_rooms() -> None:
    """A file of forty lines with one caller is a corridor: it belongs to its caller."""
    assert len(FILES) <= 155  # 128 when the rooms were put in order; since then the recorder and the kernels of a GPU
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        if path.name != "__init__.py" and name not in SMALL and len(path.read_text().splitlines()) < 60:
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            users = [p for p in FILES if module in imported(p)]
            assert len(users) > 1, f"{name} has {len(users)} importer and fewer than 60 lines"


# Private names that a subclass has to read or call on itself, or that belong to torch's protocol for modules.
ALLOWED = {
    "_modules",  # what a module holds is only found there under its own name and without its children's; torch's own
    "_parameters",  # code, and that of everybody who replaces layers, reads and writes these three
    "_buffers",
    "_apply",  # called on super() by those who override it, as torch means it; so are the next two
    "_load_from_state_dict",
    "_conv_forward",  # of nn.Conv*, for subclasses with another weight (torch's own parametrised and quantised ones)
    "_plot",  # of torchmetrics, which tells those who write metrics to call it
    "_parse_ckpt_path",  # of LightningCLI, overridden; tests/test_compat.py checks that they are still called
    "_prepare_subcommand_kwargs",
    "_run_subcommand",
}


@functools.cache
def private_names_of_others() -> frozenset[str]:
    """What the objects have that we are handed or inherit from, and the names that _compat knows besides."""
    import torch
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.strategies import DDPStrategy
    from torch import fx, nn
    from torchmetrics import MeanMetric

    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    modules = (
        nn.Conv2d(1, 1, 1),
        nn.BatchNorm2d(1),
        MeanMetric(),
        LightningModule(),
        nn.parallel.DistributedDataParallel,
    )
    tensors = torch.nn.Parameter, torch.autograd.Function, torch.ones(1, requires_grad=True).exp().grad_fn, fx.Tracer()
    runs = trainer, trainer.fit_loop.epoch_loop, LightningCLI, DDPStrategy(), LightningDataModule(), Callback()
    names = {name for item in (*modules, *tensors, *runs) for name in dir(item)}
    known = {node.attr for node in ast.walk(parsed(PACKAGE / "_compat.py")) if isinstance(node, ast.Attribute)}
    known |= set(constants(parsed(PACKAGE / "_compat.py")))
    return frozenset(name for name in names | known if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name.isidentifier() and name.strip("_") != ""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def constants(tree: ast.AST) -> list[str]:
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def private_names_defined_in(tree: ast.Module) -> set[str]:
    """Functions, classes, attributes of classes, and what methods assign to ``self``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


@functools.cache
def private_names_of_package() -> frozenset[str]:
    return frozenset().union(*(private_names_defined_in(parsed(p)) for p in FILES))


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private_import(node: ast.AST) -> bool:
    """Whether it imports a private name, or from a private module, of another package."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return False
    names = ".".join([*imported_names(node), *(alias.name for alias in node.names)]).split(".")
    return names[0] not in ("lightning_lcnn", "__future__") and any(map(is_private, names))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_names_of_other_packages_are_read_in_compat_alone(path: Path) -> None:
    """Three ways lead to one: an import, ``x._name``, and the name as a string, for ``getattr`` or ``__dict__``.

    On ``self`` a name is ours if some file of the package defines it, on anything else if this very file does, which
    also keeps one file from another's private names; and no name is ours that other packages have too.
    """
    if path == PACKAGE / "_compat.py":
        return
    tree, others = parsed(path), private_names_of_others() - ALLOWED
    of_package = private_names_of_package()
    of_file = private_names_defined_in(tree)
    found = [ast.unparse(node) for node in ast.walk(tree) if is_private_import(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in ALLOWED:
            if ast.unparse(node.value) in ("aten", "torch.ops.aten"):
                continue  # operators by their names; `torch.export` shows the same ones, underscores included
            known = of_package if is_self(node.value) else of_file
            if node.attr in others or node.attr not in known:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and node.value in others:
            found.append(f"line {node.lineno}: {node.value!r}")
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from torch.nn.modules.batchnorm import _NormBase",
        "import torch._dynamo",
        "x = torch._C._nn",
        "x = self._trainer",
        "x = trainer._logger_connector",
        "x = getattr(module, '_orig_mod', module)",
        "x = vars(module)['_forward_hooks']",
        "x._version = 1",
    ],
)
def test_the_check_finds_them(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.py"
    file.write_text(f"class Some:\n    def f(self, x):\n        self._version = 1\n        {line}\n")
    with pytest.raises(AssertionError, match=r"assert not \["):
        test_private_names_of_other_packages_are_read_in_compat_alone(file)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
