"""A good sharded checkpoint, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.train.sharded.damage import save_rows


@pytest.fixture(scope="package")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "step"
    run_distributed(2, save_rows, str(folder))
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(good, tmp_path / "step"))
