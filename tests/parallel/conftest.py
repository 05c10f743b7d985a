"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.elastic import end_all


@pytest.fixture
def none_left() -> Iterator[None]:
    """A test that fails leaves no torchrun behind."""
    yield
    end_all()
