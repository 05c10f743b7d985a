"""A gate with a memory of earlier decisions: what served vectors like this one before is worth a bonus now.

``z' = z + beta * log q(x)``, where q is the vote of the ``neighbors`` remembered keys most similar to x (cosine), weighted
by ``softmax(similarity / temperature)``, each vote a distribution over experts. Where not even the best similarity reaches
``threshold``, ``z' = z``. Weights are the chosen entries of ``softmax(z')``. No one paper describes this; relatives are
test-time re-routing by neighbours (R2-T2, 2025) and kNN language models (Khandelwal et al. 2020). Defaults are ours.

- q is mixed with a thousandth of the uniform distribution, so that the bonus is bounded: log q >= log(0.001 / E).
- The store is bounded: a ring of ``capacity`` entries per tenant; a new one replaces that tenant's oldest.
- Tenants are apart: a token reads entries of its own tenant only, and writing for one neither moves nor evicts another's. A
  token without a tenant (``TokenContext.tenant_T`` is None) belongs to tenant 0; one outside 0..tenants-1 has no memory.
- ``forward`` only reads. Entries come from ``remember``, and in training from ``observe`` after each optimiser step: up to
  ``writes`` tokens of the last micro-batch that the model predicted better than its mean, evenly spread, with the gate's own
  distribution ``softmax(z)`` (not z': a memory that remembers itself would only grow louder). Where processes hold parts of
  the micro-batch, all remember the same tokens, those of the whole.
- The memory is data, not parameters: no gradient reaches it, buffers keep it in checkpoints, fp32 always.

Legend: T tokens, D model width, E experts, K experts per token, N tenants, M entries each, J neighbours, W tokens
written at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import LinearGate, Outcome, Router, check_k, choose, router_dtype, ruled

UNIFORM_SHARE = 1e-3


class MemoryRouter(Router):
    """Top-k of a gate that a bounded memory of earlier tokens corrects.

    Args:
        capacity: entries kept for each tenant (M).
        tenants: tenants with a memory of their own (N); the store takes ``N * M * (D + E)`` numbers.
        neighbors: remembered keys that vote (at most M).
        beta: strength of the vote, in logits per log-probability.
        threshold: least cosine similarity of the nearest key for the memory to speak at all; -1 always lets it. Hidden states
            lie close together: after 60 steps of a small model nearest keys were at 0.87 to 0.98, so 0.5 shut nobody out.
        temperature: of the vote; small values follow the nearest key alone.
        writes: tokens remembered per optimiser step; 0 leaves writing to ``remember``.
        init_std: of the gate's weights.

    ``gate.extra`` holds, in training and with ``writes``, what ``observe`` reads: "input_TD", "own_probs_TE", "tenant_T".
    """

    facts = Facts(
        teaches="all", reads_loss=True, losses={"switch": 1e-2, "z": 1e-3}, source="no one paper; cf. R2-T2 (2025)"
    )

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        capacity: int = 256,
        tenants: int = 1,
        neighbors: int = 8,
        beta: float = 0.5,
        threshold: float = 0.9,
        temperature: float = 0.1,
        writes: int = 16,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        if min(capacity, tenants, neighbors) < 1 or writes < 0:
            raise ConfigError(
                f"capacity={capacity}, tenants={tenants} and neighbors={neighbors} must be at least 1 and writes={writes} at "
                "least 0."
            )
        if neighbors > capacity:
            raise ConfigError(
                f"neighbors={neighbors} cannot vote when a memory holds capacity={capacity}; lower neighbors."
            )
        if not (math.isfinite(beta) and beta >= 0) or not temperature > 0 or not -1 <= threshold <= 1:
            raise ConfigError(
                f"beta={beta} must be at least 0, temperature={temperature} above 0 and threshold={threshold} between -1 and 1."
            )
        self.num_experts, self.k = num_experts, k
        self.capacity, self.tenants, self.neighbors, self.writes = capacity, tenants, neighbors, writes
        self.beta, self.threshold, self.temperature = beta, threshold, temperature
        self.gate = LinearGate(dim, num_experts, init_std=init_std)
        self.key_NMD: Tensor
        self.vote_NME: Tensor
        self.written_N: Tensor  # entries ever written for a tenant: the next goes to this number modulo M
        self.register_buffer("key_NMD", torch.zeros(tenants, capacity, dim, dtype=router_dtype()))
        self.register_buffer("vote_NME", torch.zeros(tenants, capacity, num_experts, dtype=router_dtype()))
        self.register_buffer("written_N", torch.zeros(tenants, dtype=torch.int64))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; K rows each."""
        own_TE = self.gate(x_TD)
        tenant_T = ctx.tenant_T
        if tenant_T is None:
            tenant_T = torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device)
        logits_TE = ruled(own_TE + self.beta * self.recall(x_TD, tenant_T), ctx)
        extra = {}
        if self.training and self.writes:
            extra = {"input_TD": x_TD.detach(), "own_probs_TE": own_TE.detach().softmax(dim=-1), "tenant_T": tenant_T}
        gate = Gate(logits_TE, logits_TE.softmax(dim=-1), extra=extra)
        expert_TK = choose(gate.probs_TE, self.k, ctx.allowed_TE)
        return self.plan(expert_TK, self.weigh(gate, expert_TK), ctx, gate)

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """The chosen probabilities, not renormalised."""
        return gate.probs_TE.gather(1, expert_TK)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The gate, and the similarity of every token to every key of every tenant, empty entries included."""
        entries = options.get("capacity", 256) * options.get("tenants", 1)
        return Cost(2 * T * D * (E + entries), D * E, "sorting T * capacity similarities")

    @torch.no_grad()
    def recall(self, x_TD: Tensor, tenant_T: Tensor) -> Tensor:
        """fp32 (T, E): ``log q(x)`` from the tenant's own entries; 0 where the memory has nothing similar enough."""
        N, M, D = self.key_NMD.shape
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = F.normalize(x_TD.to(self.key_NMD.dtype), dim=1)
            similarity_TNM = F.linear(x_TD, self.key_NMD.view(N * M, D)).view(len(x_TD), N, M)
        known_T = (tenant_T >= 0) & (tenant_T < N)
        home_T = torch.where(known_T, tenant_T, 0)
        similarity_TM = similarity_TNM[torch.arange(len(x_TD), device=x_TD.device), home_T]
        # Where they stand and how many others there are must not matter: whoever is not there has no say, not a small one.
        there_TM = (torch.arange(M, device=x_TD.device) < self.written_N[home_T, None]) & known_T[:, None]
        similarity_TM = similarity_TM.masked_fill(~there_TM, float("-inf"))
        nearest_TJ = choose(similarity_TM, self.neighbors)
        similarity_TJ = similarity_TM.gather(1, nearest_TJ)
        heard_T = similarity_TJ[:, 0] >= self.threshold  # -inf never is
        share_TJ = torch.where(heard_T[:, None], similarity_TJ / self.temperature, 0.0).softmax(dim=1)
        vote_TE = (share_TJ[:, :, None] * self.vote_NME[home_T[:, None], nearest_TJ]).sum(dim=1)
        vote_TE = (1 - UNIFORM_SHARE) * vote_TE + UNIFORM_SHARE / self.num_experts
        return torch.where(heard_T[:, None], vote_TE.log(), 0.0)

    @torch.no_grad()
    def remember(self, x_TD: Tensor, distribution_TE: Tensor, tenant_T: Tensor | None = None) -> None:
        """Write entries: router inputs and the distribution over experts that served each best. Not during a forward.

        Of more than ``capacity`` entries for one tenant the last stay. Raises ``ConfigError`` for a tenant without a memory and
        for rows that are no distribution.
        """
        N, M, _ = self.key_NMD.shape
        T, device = len(x_TD), self.key_NMD.device
        tenant_T = torch.zeros(T, dtype=torch.int64) if tenant_T is None else tenant_T
        x_TD, tenant_T = x_TD.to(self.key_NMD), tenant_T.to(device)
        distribution_TE = distribution_TE.to(self.vote_NME)
        least, most = (int(tenant_T.min()), int(tenant_T.max())) if T else (0, 0)
        if least < 0 or most >= N:
            raise ConfigError(
                f"This memory serves tenants 0 to {N - 1}, not {least} to {most}; raise the option tenants."
            )
        if not bool(((distribution_TE >= 0).all(dim=1) & ((distribution_TE.sum(dim=1) - 1).abs() < 1e-3)).all()):
            raise ConfigError(
                "Each remembered row needs a distribution over the experts: nothing negative, summing to 1."
            )
        mine_TN = F.one_hot(tenant_T, N)
        count_N = mine_TN.sum(dim=0)
        nth_T = mine_TN.cumsum(dim=0).gather(1, tenant_T[:, None])[:, 0] - 1  # of this tenant's entries in this call
        stays_T = nth_T >= (count_N - M)[tenant_T]
        home_T = tenant_T[stays_T]
        slot_T = (self.written_N[home_T] + nth_T[stays_T]) % M
        self.key_NMD[home_T, slot_T] = F.normalize(x_TD[stays_T], dim=1)
        self.vote_NME[home_T, slot_T] = distribution_TE[stays_T]
        self.written_N += count_N

    @torch.no_grad()
    def forget(self, tenant: int) -> None:
        """Erase all that is remembered for a tenant."""
        if not 0 <= tenant < self.tenants:
            raise ConfigError(f"This memory serves tenants 0 to {self.tenants - 1}, not {tenant}.")
        for buffer in (self.key_NMD, self.vote_NME, self.written_N):
            buffer[tenant] = 0

    @torch.no_grad()
    def observe(self, plan: RoutingPlan | SoftPlan, outcome: Outcome) -> None:
        """Remember up to ``writes`` tokens of the micro-batch, predicted better than the mean of those with a target."""
        if plan.gate is None or "own_probs_TE" not in plan.gate.extra:
            return
        extra, peers = plan.gate.extra, outcome.peers
        tenant_T, loss_T = extra["tenant_T"], outcome.token_loss_T
        judged_T = loss_T > 0
        mean = peers.total(loss_T.sum()) / peers.total(judged_T.sum()).clamp(min=1)
        good_T = judged_T & (loss_T < mean) & (tenant_T >= 0) & (tenant_T < self.tenants)
        if plan.valid_T is not None:
            good_T = good_T & plan.valid_T
        tokens = good_T.nonzero()[:, 0]
        of_parts: list[int] = peers.each(torch.tensor(len(tokens), device=tokens.device)).tolist()
        number, before = sum(of_parts), sum(of_parts[: peers.index])
        writes = min(number, self.writes)
        if not writes:
            return
        place_W = torch.arange(writes, device=tokens.device) * number // writes - before
        here_W = (place_W >= 0) & (place_W < len(tokens))
        tokens = tokens[place_W[here_W]]
        entries = []
        for values in (extra["input_TD"], extra["own_probs_TE"], tenant_T):
            written = values.new_zeros(writes, *values.shape[1:])
            written[here_W] = values[tokens]
            entries.append(peers.total(written))
        self.remember(*entries)
