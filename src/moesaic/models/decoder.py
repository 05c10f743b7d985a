"""The decoder: embedding, blocks, final norm, head. Written for one device; everything else is applied from outside.

Legend: B batch, S positions, L keys held, D model width, V vocabulary, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.experts.layer import MoE
from moesaic.models.block import Block
from moesaic.models.config import ModelConfig
from moesaic.models.depth import DepthBlock
from moesaic.models.output import Output
from moesaic.nn.attention import AttentionContext, attention_mask
from moesaic.nn.cache import KVCache
from moesaic.nn.linear import Linear
from moesaic.nn.rope import rope_tables
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing import TokenContext
from moesaic.routing.depth import DepthRouter
from moesaic.routing.dropout import falls_on


class Decoder(nn.Module):
    """A causal language model over the blocks it is given.

    Attributes:
        config: the shape it was built from.
        compute_dtype: dtype of activations; None follows the embedding. Parameters keep their own.
        tokenizer: the tokenizer it was loaded with, or None.
        companions: other files that came with it by name (tokenizer settings, chat templates), to be saved with it.
        source: what a converter noted of the checkpoint it came from, or None; saved and loaded with it.
        aside: tensors that came with it and are no part of it (``checkpoint.aside.Aside``), or None; saved with it.
    """

    def __init__(
        self, config: ModelConfig, embedding: nn.Embedding, blocks: list[Block], norm: nn.Module, head: Linear
    ) -> None:
        super().__init__()
        self.config = config
        self._windows = {config.window(layer) for layer in range(config.num_layers)}
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self._layers = tuple(range(len(blocks)))
        self.norm = norm
        self.head = head
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.compute_dtype: torch.dtype | None = None
        self.tokenizer: Any = None
        self.companions: dict[str, bytes] = {}
        self.source: dict[str, Any] | None = None
        self.aside: Any = None

    def forward(
        self,
        ids_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        task_BS: Tensor | None = None,
        mixture_BSE: Tensor | None = None,
        tenant_BS: Tensor | None = None,
        metadata: Mapping[str, Tensor] | None = None,
        cache: KVCache | None = None,
        generator: torch.Generator | None = None,
        last_only: bool = False,
    ) -> Output:
        """Next-token logits for every position.

        Args:
            ids_BS: int64 vocabulary ids.
            valid_BS: bool, False on padding: never attended to, never routed, in no statistic.
            document_BS: int64; each run of equal numbers is a document: attention never leaves it, positions restart in it.
            task_BS: int64 task or domain ids, for routers and rules that use them; negative means unknown.
            mixture_BSE: fp32 weights over domains per token, where one id is not known for sure (DEMix).
            tenant_BS: int64 tenant ids, for rules and for memories that must not be shared.
            metadata: further int64 (B, S) facts by name, for rules.
            cache: keys and values of earlier positions; this forward appends to it.
            generator: random numbers for noisy routers in training.
            last_only: logits of the last position alone, (B, 1, V): all that generation reads of a prompt. With a large
                vocabulary the logits of a long one take more memory than the model's layers.

        Raises ``MoesaicError`` if the input is longer than ``config.max_seq_len`` or ids are outside the vocabulary, and for a
        model of which only some blocks are held (``keep``).
        """
        if len(self.blocks) != self.config.num_layers:
            raise MoesaicError(
                f"This model holds {len(self.blocks)} of its {self.config.num_layers} blocks, a part of a pipeline; run it "
                "through the pipeline."
            )
        ids_BS, attention, tokens = self.read(
            ids_BS,
            valid_BS=valid_BS,
            document_BS=document_BS,
            task_BS=task_BS,
            mixture_BSE=mixture_BSE,
            tenant_BS=tenant_BS,
            metadata=metadata,
            cache=cache,
            generator=generator,
        )
        x_BSD, plans, depth = self.through(self.embed(ids_BS), attention, tokens)
        if last_only:
            x_BSD = x_BSD[:, -1:]
        return Output(self.predict(x_BSD), plans, cache, depth)

    def read(
        self,
        ids_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        task_BS: Tensor | None = None,
        mixture_BSE: Tensor | None = None,
        tenant_BS: Tensor | None = None,
        metadata: Mapping[str, Tensor] | None = None,
        cache: KVCache | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, AttentionContext, TokenContext]:
        """What all blocks share of a batch, from the arguments of ``forward``: ids with padding at 0, positions and masks, and
        what routers are told. Needs no parameter, so every stage of a pipeline makes it for itself.
        """
        B, S = ids_BS.shape
        if valid_BS is not None:
            ids_BS = torch.where(valid_BS, ids_BS, 0)  # padding may hold any number
        self._check(ids_BS, S, document_BS, cache)
        if document_BS is not None:
            document_BS = _runs(document_BS)
        position_BS = _positions(ids_BS, valid_BS, document_BS, cache)
        attention = self._attention_context(position_BS, valid_BS, document_BS, cache)
        row_BS = torch.arange(B, device=ids_BS.device)[:, None].expand(B, S)
        tokens = TokenContext(
            ids_T=ids_BS.reshape(-1),
            position_T=position_BS.reshape(-1),
            sequence_T=row_BS.reshape(-1),
            num_sequences=B,
            valid_T=None if valid_BS is None else valid_BS.reshape(-1),
            task_T=None if task_BS is None else task_BS.reshape(-1),
            mixture_TE=None if mixture_BSE is None else mixture_BSE.flatten(0, 1),
            tenant_T=None if tenant_BS is None else tenant_BS.reshape(-1),
            metadata={name: fact_BS.reshape(-1) for name, fact_BS in (metadata or {}).items()},
            generator=generator,
            stay_local=self._stays_local(generator),
        )
        return ids_BS, attention, tokens

    def embed(self, ids_BS: Tensor) -> Tensor:
        """(B, S, D) in the activation dtype."""
        return F.embedding(ids_BS, self.embedding.weight).to(self.compute_dtype or self.embedding.weight.dtype)

    def through(
        self, x_BSD: Tensor, attention: AttentionContext, tokens: TokenContext, layers: Container[int] | None = None
    ) -> tuple[Tensor, dict[int, RoutingPlan | SoftPlan], dict[int, RoutingPlan]]:
        """(B, S, D) through the blocks, in their order, and the plans and depth plans of them by layer.

        Args:
            layers: only these of the blocks; None is all that are held.
        """
        plans: dict[int, RoutingPlan | SoftPlan] = {}
        depth: dict[int, RoutingPlan] = {}
        previous: Gate | None = None
        for layer, block in self.layers():
            if layers is not None and layer not in layers:
                continue
            state = None if attention.cache is None else attention.cache.router_states.setdefault(layer, {})
            x_BSD, plan, taken = block(x_BSD, attention, tokens.in_layer(previous, state))
            if plan is not None:
                plans[layer], previous = plan, plan.gate
            if taken is not None:
                depth[layer] = taken
        return x_BSD, plans, depth

    def predict(self, x_BSD: Tensor) -> Tensor:
        """Logits (B, S, V) of what came out of the last block."""
        return self.head(self.norm(x_BSD))

    def layers(self) -> Iterator[tuple[int, Block]]:
        """The blocks that are held, in order, with their index in the whole model."""
        yield from zip(self._layers, self.blocks, strict=True)  # type: ignore[misc]

    def keep(self, layers: Collection[int], *, embedding: bool, head: bool) -> None:
        """Drop all other blocks, and the embedding, or norm and head, where not kept; what stays keeps its name.

        A tied head keeps the embedding it shares its matrix with. Such a model computes in parts (``read``, ``embed``,
        ``through``, ``predict``), never whole.
        """
        for layer in self._layers:
            if layer not in layers:
                delattr(self.blocks, str(layer))  # not ``del blocks[i]``, which would number the rest anew
        self._layers = tuple(layer for layer in self._layers if layer in layers)
        self._windows = {self.config.window(layer) for layer in layers}
        if self.compute_dtype is None:
            self.compute_dtype = self.embedding.weight.dtype  # which a part may not have to look at
        if not head:
            del self.norm, self.head
        if not embedding and not (head and self.config.tie_embeddings):
            del self.embedding

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty key/value cache for ``batch`` rows of up to ``max_len`` positions, padding included."""
        cfg, weight = self.config, self.embedding.weight
        dtype = self.compute_dtype or weight.dtype
        if cfg.latent is not None:  # one vector per token, whatever the number of heads
            width = cfg.latent.kv_rank + cfg.latent.rope_dim
            return KVCache(cfg.num_layers, batch, max_len, 1, width, dtype, weight.device, value_dim=0)
        return KVCache(cfg.num_layers, batch, max_len, cfg.kv_heads, cfg.heads_dim, dtype, weight.device)

    def moe_layers(self) -> dict[int, MoE]:
        """Sparse layers by block index."""
        return {i: block.ffn for i, block in self.layers() if isinstance(block.ffn, MoE)}

    def depth_routers(self) -> dict[int, DepthRouter]:
        """Depth routers of Mixture-of-Depths blocks by block index."""
        return {i: block.depth for i, block in self.layers() if isinstance(block, DepthBlock)}

    def _stays_local(self, generator: torch.Generator | None) -> bool | None:
        """One draw of gating dropout for all layers: only then does a step really go without the exchange."""
        moe = self.config.moe
        if moe is None or not moe.gating_dropout or not self.training:
            return None
        return falls_on(moe.gating_dropout, generator)

    def _attention_context(
        self, position_BS: Tensor, valid_BS: Tensor | None, document_BS: Tensor | None, cache: KVCache | None
    ) -> AttentionContext:
        cfg = self.config
        cos, sin = rope_tables(position_BS, cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling, valid_BS)
        place, key_position_BL, key_valid_BL = None, position_BS, valid_BS
        if cache is not None:
            seen_padding = cache.has_padding or valid_BS is not None
            place = cache.reserve(position_BS, valid_BS)
            key_position_BL = cache.position_BL[:, : cache.length]
            key_valid_BL = cache.valid_BL[:, : cache.length] if seen_padding else None
        masks = {
            window: attention_mask(
                position_BS, key_position_BL, key_valid_BL, query_document_BS=document_BS, window=window
            )
            for window in self._windows
        }
        return AttentionContext(cos, sin, masks, cache, place)

    def _check(self, ids_BS: Tensor, S: int, document_BS: Tensor | None, cache: KVCache | None) -> None:
        held = cache.length if cache is not None else 0
        if held + S > self.config.max_seq_len:
            raise MoesaicError(
                f"The input is {held + S} tokens long, but this model's context is {self.config.max_seq_len}; shorten it."
            )
        # A GPU checks by itself, and asking it here would make every step wait.
        if ids_BS.device.type == "cpu" and ids_BS.numel() and not torch.compiler.is_compiling():
            least, most = map(int, ids_BS.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                raise MoesaicError(
                    f"Token {least if least < 0 else most} is outside this model's vocabulary of {self.config.vocab_size}; "
                    "use the tokenizer the model was trained with."
                )
        if cache is not None and document_BS is not None:
            raise MoesaicError("A cache holds one document per row; pass either cache or document_BS.")


def _runs(document_BS: Tensor) -> Tensor:
    """Documents numbered by run, so that a number used twice in a row of the batch still means two documents."""
    return (document_BS.diff(dim=1, prepend=document_BS[:, :1]) != 0).cumsum(dim=1)


def _positions(ids_BS: Tensor, valid_BS: Tensor | None, document_BS: Tensor | None, cache: KVCache | None) -> Tensor:
    """int64 (B, S): index of each token among the real tokens of its document, so that padding changes nothing."""
    if valid_BS is None:
        before_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand(ids_BS.shape)
    else:
        before_BS = valid_BS.long().cumsum(dim=1) - valid_BS.long()
    if document_BS is not None:
        starts_BS = document_BS.diff(dim=1, prepend=document_BS[:, :1] - 1) != 0
        before_BS = before_BS - torch.where(starts_BS, before_BS, 0).cummax(dim=1).values
    return before_BS if cache is None else before_BS + cache.next_position_B1
