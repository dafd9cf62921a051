"""What a reader of one training step, one conversion, one fold has to read stays short."""

from __future__ import annotations

import runpy

import pytest
import torch

from lightning_lcnn.functional import centered_softplus
from tests import ROOT
from tests.lightning_helpers import FILTERS

pytestmark = FILTERS
MOST_FILES = {"step": 15, "step with a refresh": 18, "conversion": 21, "fold": 10}  # 0.1 had 29, 32, 24 and 10


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(ROOT / "examples" / "code_path.py"))


@pytest.mark.parametrize("name", MOST_FILES)
def test_files_on_the_path(name: str, script: dict) -> None:
    path = script["PATHS"][name]()
    assert len(path.files) <= MOST_FILES[name], path.files


def test_the_recorder_sees_what_is_called(script: dict) -> None:
    with script["recorded"]() as path:
        centered_softplus(torch.zeros(1), 2.0)
    assert path.files[:2] == ["functional/softplus.py", "_checks.py"]
