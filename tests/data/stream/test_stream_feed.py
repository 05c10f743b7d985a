"""Streams of rows: as the slow loop says, whoever reads which part, wherever they stop and go on."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.packing import IGNORE, PackedRows
from moesaic.data.split import TokenView
from moesaic.data.stream.lane import Lane
from moesaic.data.stream.lanes import Cursor, Lanes
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.tokenizer import EOS, encode, eos_id
from tests.data.stream.shards import (
    SEQ_LEN,
    config,
    documents,
    feed_of,
    held_out,
    rows_of,
    slow_steps,
    texts_of,
    together,
    tokenizer,
    write_shards,
)

MANY, FEW = documents(7, 13), documents(2, 30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shards")
    found = {suffix: write_shards(root / suffix[1:], MANY, suffix) for suffix in (".jsonl", ".jsonl.gz", ".parquet")}
    return found | {"few": write_shards(root / "few", FEW)}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("shuffle", [1, 4])
def test_rows_are_those_of_the_slow_loop(folders: dict[str, Path], suffix: str, shuffle: int) -> None:
    """40 steps are more than an epoch."""
    feed = feed_of(folders[suffix], shuffle=shuffle)
    assert [rows_of(feed.next_step()) for _ in range(40)] == slow_steps(MANY, 40, shuffle=shuffle)
    assert min(cursor[1] for cursor in feed.state_dict()["lanes"]) >= 1


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_fewer_shards_than_lanes(folders: dict[str, Path], lanes: int) -> None:
    feed = feed_of(folders["few"], batch_size=8, lanes=lanes)
    assert [rows_of(feed.next_step()) for _ in range(12)] == slow_steps(FEW, 12, batch_size=8, lanes=lanes)


def test_one_lane_packs_as_text_in_memory_does(folders: dict[str, Path]) -> None:
    """One shard, one lane, in the order of the file: the rows of ``PackedRows``, but for the last, which goes on."""
    texts = [text for text in MANY[0] if not held_out(text)]
    ids = [[*encode(tokenizer(), text), eos_id(tokenizer())] for text in texts]
    end_D = np.cumsum([len(document) for document in ids])
    start_D = end_D - [len(document) for document in ids]
    packed = PackedRows(
        TokenView(np.concatenate(ids), start_D, end_D, np.zeros(len(ids), np.int64), ("name",)), SEQ_LEN
    )
    whole = len(packed) - 1
    feed = feed_of(folders[".jsonl"] / "name-00000.jsonl", 1, 1, lanes=1, shuffle=1)
    found = [rows_of(feed.next_step())[0] for _ in range(whole)]
    assert found == rows_of([packed.batch(torch.arange(whole))])


@pytest.mark.parametrize("parts", [2, 3, 4, 7])
@pytest.mark.parametrize("name", [".jsonl.gz", "few"])
def test_parts_together_are_the_whole(folders: dict[str, Path], parts: int, name: str) -> None:
    """Seven parts of four rows: three have nothing to read."""
    alone = feed_of(folders[name])
    feeds = [feed_of(folders[name]) for _ in range(parts)]
    for _ in range(12):
        step = [feed.next_step(part, parts) for part, feed in enumerate(feeds)]
        assert [len(batch.ids_BS) for share in step for batch in share[:1]] == [
            len(rows) for rows in torch.arange(4).tensor_split(parts)
        ]
        assert together(step) == rows_of(alone.next_step())
    progress = json.loads(json.dumps([feed.progress() for feed in feeds]))
    assert all(feed.state_dict(progress) == alone.state_dict() for feed in feeds)


def test_a_part_opens_only_its_own_lanes(folders: dict[str, Path]) -> None:
    feed = feed_of(folders[".jsonl"], lanes=4)
    for _ in range(3):
        feed.next_step(1, 2)
    assert [cursor[0] for cursor in feed.state_dict()["lanes"]] == [0, 0, 6, 6]


@pytest.mark.parametrize(("shards", "lanes"), [(MANY, 3), (FEW, 5)])
def test_an_epoch_holds_every_document_once(tmp_path: Path, shards: list[list[str]], lanes: int) -> None:
    """Rows of one position, so that the cursor before a row says which epoch its token is of."""
    texts, dealt = texts_of(write_shards(tmp_path, shards)), Lanes(len(shards), lanes, seed=5)
    found: list[str] = []
    for number in range(lanes):
        lane, tokens = Lane(number, dealt, texts, tokenizer(), 1, Cursor()), []
        while lane.cursor.epoch == 0:
            tokens += lane.row(lane.cursor.row).id_S1[:1].tolist()
        lane.close()
        assert tokens[-1] == eos_id(tokenizer())
        found += tokenizer().decode(tokens, skip_special_tokens=False).split(EOS)[:-1]
    assert sorted(found) == sorted(text for shard in shards for text in shard if not held_out(text))


schedule = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.booleans()), min_size=1, max_size=5)


@lru_cache
def uninterrupted(name: str) -> list[list[Any]]:
    return slow_steps(FEW if name == "few" else MANY, 20)


@settings(max_examples=25, deadline=None)
@given(schedule=schedule, name=st.sampled_from([".jsonl", ".parquet", "few"]), merged=st.booleans())
def test_resuming_under_any_number_of_parts_goes_on_exactly(
    folders: dict[str, Path], schedule: Any, name: str, merged: bool
) -> None:
    """Sittings of (parts, steps, read ahead); each goes on from the JSON of the last, of all parts or of any one of them."""
    state, found = None, []
    for parts, steps, ahead in schedule:
        feeds = [feed_of(folders[name], prefetch=2 if ahead else 0) for _ in range(parts)]
        if state is not None:
            for feed in feeds:
                feed.load_state_dict(json.loads(json.dumps(state)))
        found += [together([feed.next_step(p, parts) for p, feed in enumerate(feeds)]) for _ in range(steps)]
        progress = [feed.progress() for feed in feeds]
        state = feeds[len(found) % parts].state_dict(progress if merged else ())
        for feed in feeds:
            feed.close()
    assert found == uninterrupted(name)[: len(found)]


def test_reading_ahead_changes_neither_rows_nor_state(folders: dict[str, Path]) -> None:
    plain, ahead = feed_of(folders[".jsonl"]), feed_of(folders[".jsonl"], prefetch=3)
    for _ in range(6):
        assert rows_of(plain.next_step()) == rows_of(ahead.next_step())
        assert plain.state_dict() == ahead.state_dict()
    ahead.close()
    assert rows_of(plain.next_step()) == rows_of(ahead.next_step())  # usable after closing
    ahead.close()


def test_a_feed_may_change_its_part(folders: dict[str, Path]) -> None:
    feed, alone = feed_of(folders[".jsonl"]), feed_of(folders[".jsonl"])
    whole = [rows_of(alone.next_step()) for _ in range(3)]
    assert rows_of(feed.next_step()) == whole[0]
    assert rows_of(feed.next_step(1, 4)) == [whole[1][1], whole[1][5]]
    assert rows_of(feed.next_step()) == whole[2]


def test_no_held_out_document_is_trained_on(folders: dict[str, Path]) -> None:
    feed = feed_of(folders[".jsonl"])
    rows = [row for _ in range(40) for row in rows_of(feed.next_step())]
    text = tokenizer().decode([token for row in rows for token in row[0]])
    kept_back = [text for shard in MANY for text in shard if held_out(text)]
    assert len(kept_back) > 5
    numbers = [" ".join(document.split()[:5]) for document in kept_back]
    trained = [" ".join(document.split()[:5]) for shard in MANY for document in shard if not held_out(document)]
    assert not [number for number in numbers if f"{number} " in f"{text} " and number not in trained]


def test_every_target_is_the_next_token_of_its_document(folders: dict[str, Path]) -> None:
    feed = feed_of(folders[".jsonl"])
    for _ in range(10):
        for ids, targets, owners, labels, valid in rows_of(feed.next_step()):
            assert valid == [True] * SEQ_LEN
            assert labels == [0] * SEQ_LEN
            assert all(t in (IGNORE, i) for t, i in zip(targets[:-1], ids[1:], strict=True))
            assert [t == IGNORE for t in targets[:-1]] == [a != b for a, b in pairwise(owners)]
            assert all((i == eos_id(tokenizer())) == (t == IGNORE) for i, t in zip(ids, targets, strict=True))


# ---- states that cannot be gone on from -------------------------------------------------------------------------


def saved(folder: Path) -> dict[str, Any]:
    feed = feed_of(folder)
    feed.next_step()
    state: dict[str, Any] = json.loads(json.dumps(feed.state_dict()))
    return state


def test_a_changed_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "text", MANY)
    state = saved(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    feed_of(moved).load_state_dict(state)  # a copy elsewhere, with other times, is the same text
    file = moved / "name-00002.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"text": "more"}\n')
    with pytest.raises(
        DataError, match=r"name-00002.jsonl has [\d,]+ bytes, but the checkpoint knows .* with [\d,]+\. Restore"
    ):
        feed_of(moved).load_state_dict(state)
    file.write_text(whole.replace("shard", "chard"))
    with pytest.raises(
        DataError, match=r"name-00002.jsonl is not what the checkpoint knows as .*: its content changed"
    ):
        feed_of(moved).load_state_dict(state)
    file.write_text(whole)
    write_shards(moved, [*MANY, ["one more"]])
    with pytest.raises(DataError, match=r"has 8 shards, but the checkpoint counts 7 \(new: name-00007.jsonl\)"):
        feed_of(moved).load_state_dict(state)
    (moved / "name-00007.jsonl").unlink()
    file.unlink()
    with pytest.raises(DataError, match=r"has 6 shards, but the checkpoint counts 7 \(gone: name-00002.jsonl\)"):
        feed_of(moved).load_state_dict(state)


def test_a_shard_that_changes_or_goes_while_it_is_read(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "text", MANY)
    feed = feed_of(folder)
    feed.next_step()
    for file in folder.iterdir():
        file.write_text(file.read_text() + "\n")
    with pytest.raises(DataError, match=r"changed while the run was reading it \(it had [\d,]+ bytes and now has"):
        [feed.next_step() for _ in range(40)]
    feed = feed_of(folder)
    state = feed.state_dict()
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"name-0000\d.jsonl is not there; restore it"):
        feed.next_step()
    assert feed.state_dict() == state
    write_shards(folder, MANY)
    for file in folder.iterdir():
        file.write_text(file.read_text() + "\n")
    assert rows_of(feed.next_step()) == slow_steps(MANY, 1)[0]  # restored: the same feed goes on


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": True},
        {"steps": "3"},
        {"lanes": None},
        {"lanes": [[0] * 7] * 3},
        {"lanes": [[0] * 7 + [-1]] * 3},
        {"lanes": [[0.0] * 8] * 3},
        {"shards": [["a", 1]]},
        {"shards": [["a", -1, "b"]]},
        {"shards": "abc"},
    ],
)
def test_damaged_states_are_refused(folders: dict[str, Path], change: dict[str, Any]) -> None:
    feed = feed_of(folders[".jsonl"])
    with pytest.raises(CheckpointError, match="is not that of a stream"):
        feed.load_state_dict(feed.state_dict() | change)
    with pytest.raises(CheckpointError, match="is not that of a stream"):
        feed.load_state_dict({"position": 3})  # of text in memory


def test_states_of_other_shapes_are_refused(folders: dict[str, Path]) -> None:
    state = feed_of(folders[".jsonl"]).state_dict()
    with pytest.raises(CheckpointError, match=r"has 3 lanes, but data.lanes and batch_size now make 2"):
        feed_of(folders[".jsonl"], lanes=2).load_state_dict(state)
    state["lanes"][1] = [9, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(CheckpointError, match="lane 1 is ahead of its 0 steps"):
        feed_of(folders[".jsonl"]).load_state_dict(state)


def test_processes_that_disagree_save_nothing(folders: dict[str, Path]) -> None:
    a, b = feed_of(folders[".jsonl"]), feed_of(folders[".jsonl"])
    b.next_step()
    with pytest.raises(DataError, match="different steps of the stream: 0 and 1"):
        a.state_dict([a.progress(), b.progress()])
    with pytest.raises(DataError, match="see different shards; make the same files visible"):
        a.state_dict([a.progress(), feed_of(folders["few"]).progress()])


def test_impossible_feeds_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"batch_size \(0\)"):
        feed_of(folders["few"], batch_size=0)
    with pytest.raises(ConfigError, match="part is 2"):
        feed_of(folders["few"]).next_step(2, 2)
    for change, match in [
        ({"lanes": 0}, "data.lanes must be at least 1, not 0"),
        ({"retries": -1}, "data.retries must be at least 0"),
        ({"label_field": "lang"}, "list all of them in data.labels"),
        ({"labels": ("a",)}, "data.labels is read only with data.stream and data.label_field"),
    ]:
        with pytest.raises(ConfigError, match=match):
            config(folders["few"], **change)  # type: ignore[arg-type]


def test_a_lane_without_documents_says_so(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "text", [[text for text in MANY[0] if not held_out(text)][:1]])
    feed = feed_of(folder, batch_size=3, lanes=3, val_fraction=1e-9)
    assert len(rows_of(feed.next_step())) == 6  # every lane has the one document in some epoch
    with pytest.raises(DataError, match=r"too few documents for 1 lanes: .* none in 100 epochs. Set data.lanes lower"):
        feed_of(folder, lanes=1, val_fraction=1 - 1e-9).next_step()
