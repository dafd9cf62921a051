"""The tree shows the direction of dependencies; this reads every import and fails on an arrow that runs upwards."""

from __future__ import annotations

import ast
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


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
