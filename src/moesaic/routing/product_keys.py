"""Product keys: the best of E = n^2 experts found with 2n comparisons (Lample et al. 2019; PEER, He 2024).

Expert ``e = i * n + j`` has the score ``q1 . c1[i] + q2 . c2[j]``: the query's halves against two tables of n half-keys. No
expert outside the k best i and the k best j can be among the k best pairs (k others beat it), so the choice among these k^2
candidates is exact, ties to the lowest expert included. Where two different sums round to the same number either may win.

    q = norm(x W_q), one per head;  chosen = top-k of the sums;  weights = softmax over a head's k sums

All heads choose from one pool of experts. Two heads may choose the same one: it then has two rows, whose contributions add.
Plans carry no gate, because (T, E) scores of a million experts are what this router is there to avoid. Community code differs:
lucidrains/PEER-pytorch has separate keys per head (as product-key memories do; ``shared_keys=False``).

Legend: T tokens, D model width, E = n^2 experts, K rows per token = H heads * k each, C key width, G sets of half-keys.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import KeepsFp32, LinearGate, Router, check_k, choose, router_dtype

QueryNorm = Literal["layer", "batch", "none"]


class ProductKeys(Router):
    """Product-key routing for up to millions of experts; made for ``expert_kind="neuron"``.

    Args:
        k: rows per token, all heads together: ``heads`` times the experts each head chooses. PEER: 8 heads of 16, k=128.
        heads: independent queries per token.
        key_dim: C, width of a whole query (two halves).
        query_norm: "layer"; "batch" (PEER and product-key memories: loads spread better, but in training a token's query
            depends on the whole batch; evaluation uses running statistics); "none".
        shared_keys: all heads search the same keys (PEER) or each has its own.
        init_std: of the query projection. Keys start at N(0, 1 / C), so that scores of normalised queries have variance 1.

    Raises ``ConfigError`` unless E is a square, ``heads`` divides k and leaves each head at least 2 (one expert's softmax
    weight is 1 whatever its score, so nothing could be learned).
    """

    facts = Facts(has_gate=False, source="He 2024; Lample et al. 2019")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        heads: int = 1,
        key_dim: int = 128,
        query_norm: QueryNorm = "layer",
        shared_keys: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        one_of("query_norm", query_norm, ("layer", "batch", "none"))
        n = math.isqrt(num_experts)
        if n * n != num_experts:
            raise ConfigError(
                f"Product keys need a square number of experts, not {num_experts}; the nearest are {n**2} and {(n + 1) ** 2}."
            )
        if key_dim < 2 or key_dim % 2:
            raise ConfigError(f"key_dim={key_dim} cannot be split into two halves; choose an even number.")
        if heads < 1 or k % heads:
            raise ConfigError(f"heads={heads} must divide k={k}, the rows of all heads together.")
        if k == heads and num_experts > 1:
            raise ConfigError(
                f"heads={heads} with k={k} leaves each head one expert, whose softmax weight is always 1, so the router gets "
                f"no gradient; choose k of at least {2 * heads}."
            )
        self.num_experts, self.k, self.heads, self.side = num_experts, k, heads, n
        self.queries = LinearGate(dim, heads * key_dim, init_std=init_std)
        self.norm: nn.Module | None = None
        if query_norm == "layer":
            self.norm = nn.LayerNorm(key_dim, dtype=router_dtype())
        if query_norm == "batch":
            self.norm = QueryBatchNorm(heads * key_dim)
            self.facts = replace(
                self.facts,
                causal=False,
                batch_invariant=False,
                infer_causal=True,
                infer_batch_invariant=True,
                inference="other rule",
                inference_rule="queries are normalised by running statistics",
            )
        self.query_norm = query_norm
        keys_GnC = torch.empty(2 if shared_keys else 2 * heads, n, key_dim // 2, dtype=router_dtype())
        self.keys = nn.Parameter(nn.init.normal_(keys_GnC, std=key_dim**-0.5))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each, head by head, a head's best expert first."""
        left_RN, right_RN = self.half_scores(x_TD, ctx)
        expert_RK, score_RK = self._best(left_RN, right_RN, self.k // self.heads, ctx)
        T = x_TD.shape[0]
        return self.plan(expert_RK.reshape(T, self.k), score_RK.softmax(dim=-1).reshape(T, self.k), ctx)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Queries and half-keys: 2 T H C (D + n) FLOPs, growing as the square root of E."""
        heads, C, n = options.get("heads", 1), options.get("key_dim", 128), math.isqrt(E)
        norm = {"layer": 2 * C, "batch": 2 * heads * C, "none": 0}[options.get("query_norm", "layer")]
        sets = 1 if options.get("shared_keys", True) else heads
        flops, parameters = 2 * T * heads * C * (D + n), D * heads * C + sets * n * C + norm
        return Cost(flops, parameters, "sorting 2 sqrt(E) scores and (k / heads)^2 sums per head")

    def half_scores(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        """fp32 scores of both tables, each (T * H, n): those of one token's heads are consecutive rows."""
        T, H, C = x_TD.shape[0], self.heads, 2 * self.keys.shape[2]
        with torch.autocast(x_TD.device.type, enabled=False):
            query_TQ = self.queries(x_TD)
            if isinstance(self.norm, QueryBatchNorm):
                query_TQ = self.norm(query_TQ, ctx.valid_T)
            query_THC = query_TQ.view(T, H, C)
            if isinstance(self.norm, nn.LayerNorm):
                query_THC = self.norm(query_THC)
            # (2, H, T, C/2) to one batch entry per set of half-keys.
            query_GRC = query_THC.view(T, H, 2, C // 2).permute(2, 1, 0, 3)
            query_GRC = query_GRC.reshape(self.keys.shape[0], 2 * H * T // self.keys.shape[0], C // 2)
            score_2HTn = torch.bmm(query_GRC, self.keys.mT).view(2, H, T, self.side)
        left_THn, right_THn = score_2HTn.transpose(1, 2).unbind(0)
        return left_THn.reshape(T * H, self.side), right_THn.reshape(T * H, self.side)

    def _best(self, left_RN: Tensor, right_RN: Tensor, k: int, ctx: TokenContext) -> tuple[Tensor, Tensor]:
        """The k best pairs of each row: expert ids and scores, both (R, k), best first."""
        n = self.side
        if ctx.allowed_TE is not None or ctx.rule_bias_TE is not None:
            return self._best_under_rules(left_RN, right_RN, k, ctx)
        m = min(k, n)
        # In order of index again, so that candidates stand in order of expert and a stable sort breaks ties by it.
        i_RM, j_RM = (choose(half_RN, m).sort(dim=1).values for half_RN in (left_RN, right_RN))
        sum_RC = (left_RN.gather(1, i_RM)[:, :, None] + right_RN.gather(1, j_RM)[:, None, :]).flatten(1)
        expert_RC = (i_RM[:, :, None] * n + j_RM[:, None, :]).flatten(1)
        place_RK = choose(sum_RC, k)
        return expert_RC.gather(1, place_RK), sum_RC.gather(1, place_RK)

    def _best_under_rules(self, left_RN: Tensor, right_RN: Tensor, k: int, ctx: TokenContext) -> tuple[Tensor, Tensor]:
        """All n^2 sums: a permitted expert may lie outside the best of both halves. Rules are (T, E) themselves."""
        sum_RE = (left_RN[:, :, None] + right_RN[:, None, :]).flatten(1)
        allowed_RE = None
        if ctx.rule_bias_TE is not None:
            sum_RE = sum_RE + ctx.rule_bias_TE.to(sum_RE.dtype).repeat_interleave(self.heads, dim=0)
        if ctx.allowed_TE is not None:
            allowed_RE = ctx.allowed_TE.repeat_interleave(self.heads, dim=0)
            forbidden_RE = ~allowed_RE & allowed_RE.any(dim=1, keepdim=True)
            sum_RE = sum_RE.masked_fill(forbidden_RE, float("-inf"))
        expert_RK = choose(sum_RE, k, allowed_RE)
        return expert_RK, sum_RE.gather(1, expert_RK)


class QueryBatchNorm(KeepsFp32):
    """Batch normalisation over the valid tokens in training, by running statistics in evaluation.

    The one buffer of a router that ``forward`` moves, and only in training: the statistics of the queries exist nowhere else.
    Routing is decided once per forward and never recomputed, so nothing is counted twice.
    """

    running_mean_Q: Tensor
    running_var_Q: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width, dtype=router_dtype()))
        self.bias = nn.Parameter(torch.zeros(width, dtype=router_dtype()))
        self.register_buffer("running_mean_Q", torch.zeros(width, dtype=router_dtype()))
        self.register_buffer("running_var_Q", torch.ones(width, dtype=router_dtype()))

    def forward(self, query_TQ: Tensor, valid_T: Tensor | None) -> Tensor:
        """(T, Q) to (T, Q)."""
        if not self.training:
            scale_Q = self.weight * (self.running_var_Q + self.eps).rsqrt()
            return (query_TQ - self.running_mean_Q) * scale_Q + self.bias
        valid_T1 = torch.ones_like(query_TQ[:, :1]) if valid_T is None else valid_T[:, None].to(query_TQ.dtype)
        count = valid_T1.sum()
        mean_Q = (query_TQ * valid_T1).sum(dim=0) / count.clamp(min=1)
        var_Q = ((query_TQ - mean_Q).square() * valid_T1).sum(dim=0) / count.clamp(min=1)
        with torch.no_grad():
            step = self.momentum * (count > 0).to(count.dtype)
            unbiased_Q = var_Q * count / (count - 1).clamp(min=1)
            self.running_mean_Q.lerp_(mean_Q, step)
            self.running_var_Q.lerp_(unbiased_Q, step)
        return (query_TQ - mean_Q) * (var_Q + self.eps).rsqrt() * self.weight + self.bias
