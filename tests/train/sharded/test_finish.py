"""The end of a run of many processes: newest and best checkpoint whole, and what is in parts refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moesaic as mo
from moesaic.checkpoint.native import load_config, load_into, load_model, open_model, read_header
from moesaic.checkpoint.parts import is_sharded
from moesaic.convert.convert import convert
from moesaic.convert.hub import resolve
from moesaic.errors import CheckpointError
from moesaic.train.sharded import finish
from moesaic.train.sharded.consolidate import consolidate
from moesaic.train.sharded.finish import consolidate_run
from moesaic.train.snapshot import (
    best_snapshot,
    find_model_folder,
    latest_snapshot,
    resolve_model_folder,
    restore_snapshot,
)
from tests.checkpoint.test_atomic import tree
from tests.convert.test_convert import file_size_limit
from tests.convert.test_hub import cached
from tests.train.sharded.layouts import everyone
from tests.train.sharded.runs import part_of, save, started

IN_PARTS = r"step-00000001 lies in parts of 1 process; make it one with `moesaic convert .*step-00000001 OUT`\.$"


def _run(folder: Path, steps: int = 4, best: int = 2) -> Path:
    """A run whose checkpoints all lie in parts."""
    model, optimizer = started(steps=1)
    for step in range(1, steps + 1):
        save(folder, step, model, part_of(model, optimizer, "one", 0), everyone(), is_best=step == best)
    return folder / "checkpoints"


def test_the_newest_and_the_best_become_whole_and_the_others_stay(tmp_path: Path) -> None:
    parent = _run(tmp_path)
    before = {name: data for name, data in tree(parent).items() if "/" not in name}
    said: list[str] = []
    made = consolidate_run(tmp_path, said.append)
    assert [path.name for path in made] == ["step-00000004", "step-00000002"]
    assert said == ["Making checkpoint step-00000004 whole ...", "Making checkpoint step-00000002 whole ..."]
    assert [is_sharded(parent / f"step-0000000{step}") for step in (2, 3, 4)] == [False, True, False]
    assert {name: data for name, data in tree(parent).items() if "/" not in name} == before  # the pointers
    assert (latest_snapshot(tmp_path), best_snapshot(tmp_path)) == (parent / "step-00000004", parent / "step-00000002")
    assert resolve_model_folder(tmp_path) == parent / "step-00000002"
    state = load_model(parent / "step-00000002").state_dict()
    assert all(torch.equal(state[name], x) for name, x in started(steps=1)[0].state_dict().items())
    assert restore_snapshot(parent / "step-00000004", *started(seed=1))["step"] == 4
    assert consolidate_run(tmp_path) == []


def test_nothing_to_make_whole(tmp_path: Path) -> None:
    assert consolidate_run(tmp_path) == []


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_full_disk_is_a_warning_and_leaves_the_parts(tmp_path: Path, limit: int) -> None:
    parent = _run(tmp_path, steps=1)
    before = tree(tmp_path)
    with file_size_limit(limit), pytest.warns(UserWarning, match="stays in parts; make it one with") as caught:
        assert consolidate_run(tmp_path) == []
    sentence = str(caught[0].message)
    assert re.search(rf"`moesaic convert {parent}/step-00000001 OUT`\. Cannot write to .*larger than this", sentence)
    assert tree(tmp_path) == before
    assert consolidate_run(tmp_path) == [parent / "step-00000001"]


def test_a_file_of_others_in_the_newest_does_not_keep_the_best_from_being_whole(tmp_path: Path) -> None:
    parent = _run(tmp_path)
    (parent / "step-00000004" / "notes.txt").write_text("keep me")
    with pytest.warns(UserWarning, match=r'holds "notes.txt", which was not saved with it'):
        assert consolidate_run(tmp_path) == [parent / "step-00000002"]
    assert (parent / "step-00000004" / "notes.txt").read_text() == "keep me"


def test_a_kill_while_it_becomes_whole_leaves_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = _run(tmp_path, steps=1)
    before = tree(parent / "step-00000001")

    def killed(*args: Any) -> Path:
        (parent / ".step-00000001.incomplete-999999999").mkdir()  # as a process that no longer is would leave it
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "consolidate", killed)
    with pytest.raises(KeyboardInterrupt):
        consolidate_run(tmp_path)
    assert tree(parent / "step-00000001") == before
    monkeypatch.undo()
    assert consolidate_run(tmp_path) == [parent / "step-00000001"]
    assert sorted(path.name for path in parent.iterdir()) == ["latest", "step-00000001"]


def test_every_reader_of_whole_checkpoints_says_what_to_do(tmp_path: Path) -> None:
    folder = _run(tmp_path, steps=1) / "step-00000001"
    model, optimizer = started()
    readers: list[Callable[[], object]] = [
        lambda: load_model(folder),
        lambda: load_model(folder, verify=False),
        lambda: open_model(folder),
        lambda: load_into(model, folder),
        lambda: read_header(folder),
        lambda: restore_snapshot(folder, model, optimizer),
        lambda: resolve_model_folder(folder),
        lambda: resolve_model_folder(tmp_path),
        lambda: mo.load(folder),
        lambda: mo.load(tmp_path),
        lambda: convert(folder, tmp_path / "out"),
    ]
    for reader in readers:
        with pytest.raises(CheckpointError, match=IN_PARTS):
            reader()
    assert find_model_folder(tmp_path) == folder
    assert load_config(folder) == model.config


def test_the_number_of_processes_is_left_out_where_the_table_does_not_say_it(tmp_path: Path) -> None:
    folder = _run(tmp_path, steps=1) / "step-00000001"
    record = json.loads((folder / "sharded.json").read_text())
    for content in (json.dumps(record | {"world": "many"}), json.dumps(record | {"world": 0}), "{"):
        (folder / "sharded.json").write_text(content)
        with pytest.raises(CheckpointError, match="lies in parts of several processes; make it one with"):
            load_model(folder)


def test_through_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = _run(tmp_path, steps=1) / "step-00000001"
    with pytest.raises(CheckpointError, match=IN_PARTS):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    consolidate(folder, folder)
    ids = torch.arange(6)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(ids).logits, mo.load(folder)(ids).logits)


def test_through_lm_eval(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from moesaic.integrations.lm_eval import MoesaicLM

    _run(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=IN_PARTS):
        MoesaicLM(str(tmp_path))


def test_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    folder = _run(tmp_path, steps=1) / "step-00000001"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    cached(tmp_path, folder)
    with pytest.raises(
        CheckpointError, match="owner/tiny lies in parts, as several processes trained it; ask its owner"
    ):
        resolve("owner/tiny")
