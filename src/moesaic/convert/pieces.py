"""How the tensors of a foreign checkpoint fill ours, in a form that works both ways.

A table is a list of ``Entry``: one of our tensors and the ``Piece``s that fill it without overlap or gap. A piece is one of
their tensors: ``part`` picks the view of ours that it fills, ``turn`` says how its elements are reordered on the way. Nothing
is ever computed, so a tensor that went there and back is the same bits.

>>> gate = Piece("mlp.experts.3.gate_proj.weight", (H, D), lambda w: w[3, :, :H], TRANSPOSED)
>>> fill(ours, gate, theirs); theirs = extract(ours, gate)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """A reordering of elements: ``here`` makes our part of their tensor, ``there`` is its inverse."""

    here: Callable[[Tensor], Tensor]
    there: Callable[[Tensor], Tensor]


SAME = Turn(lambda t: t, lambda t: t)
TRANSPOSED = Turn(lambda t: t.transpose(-1, -2), lambda t: t.transpose(-1, -2))
# gpt-oss: gate and up take turns in the last dimension; ours stand side by side.
ALTERNATING = Turn(
    lambda t: t.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2),
    lambda t: t.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
)


def rope_pairs(heads: int, before: int, rope: int) -> Turn:
    """Rows of ``heads`` times (``before`` + ``rope``): in theirs the two numbers that turn together are neighbours, in ours
    they are half of ``rope`` apart.
    """

    def turn(t: Tensor, here: bool) -> Tensor:
        rows = t.unflatten(0, (heads, before + rope))
        plain, turned = rows[:, :before], rows[:, before:]
        turned = turned.unflatten(1, (-1, 2) if here else (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([plain, turned], dim=1).flatten(0, 1)

    return Turn(lambda t: turn(t, True), lambda t: turn(t, False))


def whole(ours: Tensor) -> Tensor:
    """The part that is all of it."""
    return ours


@dataclass(frozen=True)
class Piece:
    """One of their tensors: its name and shape, the view of ours it fills, and how it is reordered."""

    theirs: str
    shape: Shape
    part: Callable[[Tensor], Tensor] = whole
    turn: Turn = SAME


@dataclass(frozen=True)
class Entry:
    """One of our tensors and what fills it."""

    ours: str
    pieces: tuple[Piece, ...]


def fill(ours: Tensor, piece: Piece, theirs: Tensor) -> None:
    """Copy their tensor to its place in ours, in our dtype."""
    piece.part(ours).copy_(piece.turn.here(theirs))


def extract(ours: Tensor, piece: Piece) -> Tensor:
    """Their tensor out of ours: contiguous, memory of its own unless it is all of ours."""
    return piece.turn.there(piece.part(ours)).contiguous().view(piece.shape)
