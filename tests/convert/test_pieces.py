"""Pieces: reorderings that undo each other, places that neither overlap nor leave gaps, bits that survive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.checkpoint.native import tied_names
from moesaic.convert.families import FAMILIES
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import (
    ALTERNATING,
    SAME,
    TRANSPOSED,
    Entry,
    Piece,
    Turn,
    extract,
    fill,
    rope_pairs,
)
from moesaic.convert.places import Marks, check_table, places
from moesaic.models.build import build_model
from tests.convert.configs import CONFIGS

sizes = st.integers(1, 5)
Part = Callable[[torch.Tensor], torch.Tensor]


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape)


@given(
    turn=st.sampled_from([SAME, TRANSPOSED, ALTERNATING]), before=st.lists(sizes, min_size=1, max_size=2), half=sizes
)
def test_here_and_there_undo_each_other(turn: Turn, before: list[int], half: int) -> None:
    theirs = numbered(*before, 2 * half)
    assert torch.equal(turn.there(turn.here(theirs)), theirs)
    assert torch.equal(turn.here(turn.there(theirs)), theirs)


@given(heads=sizes, before=st.integers(0, 4), half=sizes, rest=st.lists(sizes, max_size=1))
def test_rope_pairs_undo_each_other(heads: int, before: int, half: int, rest: list[int]) -> None:
    turn, theirs = rope_pairs(heads, before, 2 * half), numbered(heads * (before + 2 * half), *rest)
    assert torch.equal(turn.there(turn.here(theirs)), theirs)
    assert torch.equal(turn.here(turn.there(theirs)), theirs)


def test_alternating_by_hand() -> None:
    assert ALTERNATING.here(torch.tensor([[0, 10, 1, 11, 2, 12]])).tolist() == [[0, 1, 2, 10, 11, 12]]


def test_rope_pairs_by_hand() -> None:
    """Two heads of one plain and four turned rows: neighbours 0, 1 end two apart, within their head."""
    theirs = torch.tensor([100, 0, 1, 2, 3, 200, 10, 11, 12, 13])
    assert rope_pairs(2, 1, 4).here(theirs).tolist() == [100, 0, 2, 1, 3, 200, 10, 12, 11, 13]


def test_fill_goes_to_its_part_alone_and_takes_our_dtype() -> None:
    ours = torch.zeros(2, 3, dtype=torch.float32)
    piece = Piece("t", (3, 1), lambda w: w[1:2], TRANSPOSED)
    fill(ours, piece, torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16))
    assert ours.tolist() == [[0, 0, 0], [1, 2, 3]]


def test_extract_is_of_their_shape_and_alone_in_its_memory() -> None:
    """A view would have the whole stack written for every expert."""
    ours = numbered(4, 3, 2).float()
    out = extract(ours, Piece("t", (2, 3), lambda w: w[2], TRANSPOSED))
    assert out.is_contiguous()
    assert torch.equal(out, ours[2].T)
    assert out.untyped_storage().nbytes() == out.nbytes


def test_a_table_that_is_no_match_is_a_mistake_in_the_table() -> None:
    table = [Entry("a", (Piece("x", (2, 3)),))]
    check_table(table, {"a": (2, 3)})
    with pytest.raises(RuntimeError, match=r"\['b'\]"):
        check_table(table, {"a": (2, 3), "b": (1,)})
    with pytest.raises(RuntimeError, match="its part of a"):  # as many numbers, of another shape
        check_table(table, {"a": (3, 2)})
    with pytest.raises(RuntimeError, match=r"x has the shape \[2, 3\] and its part of a \[7\]"):
        check_table(table, {"a": (7,)})


GATE, UP = (lambda w: w[..., :3]), (lambda w: w[..., 3:])


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((GATE, GATE), "of the 12 numbers of a the pieces leave out 6 and fill 6 more than once"),
        ((GATE, lambda w: w[..., 2:5]), "leave out 2 and fill 2 more"),
        ((GATE,), "leave out 6 and fill 0 more"),
        ((GATE, UP, lambda w: w[1:, 3:]), "leave out 0 and fill 3 more"),
        ((lambda w: w[..., ::2], lambda w: w[..., 1::2]), "the part of a that x0 fills is no box"),
        ((lambda w: w.flatten()[:6].view(2, 3), UP), "the part of a that x0 fills is no box"),
        ((GATE, lambda w: w[:1, 3:].expand(2, 3)), "the part of a that x1 fills is no box"),
    ],
    ids=["twice", "overlap", "gap", "further", "steps", "across rows", "repeated"],
)
def test_places_that_overlap_or_leave_a_gap_are_refused_by_name(parts: tuple[Part, ...], words: str) -> None:
    """As many numbers as there are is not enough: the gate half filled twice leaves memory of nobody in the other."""
    shapes = [tuple(part(torch.empty(2, 6, device="meta")).shape) for part in parts]
    pieces = tuple(Piece(f"x{i}", shape, part) for i, (shape, part) in enumerate(zip(shapes, parts, strict=True)))
    with pytest.raises(RuntimeError, match=words):
        check_table([Entry("a", pieces)], {"a": (2, 6)})


def test_one_of_theirs_fills_one_place() -> None:
    twice = Entry("a", (Piece("x", (2, 3), GATE), Piece("x", (2, 3), UP)))
    with pytest.raises(RuntimeError, match="a is filled from x twice"):
        check_table([twice], {"a": (2, 6)})


@given(shape=st.lists(sizes, min_size=1, max_size=3), data=st.data())
def test_marks_count_as_painting_does(shape: list[int], data: st.DataObject) -> None:
    painted = torch.zeros(shape, dtype=torch.int64)
    pieces = []
    for i in range(data.draw(st.integers(0, 4))):
        cuts = []
        for size in shape:
            first = data.draw(st.integers(0, size))
            cuts.append(slice(first, data.draw(st.integers(first, size))))
        part = painted[tuple(cuts)]
        part += 1
        pieces.append(Piece(f"x{i}", tuple(part.shape), lambda w, cuts=tuple(cuts): w[cuts]))  # type: ignore[misc]
    marks = Marks(tuple(shape), places(Entry("a", tuple(pieces)), tuple(shape)).values())
    counts = [int((painted == times).sum()) for times in (0, 1)]
    assert (marks.never, marks.once, marks.often) == (*counts, painted.numel() - sum(counts))
    assert marks.whole_rows() == [bool((row == 1).all()) for row in painted]


@pytest.mark.parametrize(("family", "variant"), [(f, v) for f, variants in CONFIGS.items() for v in variants])
def test_every_number_has_one_place(family: str, variant: str) -> None:
    """Over all pieces: every number of ours is filled once, and every number of theirs comes back from where it went."""
    known = FAMILIES[family]
    keys = Keys(CONFIGS[family][variant], family)
    config = known.read(keys)
    model = build_model(config, device="meta")
    state, names = model.state_dict(), [tied[0] for tied in tied_names(model)]
    for layout in known.layouts:
        table = known.table(config, layout, keys.carried)
        check_table(table, {name: tuple(state[name].shape) for name in names})
        pieces = [piece.theirs for entry in table for piece in entry.pieces]
        assert len(pieces) == len(set(pieces))
        for entry in table:
            ours, marks = (torch.zeros(state[entry.ours].shape, dtype=torch.float64) for _ in range(2))
            theirs, used = {}, 1
            for piece in entry.pieces:
                count = torch.Size(piece.shape).numel()
                theirs[piece.theirs] = torch.arange(used, used + count, dtype=torch.float64).view(piece.shape)
                used += count
                part = piece.part(marks)
                part += 1
                fill(ours, piece, theirs[piece.theirs])
            assert torch.equal(marks, torch.ones_like(marks)), entry.ours
            assert torch.equal(ours.flatten().sort().values, torch.arange(1, used, dtype=torch.float64)), entry.ours
            for piece in entry.pieces:
                assert torch.equal(extract(ours, piece), theirs[piece.theirs]), piece.theirs
