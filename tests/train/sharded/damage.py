"""Ways to damage a sharded checkpoint, and the sentence that refuses it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from moesaic.checkpoint import atomic
from moesaic.errors import CheckpointError
from moesaic.train.sharded.load import load_sharded
from moesaic.train.sharded.save import save_sharded
from tests.train.sharded.layouts import CUTS, everyone, held_by, same

ALONE = CUTS[1]["alone"]
NAME = "embedding.weight"


def save_rows(rank: int, folder: str) -> dict[str, Tensor]:
    """A checkpoint of two ranks, so that there are two files and tensors in pieces."""
    save_sharded(folder, held_by(CUTS[2]["fsdp"], rank), {"step": 1}, group=everyone())
    return {}


def seal(folder: Path) -> None:
    """What somebody does who wants the changes to pass: a manifest that fits."""
    (folder / atomic.MANIFEST).unlink()
    atomic._seal(folder, {})


def refused(folder: Path) -> str:
    """The sentence; fails if anything of the model changed on the way to it."""
    tensors = held_by(ALONE, 0, seed=1)
    with pytest.raises(CheckpointError) as caught:
        load_sharded(folder, tensors, group=everyone())
    assert same(tensors, held_by(ALONE, 0, seed=1))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def edit(folder: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the metadata as torch sees it, with the manifest to fit."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - our own
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    seal(folder)
