"""What the tests of the command line share: two small texts, a tiny config, and the command in this process or another.

>>> made = make_project(folder)                      # a.txt, b.txt and tiny.json in it
>>> done = call(capsys, "train", *TRAIN)             # Done(status, out, err)
>>> one_sentence(done)                               # the only thing it said on standard error, checked
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moesaic.cli import main

CONFIG: dict[str, Any] = {
    "model": {
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "max_seq_len": 64,
        "hidden": 32,
        "moe": {"num_experts": 4, "k": 2, "hidden": 16},
    },
    "data": {"vocab_size": 300, "val_fraction": 0.2, "document": "paragraphs"},
    "steps": 6,
    "batch_size": 2,
    "seq_len": 32,
    "eval_every": 2,
    "eval_rows": 2,
    "checkpoint_every": 3,
    "sample_tokens": 8,
    "tensorboard": False,
}
TRAIN = ("--data", "a.txt", "b.txt", "--config", "tiny.json", "--out", "run")
_WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "with",
    "red",
    "blue",
    "ran",
    "fast",
    "and",
    "slow",
    "was",
    "gone",
)


PROGRESS = re.compile(r"((sparse|dense) )?step \d+/\d+ |Training a byte-level BPE|[\d,]+ training and|Resuming ")


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def make_project(folder: Path, **changes: Any) -> Path:
    """Two texts of about 20 kB each and ``tiny.json``, with ``changes`` to its top level."""
    chance = random.Random(0)
    for name in ("a.txt", "b.txt"):
        paragraphs = [" ".join(chance.choices(_WORDS, k=60)) + "." for _ in range(90)]
        (folder / name).write_text("\n\n".join(paragraphs))
    (folder / "tiny.json").write_text(json.dumps(CONFIG | changes))
    return folder


def call(capsys: pytest.CaptureFixture[str], *args: str) -> Done:
    """The command in this process. Warnings are shown as a user sees them, not turned into errors."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as end:
            main(args)
    assert isinstance(end.value.code, int)
    return Done(end.value.code, *capsys.readouterr())


def start(*args: str, cwd: Path, **more: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, on one thread, with both streams piped."""
    command = [sys.executable, "-m", "moesaic", *args]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment(), text=True, **(streams | more))


def environment() -> dict[str, str]:
    """For a child: this process's import path, one thread."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


def run(*args: str, cwd: Path, **more: Any) -> Done:
    """``start`` and wait."""
    with start(*args, cwd=cwd, **more) as process:
        out, err = process.communicate(timeout=100)
    return Done(process.returncode, out, err)


def one_sentence(done: Done, status: int = 2) -> str:
    """The sentence of a failed command, after checking that nothing else was said on standard error."""
    assert done.status == status, done
    lines = [line for line in done.err.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("moesaic: ")
    sentence = lines[0].removeprefix("moesaic: ")
    assert re.search(r"[.?]$", sentence), sentence
    assert not re.search(r"Traceback|Errno|<class|None|object at", sentence), sentence
    return sentence


def tree(folder: Path) -> dict[str, str]:
    """Every path below ``folder`` and what its content hashes to."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }
