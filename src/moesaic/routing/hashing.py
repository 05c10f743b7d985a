"""Hash layers: a fixed table from token ids to experts instead of a learned gate (Roller, Sukhbaatar, Szlam & Weston 2021).

``e_t = table[id_t]``, weight 1, no parameters, no balancing loss. With k > 1 it is MultiHash: the E experts form k segments of
E/k, each with a hash of its own, and a token takes one expert of every segment. The sum of their outputs is one feed-forward
network whose hidden units come in k parts, each part chosen by its own hash. (The paper also cuts the second matrix, by output
instead of by hidden unit; that reading is from memory and unverified.)

| kind | what is hashed, and how |
|---|---|
| random | the token, at random: under Zipf's law one frequent token loads one expert, so loads are far from equal |
| balanced | the token; greedily, most frequent first, each into the expert lightest so far |
| bigram | the previous token and this one, ``(a[previous] + b[current]) mod E/k`` with random a, b (tabulation hashing) |
| previous | the previous token alone, at random |
| clustered | the token; k-means on embeddings made from the text, similar tokens share an expert; ``even`` fills them equally |
| dispersed | the token; similar tokens (same k-means) are spread over different experts |
| future | the NEXT token, at random: an oracle that sees what is to be predicted. For diagnosis only; it is not causal |

The paper's "position" hash is the router ``round_robin``. The previous token of a document's first one is "none", an entry of
its own (V). Tables are drawn at random with the model's initialisation, a different one for every layer. Those of
"balanced", "clustered" and "dispersed" are replaced by ``fit`` before the first step, the same for every layer; ids that do not
occur in the text keep their random expert (padding never occurs in it). A router that was never fitted routes by its
random table. Tables are buffers, so a checkpoint holds them.

Legend: T tokens, D model width, E experts, K experts per token, V vocabulary, M = E/K experts of a segment, B sequences of S.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import RoutingPlan, at_least_fp32
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import Router, TextStatistics, check_k
from moesaic.routing.tables import balanced_table, dispersed_table, fill_clusters, kmeans, token_embeddings

Kind = Literal["random", "balanced", "bigram", "previous", "clustered", "dispersed", "future"]


class Hash(Router):
    """Routing by a table over token ids.

    Args:
        vocab_size: V; a model fills it in from its own config, a lone layer says it in ``router_options``.
        kind: see the table above.
        even: with "clustered", clusters of nearly equal frequency instead of the nearest centre.
        embedding_dim: width of the embeddings that are clustered.
    """

    facts = Facts(
        balance="by table", has_gate=False, teaches="none", needs=("ids_T",), source="Roller et al. 2021 (Hash layers)"
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        vocab_size: int | None = None,
        kind: Kind = "random",
        even: bool = False,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("kind", kind, get_args(Kind))
        if vocab_size is None or vocab_size < 1:
            raise ConfigError(
                f'Router "hash" needs to know how many token ids there are, not vocab_size={vocab_size}; set router option '
                "vocab_size to the tokenizer's size."
            )
        if num_experts % k:
            raise ConfigError(
                f"MultiHash cuts the experts into k equal segments, but k={k} does not divide num_experts={num_experts}."
            )
        if even and kind != "clustered":
            raise ConfigError(f'even=True is for kind="clustered", not "{kind}"; kind="balanced" is balanced already.')
        if embedding_dim < 1:
            raise ConfigError(f"embedding_dim must be at least 1, not {embedding_dim}.")
        self.num_experts, self.k, self.segment = num_experts, k, num_experts // k
        self.vocab_size, self.kind, self.even, self.embedding_dim = vocab_size, kind, even, embedding_dim
        if kind == "future":
            self.facts = replace(self.facts, causal=False)
        # One entry more than there are ids: V stands for "there is none".
        self.table_KV: Tensor
        self.register_buffer("table_KV", torch.randint(self.segment, (k, vocab_size + 1)))
        self.shift_KV: Tensor | None
        shift_KV = torch.randint(self.segment, (k, vocab_size + 1)) if kind == "bigram" else None
        self.register_buffer("shift_KV", shift_KV)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens by their ids; K rows each, one per segment, weight 1."""
        ids_T = ctx.need("ids_T", "hash")
        if ctx.valid_T is not None:
            ids_T = torch.where(ctx.valid_T, ids_T, self.vocab_size)  # padding may hold any number
        if self.kind == "future":
            ids_T = self._next(ids_T, ctx)
        elif self.kind == "previous":
            ids_T = self._previous(ids_T, ctx)
        expert_KT = self.table_KV[:, ids_T]
        if self.shift_KV is not None:
            expert_KT = (expert_KT + self.shift_KV[:, self._previous(ids_T, ctx)]) % self.segment
        first_K = torch.arange(self.k, device=ids_T.device) * self.segment
        expert_TK = expert_KT.T + first_K
        return self.plan(expert_TK, at_least_fp32(x_TD.new_ones(expert_TK.shape)), ctx)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Nothing but looking up."""
        return Cost(0, 0)

    def fit(self, text: TextStatistics) -> None:
        """Make the tables of "balanced", "clustered" and "dispersed" from the training text.

        Raises ``ConfigError`` if the text has another vocabulary.
        """
        if self.kind not in ("balanced", "clustered", "dispersed"):
            return
        if text.vocab_size != self.vocab_size:
            raise ConfigError(
                f"The text has a vocabulary of {text.vocab_size} and the hash router one of {self.vocab_size}; "
                "leave vocab_size out of the router's options."
            )
        for segment in range(self.k):
            key = (self.kind, self.even, self.embedding_dim, self.segment, segment)
            table_V = text.once(key, partial(self._table, text, segment)).to(self.table_KV.device)
            row_V = self.table_KV[segment, : self.vocab_size]
            row_V.copy_(torch.where(table_V >= 0, table_V, row_V))

    def _table(self, text: TextStatistics, seed: int) -> Tensor:
        """int64 (V,): the local expert of each id, -1 where the text says nothing about it."""
        counts_V = text.counts_V()
        table_V = torch.full((self.vocab_size,), -1)
        if self.kind == "balanced":
            return torch.where(counts_V > 0, balanced_table(counts_V, self.segment, seed), table_V)
        embedding_VD = text.once(
            ("embedding", self.embedding_dim), lambda: token_embeddings(text.pairs_VV(), self.embedding_dim)
        )
        seen = torch.nonzero((embedding_VD != 0).any(dim=1)).flatten()
        x_ND, counts_N = embedding_VD[seen], counts_V[seen]
        label_N, centre_CD = kmeans(x_ND, self.segment, seed)
        if self.kind == "dispersed":
            label_N = dispersed_table(label_N, counts_N, self.segment)
        elif self.even:
            label_N = fill_clusters(x_ND, centre_CD, counts_N)
        table_V[seen] = label_N
        return table_V

    def _previous(self, ids_T: Tensor, ctx: TokenContext) -> Tensor:
        """int64 (T,): the real token before each one in its document, V for a document's first."""
        T = ids_T.shape[0]
        B, S = ctx.shape(T)
        ids_BS, position_BS = ids_T.view(B, S), ctx.positions(T, ids_T.device)
        place_BS = torch.arange(S, device=ids_T.device).expand(B, S)
        if ctx.valid_T is not None:
            place_BS = torch.where(ctx.valid_T.view(B, S), place_BS, -1)
        last_BS = place_BS.cummax(dim=1).values  # the last real token up to here, -1 before the first
        before_BS = F.pad(last_BS, (1, 0), value=-1)[:, :S]
        carried_B1 = torch.full((B, 1), self.vocab_size, device=ids_T.device)
        if ctx.state is not None:
            carried_B1 = ctx.state.get("last_id_B1", carried_B1)
            if S:
                end_B1 = last_BS[:, -1:]
                ctx.state["last_id_B1"] = torch.where(end_B1 >= 0, ids_BS.gather(1, end_B1.clamp(min=0)), carried_B1)
        previous_BS = torch.where(before_BS >= 0, ids_BS.gather(1, before_BS.clamp(min=0)), carried_B1)
        return torch.where(position_BS == 0, self.vocab_size, previous_BS).reshape(-1)

    def _next(self, ids_T: Tensor, ctx: TokenContext) -> Tensor:
        """int64 (T,): the token after each one in its document, V for the last one known."""
        T = ids_T.shape[0]
        B, S = ctx.shape(T)
        follows_BS = ctx.positions(T, ids_T.device) > 0
        if ctx.valid_T is not None:
            follows_BS = follows_BS & ctx.valid_T.view(B, S)
        next_BS = torch.where(follows_BS, ids_T.view(B, S), self.vocab_size)
        return F.pad(next_BS, (0, 1), value=self.vocab_size)[:, 1:].reshape(-1)
