"""How often tokens, and pairs of neighbouring tokens, occur in a view: read in blocks from the memory-mapped store.

A view larger than a cap is sampled: as many whole blocks of consecutive tokens as the cap allows, evenly spaced from its
beginning to its end, always the same ones. A pair never spans two documents, nor two blocks (one pair in a million is missed).

Legend: V vocabulary, N tokens of a block, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from moesaic.data.split import Ints, TokenView

BLOCK = 1 << 20
MOST_TOKENS = 256 * BLOCK  # counting is cheap
MOST_PAIRS = 24 * BLOCK  # distinct pairs are held in memory and sorted


def count_tokens(view: TokenView, vocab_size: int, most: int = MOST_TOKENS, block: int = BLOCK) -> Tensor:
    """int64 (V,): occurrences of each token, in a sample of ``most`` tokens if the view holds more."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    for ids_N, _ in _blocks(view, most, block):
        counts_V += np.bincount(ids_N, minlength=vocab_size)
    return torch.from_numpy(counts_V)


def count_pairs(view: TokenView, vocab_size: int, most: int = MOST_PAIRS, block: int = BLOCK) -> Tensor:
    """Sparse int64 (V, V), coalesced: how often token j directly follows token i inside a document; sampled as above."""
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for ids_N, document_N in _blocks(view, most, block):
        inside = document_N[1:] == document_N[:-1]
        key, count = np.unique((ids_N[:-1] * vocab_size + ids_N[1:])[inside], return_counts=True)
        keys, place = np.unique(np.concatenate([keys, key]), return_inverse=True)
        summed = np.zeros(len(keys), dtype=np.int64)
        np.add.at(summed, place, np.concatenate([counts, count]))
        counts = summed
    indices = torch.from_numpy(np.stack([keys // vocab_size, keys % vocab_size]))
    size = (vocab_size, vocab_size)
    return torch.sparse_coo_tensor(indices, torch.from_numpy(counts), size, is_coalesced=True, check_invariants=True)


def _blocks(view: TokenView, most: int, block: int) -> Iterator[tuple[Ints, Ints]]:
    """(ids_N, document_N) of consecutive tokens, as if the documents lay end to end."""
    size_D = view.end_D - view.start_D
    first_D = np.cumsum(size_D) - size_D
    total = view.num_tokens
    number = -(-total // block)
    kept = number if total <= most else max(most // block, 1)
    for index in np.linspace(0, number - 1, kept).round().astype(np.int64):
        place_N = np.arange(index * block, min((index + 1) * block, total))
        document_N = np.searchsorted(first_D, place_N, side="right") - 1
        ids_N = view.tokens[place_N - first_D[document_N] + view.start_D[document_N]]
        yield ids_N.astype(np.int64), document_N
