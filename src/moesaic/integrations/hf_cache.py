"""moesaic's key/value cache as Hugging Face's ``generate`` handles one: it grows, and its rows can be chosen and repeated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moesaic.errors import MoesaicError
from moesaic.models.decoder import Decoder
from moesaic.nn.cache import KVCache

_ROOM = 128  # positions a growing cache takes at least


class MoesaicCache(Cache):  # type: ignore[misc]
    """Keys, values and what routers remember, of every layer. The decoder appends to ``kv``; empty until the first forward.

    Args:
        max_length: how many positions will be needed in all, where that is known; it grows beyond.
    """

    def __init__(self, max_length: int = 0) -> None:
        super().__init__(layers=[])
        self.kv: KVCache | None = None
        self.max_length = max_length

    def room_for(self, model: Decoder, batch: int, new: int) -> KVCache:
        """The cache inside, with room for ``new`` more positions (as far as the model's context goes)."""
        held = 0 if self.kv is None else self.kv.length
        if self.kv is None or held + new > self.kv.max_len:
            wanted = self.max_length if self.max_length >= held + new else held + new + max(held, _ROOM)
            self.kv = _grown(self.kv, model, batch, max(held + new, min(wanted, model.config.max_seq_len)))
        return self.kv

    def __len__(self) -> int:
        return 0 if self.kv is None else len(self.kv.keys)

    def __repr__(self) -> str:
        return f"MoesaicCache({self.get_seq_length()} positions)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held, padding included."""
        return 0 if self.kv is None else self.kv.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys a forward of ``query_length`` attends to, and where they begin."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """It changes its size."""
        return False

    @property
    def is_croppable(self) -> bool:
        """What routers remember cannot be taken back."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a forward has filled it."""
        return self.kv is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes the old row ``beam_idx[b]`` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.kv is not None:
            rows = torch.arange(len(self.kv.valid_BL), device=self.kv.valid_BL.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        kv = self.kv
        if kv is None:
            return
        batch, rows = len(kv.valid_BL), indices.to(kv.valid_BL.device)
        kv.keys = [keys.index_select(0, rows) for keys in kv.keys]
        kv.values = [values.index_select(0, rows) for values in kv.values]
        kv.valid_BL, kv.position_BL = kv.valid_BL.index_select(0, rows), kv.position_BL.index_select(0, rows)
        kv.held = {layer: held_BL.index_select(0, rows) for layer, held_BL in kv.held.items()}
        for state in kv.router_states.values():
            for name, held in state.items():
                if len(held) != batch:
                    raise MoesaicError(
                        f'A router of this model remembers "{name}" for {len(held)} rows where the batch has {batch}, so rows '
                        "cannot be exchanged: generate with num_beams=1."
                    )
                state[name] = held.index_select(0, rows)

    def reset(self) -> None:
        """Empty it."""
        self.kv = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: see ``is_croppable``."""
        raise MoesaicError("A moesaic cache cannot forget its last positions; generate without an assistant model.")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the decoder appends by itself."""
        raise MoesaicError("A MoesaicCache belongs to moesaic's models; other models need a cache of their own.")


def _grown(old: KVCache | None, model: Decoder, batch: int, max_len: int) -> KVCache:
    new = model.new_cache(batch, max_len)
    if old is None:
        return new
    L = old.length
    for new_tensors, old_tensors in ((new.keys, old.keys), (new.values, old.values)):
        for target, source in zip(new_tensors, old_tensors, strict=True):
            target[:, :, :L] = source[:, :, :L]
    new.valid_BL[:, :L], new.position_BL[:, :L] = old.valid_BL[:, :L], old.position_BL[:, :L]
    for layer, held_BL in old.held.items():
        new.held[layer] = torch.zeros_like(new.valid_BL)
        new.held[layer][:, :L] = held_BL[:, :L]
    new.router_states, new.length, new.has_padding = old.router_states, L, old.has_padding
    return new
