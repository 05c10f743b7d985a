"""What a table uses of a checkpoint and what it fills of a model, counted by places: nothing is taken for granted.

Reading refuses what does not fit before this is asked; counted is all the same what is there, what is read and where it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from moesaic.convert.coverage import Coverage, Share
from moesaic.convert.keys import DROPPED, Keys
from moesaic.convert.pieces import Entry, Shape
from moesaic.convert.places import Marks, places
from moesaic.convert.storage import Stored


def account(
    table: Iterable[Entry],
    shapes: Mapping[str, Shape],
    experts: int,
    stored: Mapping[str, Stored],
    aside: tuple[str, ...],
    repeated: Iterable[str],
    keys: Keys,
) -> Coverage:
    """The coverage of ``stored`` by ``table``.

    Args:
        shapes: the model's tensors, tied ones once. experts: in all its layers.
        aside, repeated: names that are no part of the model, and that hold what another holds as well.
    """
    apart = {*aside, *repeated}
    mine = {name: tensor for name, tensor in stored.items() if name not in apart}
    read: set[str] = set()
    marks = {name: Marks(shape, ()) for name, shape in shapes.items()}
    for entry in table:
        if entry.ours not in shapes:
            continue
        used = [p for p in entry.pieces if p.theirs in mine and mine[p.theirs].shape == p.shape]
        read |= {piece.theirs for piece in used}
        marks[entry.ours] = Marks(
            shapes[entry.ours], places(Entry(entry.ours, tuple(used)), shapes[entry.ours]).values()
        )
    raw = {name for tensor in mine.values() for name in tensor.raw}
    numbers = {name: prod(tensor.shape) for name, tensor in mine.items()}
    wanted = sum(mark.numbers for mark in marks.values())
    return Coverage(
        tensors=Share(len({name for piece in read for name in mine[piece].raw}), len(raw)),
        # Of what is stored or what the model has, whichever is more: a number short on either side shows.
        parameters=Share(sum(mark.once for mark in marks.values()), max(sum(numbers.values()), wanted)),
        bytes=Share(
            sum(numbers[name] * mine[name].dtype.itemsize for name in read),
            sum(count * mine[name].dtype.itemsize for name, count in numbers.items()),
        ),
        experts=Share(_experts_filled(marks), experts),
        config_keys=Share(len({*keys.mapped, *keys.carried, *keys.dropped} & keys.data.keys()), len(keys.data)),
        mapped=tuple(dict.fromkeys(keys.mapped)),
        carried=tuple(keys.carried),
        aside=aside,
        aside_parameters=sum(prod(stored[name].shape) for name in aside),
        repeated=tuple(repeated),
        notes=tuple(f"{name} {DROPPED[name]}: not followed, and left out of what is written" for name in keys.dropped),
    )


def _experts_filled(marks: Mapping[str, Marks]) -> int:
    """Experts each of whose numbers is filled once, in every stack of their layer."""
    layers: dict[str, list[bool]] = {}
    for name, mark in marks.items():
        layer, inside, _ = name.rpartition(".experts.")
        if inside:
            rows = mark.whole_rows()
            before = layers.get(layer, [True] * len(rows))
            layers[layer] = [one and other for one, other in zip(before, rows, strict=True)]
    return sum(map(sum, layers.values()))
