"""Documents -> rows of equal length -> batches, and the order in which rows are drawn.

    rows = PackedRows(train_view, seq_len=256)
    sampler = RowSampler(len(rows), batch_size=16, seed=0)
    batch = rows.batch(sampler.next())          # batch.ids_BS, .targets_BS, .valid_BS, .document_BS, .label_BS

Legend: B rows of a batch, S positions of a row. The documents of a view lie end to end; row r reads tokens
[r*S, r*S + S) and is to predict [r*S + 1, r*S + S + 1). So each token of a document except its first is the target
of exactly one position of one row: nothing predicts the first token of a document, for what came before is another's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.data.split import Ints, TokenView
from moesaic.errors import CheckpointError, ConfigError, DataError

IGNORE = -100  # the target that torch's cross entropy leaves out


@dataclass(frozen=True)
class Batch:
    """B rows of S positions, all (B, S).

    ids_BS: int64 tokens, 0 at padding. targets_BS: int64, the next token of the same document, else ``IGNORE``.
    valid_BS: bool, False at padding, which only the last row has, on its right. document_BS: int64, the documents of
    the row counted from 0; attention stays within equal numbers (padding has a number of its own).
    label_BS: int64 index into the view's ``labels``, -1 at padding.
    """

    ids_BS: Tensor
    targets_BS: Tensor
    valid_BS: Tensor
    document_BS: Tensor
    label_BS: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


class PackedRows:
    """The rows of ``view``; ``len(rows)`` of them, numbered from 0. Nothing is copied until ``batch`` is called.

    Raises ConfigError for a ``seq_len`` below 1, DataError for a view with fewer than two tokens.
    """

    def __init__(self, view: TokenView, seq_len: int) -> None:
        if seq_len < 1:
            raise ConfigError(f"seq_len is {seq_len}, but a row needs at least 1 position.")
        if view.num_tokens < 2:
            raise DataError(f"There are {view.num_tokens} tokens, too few to predict one from another; add text.")
        self.view = view
        self.seq_len = seq_len
        size_D = view.end_D - view.start_D
        self._first_D = np.cumsum(size_D) - size_D  # where each document begins once they lie end to end
        self._total = view.num_tokens

    def __len__(self) -> int:
        return -(-(self._total - 1) // self.seq_len)

    @property
    def labels(self) -> tuple[str, ...]:
        """The domains that ``label_BS`` counts."""
        return self.view.labels

    def batch(self, indices: Tensor) -> Batch:
        """The rows with these numbers ((B,) int64), in this order."""
        row_B = indices.detach().cpu().numpy().astype(np.int64)
        if row_B.size and not (row_B.min() >= 0 and row_B.max() < len(self)):
            raise IndexError(f"row numbers {row_B.min()}..{row_B.max()} of {len(self)} rows")
        place_BS1 = row_B[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        valid_BS1 = place_BS1 < self._total
        place_BS1 = np.minimum(place_BS1, self._total - 1)
        document_BS1 = np.searchsorted(self._first_D, place_BS1, side="right") - 1
        at_BS1 = place_BS1 - self._first_D[document_BS1] + self.view.start_D[document_BS1]
        id_BS1 = np.where(valid_BS1, self.view.tokens[at_BS1].astype(np.int64), 0)

        label_BS = np.where(valid_BS1[:, :-1], self.view.label_D[document_BS1[:, :-1]], -1)
        return pack_batch(id_BS1, document_BS1, label_BS, valid_BS1)


def pack_batch(id_BS1: Ints, document_BS1: Ints, label_BS: Ints, valid_BS1: npt.NDArray[np.bool_]) -> Batch:
    """The batch of rows of S + 1 consecutive tokens each, the last of which is only a target.

    id_BS1: 0 where not valid. document_BS1: a number per document that does not fall along a row. valid_BS1: False at
    padding, on the right of a row. label_BS: as in ``Batch``.
    """
    known_BS = valid_BS1[:, 1:] & (document_BS1[:, 1:] == document_BS1[:, :-1])
    valid_BS = valid_BS1[:, :-1]
    return Batch(
        ids_BS=torch.from_numpy(np.ascontiguousarray(id_BS1[:, :-1])),
        targets_BS=torch.from_numpy(np.where(known_BS, id_BS1[:, 1:], IGNORE)),
        valid_BS=torch.from_numpy(np.ascontiguousarray(valid_BS)),
        document_BS=torch.from_numpy(document_BS1[:, :-1] - document_BS1[:, :1] + ~valid_BS),
        label_BS=torch.from_numpy(label_BS),
    )


class RowSampler:
    """The endless order of rows: each epoch is a fresh permutation, and what comes next depends on (seed, position) only.

    ``batch_size`` counts the rows of all processes together (``data.feed`` divides them). A batch that reaches the end of
    an epoch goes on in the next, so no row is left out, and there may be fewer rows than the batch holds.
    Raises ConfigError for sizes that cannot be.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ConfigError(f"Rows ({num_rows}) and batch_size ({batch_size}) must both be at least 1.")
        self._num_rows = num_rows
        self._batch_size = batch_size
        self._seed = seed
        self._position = 0  # rows drawn so far
        self._epoch_held = -1
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def epoch(self) -> float:
        """How often the whole of the rows has been drawn."""
        return self._position / self._num_rows

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch_held:
            # Hashed, so that neighbouring seeds and epochs share no permutation.
            digest = hashlib.sha256(f"{self._seed}/{epoch}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            self._order = torch.randperm(self._num_rows, generator=generator)
            self._epoch_held = epoch
        return self._order

    def next(self) -> Tensor:
        """The row numbers of the next step, (batch_size,) int64."""
        parts: list[Tensor] = []
        start, missing = self._position, self._batch_size
        while missing:
            epoch, offset = divmod(start, self._num_rows)
            part = self._order_of(epoch)[offset : offset + missing]
            parts.append(part)
            start, missing = start + len(part), missing - len(part)
        self._position += self._batch_size
        return torch.cat(parts)

    def state_dict(self) -> dict[str, int]:
        """All that a resumed run needs beside the constructor's arguments: how many rows have been drawn."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises CheckpointError if it is not a sampler's state."""
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise CheckpointError(f'The sampler\'s "position" is {position!r}, but it must be a number of rows.')
        self._position = position
