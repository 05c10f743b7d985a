"""What Hugging Face's forward arguments mean for a decoder: padding, packed documents, tasks; and which it cannot follow.

Legend: B batch, S positions of this forward, L positions with those of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.integrations.hf_cache import MoesaicCache

# Arguments that ask for what is there anyway, or that only Hugging Face's own models use.
_NO_MATTER = {
    "cache_position", "is_first_iteration", "output_router_logits", "next_sequence_length", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids",
}  # fmt: skip


@dataclass(frozen=True)
class Extra:
    """Rarer arguments: targets already shifted, the step's number of targets."""

    shift_labels: Tensor | None
    items: Tensor | int | None

    @staticmethod
    def documents(
        ids_BS: Tensor, position_BS: Tensor | None, valid_BS: Tensor | None, cache: MoesaicCache | None
    ) -> Tensor | None:
        """int64 (B, S) document numbers where positions begin again inside a row; raises where they are none we would give."""
        if position_BS is None or (cache is not None and cache.get_seq_length()):
            return None  # with a cache, positions go on from what it holds
        position_BS = position_BS.expand(ids_BS.shape)
        valid = torch.ones_like(ids_BS) if valid_BS is None else valid_BS.long()
        count_BS = valid.cumsum(dim=1) - valid  # tokens before this one
        if bool(((position_BS == count_BS) | (valid == 0)).all()):
            return None
        document_BS = ((position_BS == 0) & (valid == 1)).long().cumsum(dim=1)
        start_BS = torch.where((position_BS == 0) & (valid == 1), count_BS, 0).cummax(dim=1).values
        if not bool(((position_BS == count_BS - start_BS) | (valid == 0)).all()):
            raise ConfigError(
                "position_ids of a moesaic model count the tokens of a document from 0, padding left out; leave them out, and "
                "pass an attention_mask for padding."
            )
        return document_BS


def facts_of(arguments: Mapping[str, Any]) -> Extra:
    """The further keyword arguments of a forward. Raises ``ConfigError`` for those a decoder cannot follow."""
    known = {"shift_labels", "num_items_in_batch"}
    for name, value in arguments.items():
        if name in known or name in _NO_MATTER or value is None or value is False:
            continue
        if name in ("output_hidden_states", "output_attentions"):
            raise ConfigError(f"A moesaic model has no {name}; take them with a forward hook on model.model.blocks.")
        raise ConfigError(f"A moesaic model does not know the argument {name}.")
    return Extra(arguments.get("shift_labels"), arguments.get("num_items_in_batch"))


def valid_tokens(ids_BS: Tensor, mask: Tensor | None, cache: MoesaicCache | None) -> Tensor | None:
    """bool (B, S), False on padding; None where there is none, which keeps attention and routing on their fast paths."""
    if mask is None:
        return None
    B, S = ids_BS.shape
    held = 0 if cache is None else cache.get_seq_length()
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] not in (S, held + S):
        raise ConfigError(
            f"The attention mask is {list(mask.shape)}; a moesaic model reads one of {[B, S]}"
            f"{f' or {[B, held + S]}' if held else ''}, 0 on padding."
        )
    valid_BS = mask[:, -S:].to(device=ids_BS.device, dtype=torch.bool)
    return None if bool(valid_BS.all()) else valid_BS


def task_facts(task: Tensor, ids_BS: Tensor) -> Tensor:
    """int64 (B, S) from one number per row or per token."""
    task = task[:, None] if task.dim() == 1 else task
    if task.dim() != 2 or task.shape[0] != ids_BS.shape[0] or (task.shape[1] != 1 and task.shape[1] < ids_BS.shape[1]):
        raise ConfigError(f"task_ids are {list(task.shape)} for input ids of {list(ids_BS.shape)}; give one per row.")
    return task[:, -ids_BS.shape[1] :].expand(ids_BS.shape).to(ids_BS.device)
