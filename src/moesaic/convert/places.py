"""Where in our tensors a table's pieces go: boxes, found without reading a number, so that gaps and overlaps are known.

>>> boxes = places(entry, (E, D, 2 * H))             # their name -> a range of ours in every dimension
>>> marks = Marks((E, D, 2 * H), boxes.values())
>>> marks.once, marks.numbers                         # numbers of ours that are filled once, and all there are
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch

from moesaic.convert.pieces import Entry, Piece, Shape

Box = tuple[tuple[int, int], ...]  # first and end, by dimension


def places(entry: Entry, shape: Shape) -> dict[str, Box]:
    """Their name -> the box of ours (of ``shape``) that it fills; pieces of no numbers have none.

    Raises ``RuntimeError`` (a mistake in a family's table) for a part that is no box, or not of the shape of what goes there.
    """
    ours = torch.empty(shape, device="meta")
    found: dict[str, Box] = {}
    for piece in entry.pieces:
        if piece.theirs in found:
            raise RuntimeError(f"{entry.ours} is filled from {piece.theirs} twice")
        box = _box(piece, ours, entry.ours)
        if box is not None:
            found[piece.theirs] = box
    return found


def _box(piece: Piece, ours: torch.Tensor, name: str) -> Box | None:
    part = piece.part(ours)
    coming = piece.turn.here(torch.empty(piece.shape, device="meta")).shape
    if part.shape != coming:  # copying would repeat it
        raise RuntimeError(f"{piece.theirs} has the shape {list(coming)} and its part of {name} {list(part.shape)}")
    if not part.numel():
        return None
    # In contiguous memory, the offset says where a view begins and its strides which dimensions it keeps.
    widths = {stride: size for size, stride in zip(part.shape, part.stride(), strict=True) if size > 1}
    several = sum(size > 1 for size in part.shape)
    at, box, kept = int(part.storage_offset()), [], 0
    for size, stride in zip(ours.shape, ours.stride(), strict=True):
        first, at = divmod(at, stride)
        width = widths.get(stride, 1) if size > 1 else 1
        kept += width > 1
        box.append((first, first + width))
    fits = all(end <= size for (_, end), size in zip(box, ours.shape, strict=True))
    if not fits or kept != several or len(widths) != several:
        raise RuntimeError(f"the part of {name} that {piece.theirs} fills is no box")
    return tuple(box)


def check_table(table: Iterable[Entry], shapes: Mapping[str, Shape]) -> dict[str, Marks]:
    """Our name -> how its numbers are filled, of a table that fills exactly the tensors of ``shapes``, each number once.

    Raises ``RuntimeError`` (a mistake in a family's table) naming the tensor where it does not.
    """
    entries = {entry.ours: entry for entry in table}
    if entries.keys() != shapes.keys():
        raise RuntimeError(f"the table and the model differ in {sorted(entries.keys() ^ shapes.keys())[:5]}")
    found = {}
    for name, shape in shapes.items():
        found[name] = marks = Marks(shape, places(entries[name], shape).values())
        if marks.never or marks.often:
            raise RuntimeError(
                f"of the {marks.numbers} numbers of {name} the pieces leave out {marks.never} and fill {marks.often} more "
                "than once"
            )
    return found


class Marks:
    """How often every number of a tensor is filled, counted over the cells its boxes cut it into.

    Attributes:
        numbers, once, never, often: numbers in all, and those that are filled once, never, and more than once.
    """

    def __init__(self, shape: Shape, boxes: Iterable[Box]) -> None:
        listed = list(boxes)
        self.shape = shape
        cuts = [sorted({0, size, *(edge for box in listed for edge in box[dim])}) for dim, size in enumerate(shape)]
        where = [{edge: i for i, edge in enumerate(edges)} for edges in cuts]
        self._times = torch.zeros([len(edges) - 1 for edges in cuts], dtype=torch.int64)
        self._sizes = torch.ones((), dtype=torch.int64)
        for edges in cuts:
            self._sizes = self._sizes[..., None] * torch.tensor(edges, dtype=torch.int64).diff()
        self._rows = cuts[0] if cuts else [0, 1]
        for box in listed:
            cells = tuple(slice(places[first], places[end]) for places, (first, end) in zip(where, box, strict=True))
            self._times[cells] += 1
        self.numbers = prod(shape)
        self.once, self.never = self._count(self._times == 1), self._count(self._times == 0)
        self.often = self.numbers - self.once - self.never

    def _count(self, cells: torch.Tensor) -> int:
        return int((self._sizes * cells).sum())

    def whole_rows(self) -> list[bool]:
        """For every entry of the first dimension whether each of its numbers is filled once."""
        found: list[bool] = []
        for cell, (first, end) in enumerate(zip(self._rows, self._rows[1:], strict=False)):
            found += [bool((self._times[cell] == 1).all())] * (end - first)
        return found
