"""The key/value cache of one generation: preallocated tensors per layer, and what each position holds.

Legend: B batch, L positions held, H key/value heads, R head width (of values, where it differs, ``value_dim``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.errors import MoesaicError


class KVCache:
    """Keys and values of every layer. The model appends to it; ``length`` positions are filled.

    Attributes:
        length: positions held, the same for every row (left padding included).
        valid_BL: bool (B, max_len), False on padding.
        position_BL: int64 (B, max_len), rotary position of each held token.
        has_padding: whether any position was ever given as possible padding.
        held: layer -> bool (B, max_len), the positions whose keys a layer holds where it skips some (Mixture-of-Depths); other
            layers hold all, and are not listed.
        router_states: layer -> what its router remembers of earlier positions, by name (routers that look back).
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_len: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        value_dim: int | None = None,
    ) -> None:
        def store(width: int) -> list[Tensor]:
            shape = (batch, num_kv_heads, max_len, width)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

        self.keys, self.values = store(head_dim), store(head_dim if value_dim is None else value_dim)
        self.valid_BL = torch.zeros(batch, max_len, dtype=torch.bool, device=device)
        self.position_BL = torch.zeros(batch, max_len, dtype=torch.int64, device=device)
        self.held: dict[int, Tensor] = {}
        self.router_states: dict[int, dict[str, Tensor]] = {}
        self.length = 0
        self.max_len = max_len
        self.has_padding = False

    @property
    def next_position_B1(self) -> Tensor:
        """int64 (B, 1): rotary position of each row's next real token = real tokens held so far."""
        if not self.has_padding:
            return torch.full((len(self.valid_BL), 1), self.length, device=self.valid_BL.device)
        return self.valid_BL.sum(dim=1, keepdim=True)

    def reserve(self, position_BS: Tensor, valid_BS: Tensor | None) -> slice:
        """Note S new positions and return their place; layers then ``append`` their keys and values there."""
        B, S = position_BS.shape
        if self.valid_BL.shape[0] != B:
            raise MoesaicError(f"The cache holds {self.valid_BL.shape[0]} rows, but the input has {B}.")
        if self.length + S > self.max_len:
            raise MoesaicError(
                f"The cache holds {self.max_len} positions; {self.length} are used and {S} more do not fit: "
                "make it larger with new_cache(batch, max_len)."
            )
        place = slice(self.length, self.length + S)
        self.position_BL[:, place] = position_BS
        self.valid_BL[:, place] = True if valid_BS is None else valid_BS
        self.has_padding |= valid_BS is not None
        self.length += S
        return place

    def hold(self, layer: int, place: slice, chosen_BS: Tensor) -> Tensor:
        """Note which of the new positions a layer takes; returns how many each row held before, int64 (B, 1)."""
        held_BL = self.held.setdefault(layer, torch.zeros_like(self.valid_BL))
        before_B1 = held_BL.sum(dim=1, keepdim=True)
        held_BL[:, place] = chosen_BS
        return before_B1

    def append(
        self, layer: int, place: slice | Tensor, keys_BHSR: Tensor, values_BHSR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all held so far, (B, H, length, R) each.

        ``place`` is what ``reserve`` returned, or the positions themselves, int64 (B, S), where a layer stores only some.
        """
        for store, new_BHSR in ((self.keys[layer], keys_BHSR), (self.values[layer], values_BHSR)):
            if isinstance(place, slice):
                store[:, :, place] = new_BHSR
            else:
                store.scatter_(2, place[:, None, :, None].expand(new_BHSR.shape), new_BHSR.to(store.dtype))
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
