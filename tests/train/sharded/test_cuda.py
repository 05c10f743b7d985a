"""On a GPU: the same fingerprints, and checkpoints that go from it to the processor and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.train.sharded.background import AsyncSaver, saving_group
from moesaic.train.sharded.fingerprint import fingerprint
from moesaic.train.sharded.load import fingerprints, load_sharded
from moesaic.train.sharded.regions import all_of
from moesaic.train.sharded.save import save_sharded
from tests.train.sharded.layouts import CUTS, everyone, held_by, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ALONE = CUTS[1]["alone"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_fingerprints_are_those_of_the_processor(dtype: torch.dtype) -> None:
    x = torch.randn(7, 300, 41, dtype=torch.float64).mul(100).to(dtype)
    region = ((2, 6), (10, 290), (3, 40))
    part = x[2:6, 10:290, 3:40]
    assert fingerprint(x.cuda(), all_of(x.shape), x.shape) == fingerprint(x, all_of(x.shape), x.shape)
    assert fingerprint(part.cuda(), region, x.shape) == fingerprint(part, region, x.shape)


def test_from_the_gpu_and_back(tmp_path: Path) -> None:
    there = {name: (held, x.cuda()) for name, (held, x) in held_by(ALONE, 0).items()}
    save_sharded(tmp_path / "a", there, {}, group=everyone())
    with AsyncSaver(saving_group([0], 0)) as saver:
        saver.save(lambda tensors, extra, group: save_sharded(tmp_path / "b", tensors, extra, group=group), there, {})
        for _, x in there.values():
            x.zero_()
    for folder in (tmp_path / "a", tmp_path / "b"):
        here = held_by(ALONE, 0, None)
        load_sharded(folder, here, group=everyone())
        assert same(here, held_by(ALONE, 0))
        load_sharded(folder, there, group=everyone())
        assert same({name: (held, x.cpu()) for name, (held, x) in there.items()}, here)
        assert fingerprints(there, everyone()) == fingerprints(here, everyone())
