"""What tests of benchmarks share: a file of bench/ by name, and its main run as from the command line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a file of bench/ by name, as a benchmark run from the command line would."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """(the table, the JSON of the last line) of a benchmark's main with these options."""

    def main(module: ModuleType, *options: str) -> Any:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *options])
        module.main()
        text, _, last = capsys.readouterr().out.strip().rpartition("\n")
        return text, json.loads(last)

    return main
