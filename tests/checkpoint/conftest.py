"""Saving is tested on a stand-in model, so that a fault in a real module cannot hide one here."""

from __future__ import annotations

import pytest

from moesaic.checkpoint import native
from tests.checkpoint.standin import TinyConfig, build_tiny


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """``load_model`` builds the stand-in."""
    monkeypatch.setattr(native, "ModelConfig", TinyConfig)
    monkeypatch.setattr(native, "build_model", build_tiny)
