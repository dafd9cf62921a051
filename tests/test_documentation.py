"""The documentation is true: examples run, links and commands lead somewhere, the reference is complete."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

import lightning_lcnn
from tests import ROOT

DOCS = ROOT / "docs"
SOURCES = sorted(p for p in (*DOCS.rglob("*.md"), *DOCS.rglob("*.rst")) if "_build" not in p.parts)
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(p for p in SOURCES if p.suffix == ".md")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
COMMAND = re.compile(r"python (examples/\w+\.py)((?: +[^\s`|;)]+| *\\\n)*)")
SHELL = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
OURS = re.compile(r"^lightning-lcnn ([\w-]+)((?:[^\n\\]|\\\n)*)", re.MULTILINE)
EXTRAS = re.compile(r"""pip install (?:-e )?["']?\.\[([\w,]+)\]""")
CONFIG = re.compile(r"--config (\w+)(?= |$)", re.MULTILINE)
TOCTREE = re.compile(r"^```{toctree}\n(.*?)^```", re.MULTILINE | re.DOTALL)
OBJECT = re.compile(r"^\.\. (?:autoclass|autofunction|py:data):: (\w+)$", re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loaders and loggers, no part of the example
@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, one namespace per page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "page.py"
    script.write_text("\n".join(BLOCK.findall(page.read_text())))
    runpy.run_path(str(script), run_name="page")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_and_pictures_exist(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"


def test_extras_exist() -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for page in PAGES:
        for names in EXTRAS.findall(page.read_text()):
            assert set(names.split(",")) <= set(extras), f"{page.name} installs {names}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_keep_their_norms(page: Path) -> None:
    r"""Inside a table ``\|`` is a bar and no norm; ``\lVert`` is one."""
    for line in page.read_text().splitlines():
        assert not (line.startswith("|") and re.search(r"\$[^$]*\\\|", line)), f"{page.name}: {line}"


@pytest.mark.parametrize("page", [p for p in PAGES if COMMAND.search(p.read_text())], ids=name)
def test_commands_name_files_and_options_that_exist(page: Path) -> None:
    for script, arguments in COMMAND.findall(page.read_text()):
        assert (ROOT / script).exists(), f"{page.name} runs {script}"
        known = "".join(p.read_text() for p in (ROOT / script, ROOT / "examples" / "benchmarking.py"))
        for option in re.findall(r"(--[\w-]+)", arguments):
            spelled = option in known or f'"{option[2:].replace("-", "_")}"' in known  # options made in a loop
            assert spelled, f"{page.name}: {script} has no {option}"


@pytest.mark.parametrize("page", [p for p in PAGES if OURS.search("".join(SHELL.findall(p.read_text())))], ids=name)
def test_the_command_line_knows_its_options(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_lcnn.cli import main
    from lightning_lcnn.cli.arguments import COMMANDS, presets

    for config in CONFIG.findall("\n".join(SHELL.findall(page.read_text()))):
        assert config in presets(), f"{page.name} names the preset {config}"
    for command, arguments in OURS.findall("\n".join(SHELL.findall(page.read_text()))):
        assert command in COMMANDS, f"{page.name}: no command {command}"
        if COMMANDS[command][0] == "training":
            continue  # Lightning's options are those of the classes that are named
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        for option in re.findall(r"(--[\w-]+)", arguments):
            assert re.search(rf"{option}\b", text), f"{page.name}: {command} has no {option}"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {DOCS / "index"}
    for page in SOURCES:
        for body in TOCTREE.findall(page.read_text()):
            listed |= {page.parent / line for line in body.split("\n") if line and not line.startswith(":")}
    pages = {page.with_suffix("") for page in SOURCES}
    assert pages - listed == set(), "add these pages to a toctree of docs/index.md"
    assert listed - pages == set(), "these pages do not exist"


def documented_modules() -> list[ModuleType]:
    pages = sorted(p.stem for p in (DOCS / "api").glob("*.rst"))
    return [
        lightning_lcnn if page == "lightning_lcnn" else importlib.import_module(f"lightning_lcnn.{page}")
        for page in pages
    ]


def test_every_package_has_a_page_in_the_reference() -> None:
    packages = {p.parent.name for p in (ROOT / "lightning_lcnn").glob("*/__init__.py")}
    assert packages <= {p.stem for p in (DOCS / "api").glob("*.rst")}


@pytest.mark.parametrize("module", documented_modules(), ids=lambda m: m.__name__)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    page = DOCS / "api" / f"{module.__name__.split('.')[-1]}.rst"
    listed = set(OBJECT.findall(page.read_text()))
    for key in getattr(module, "__all__", ()):
        value = getattr(module, key)
        if isinstance(value, ModuleType):
            assert (DOCS / "api" / f"{key}.rst").exists(), f"no page of the API reference for {value.__name__}"
        elif module is not lightning_lcnn:
            assert key in listed, f"{module.__name__}.{key} is public; add it to {page.relative_to(ROOT)}"
        elif not key.startswith("_"):
            assert key in page.read_text(), f"{key} is public; add it to {page.relative_to(ROOT)}"
    for key in listed:
        assert hasattr(module, key), f"{page.relative_to(ROOT)} lists {key}, which {module.__name__} has not"
