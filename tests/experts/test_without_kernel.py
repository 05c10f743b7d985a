"""The layer's own tests on PyTorch alone, in a process where the C kernel is switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_layers_pass_their_tests_without_the_kernel() -> None:
    files = [str(HERE / name) for name in ("test_layer.py", "test_plan_travels.py", "test_stacked.py")]
    environment = {**os.environ, "MOESAIC_KERNEL": "off"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-2000:]
