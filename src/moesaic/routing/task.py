"""Routing by something coarser than a token: its task, its sentence, its domain.

| router | decides by | experts |
|---|---|---|
| ``task`` | a learned embedding of the task, read by a top-k gate (Task-MoE, Kudugunta et al. 2021) | k |
| ``sentence`` | a top-k gate on the mean vector of the document ("mean") or of its beginning ("prefix") | k |
| ``demix`` | the domain label itself, one expert each (DEMix, Gururangan et al. 2021) | 1, or the mixture's best k |
| ``constant`` | nothing: all its experts, with trained weights; what is left of ``task`` once the task is fixed | E |

Task and domain ids come per token (``task_T``; training passes the domain label of the text), so a batch may mix them. An id
below 0, or one above those there are, is unknown. Where the caller knows a distribution instead (``mixture_TE``, over tasks or
domains; ``infer/domains.py`` makes one), it stands in for unknown ids; without one, all are equally likely.

Legend: T tokens, D model width, E experts, K experts per token, A tasks or domains, B sequences of S tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan
from moesaic.routing.context import NO_CONTEXT, TokenContext
from moesaic.routing.facts import Cost, Facts
from moesaic.routing.gate import Router, TextStatistics, check_k, choose, router_dtype
from moesaic.routing.token_choice import TopK


class Task(Router):
    """One decision per task and layer: a top-k gate reads a learned embedding of the task instead of the token.

    All tokens of a task use the same k experts, so ``models.extract_task_model`` can cut out a model of those alone.
    An unknown task is read as the expected embedding: of the mixture given, or of all tasks alike.

    Args:
        num_tasks: A; None is one per expert.
        normalize: weights of the chosen: "chosen" sums to 1 (GShard, as in the paper), "none" is the plain softmax.
        unknown: what tokens of an unknown task do without a mixture: "uniform" reads the mean embedding; "fallback" takes the
            experts listed in ``fallback``, equally weighted.
        fallback: k experts for that; one that rules forbid is replaced by the gate's best permitted one.
        init_std: of the gate. The embedding starts at N(0, 1), the scale of a normalised token.
    """

    facts = Facts(needs=("task_T",), losses={"switch": 1e-2}, source="Kudugunta et al. 2021")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        num_tasks: int | None = None,
        normalize: Literal["none", "chosen"] = "chosen",
        unknown: Literal["uniform", "fallback"] = "uniform",
        fallback: list[int] | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        one_of("unknown", unknown, ("uniform", "fallback"))
        self.choice = TopK(dim, num_experts, k, normalize=normalize, init_std=init_std)  # refuses what cannot be
        num_tasks = num_experts if num_tasks is None else num_tasks
        if num_tasks < 1:
            raise ConfigError(f"num_tasks must be at least 1, not {num_tasks}.")
        if (unknown == "fallback") != (fallback is not None):
            raise ConfigError(
                f'unknown="{unknown}" with fallback={fallback}: list k experts in fallback, or leave both out.'
            )
        if fallback is not None and (len(set(fallback)) != k or not set(fallback) <= set(range(num_experts))):
            raise ConfigError(
                f"fallback={fallback} must list k={k} different experts between 0 and {num_experts - 1}: every token has k."
            )
        self.num_experts, self.k, self.num_tasks = num_experts, k, num_tasks
        self.unknown, self.fallback = unknown, fallback
        self.facts = replace(self.facts, teaches=self.choice.facts.teaches)
        self.embedding_AD = nn.Parameter(torch.randn(num_tasks, dim, dtype=router_dtype()))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens by their tasks; the vectors are not read."""
        task_T, mixture_TA = tasks_of(ctx, "task", self.num_tasks)
        known_T1 = (task_T >= 0)[:, None]
        if mixture_TA is None:
            expected_TD = self.embedding_AD.mean(dim=0, keepdim=True)
        else:
            expected_TD = mixture_TA.to(self.embedding_AD.dtype) @ self.embedding_AD
        plan: RoutingPlan = self.choice(torch.where(known_T1, self.embedding_AD[task_T.clamp(min=0)], expected_TD), ctx)
        if self.fallback is None or mixture_TA is not None:
            return plan
        assert plan.gate is not None
        # Probabilities stay below 2, so the listed come first, and where rules forbid one the gate names its substitute.
        first_E = torch.zeros(self.num_experts, device=x_TD.device)
        first_E[self.fallback] = 2.0
        fallback_TK = choose(plan.gate.probs_TE + first_E, self.k, ctx.allowed_TE)
        expert_TK = torch.where(known_T1, plan.expert_TK, fallback_TK)
        return self.plan(expert_TK, torch.where(known_T1, plan.weight_TK, 1 / self.k), ctx, plan.gate)

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """The plain gate and A embeddings."""
        tasks = options.get("num_tasks")
        return Cost(2 * T * D * E, D * E + D * (E if tasks is None else tasks))

    def fit(self, text: TextStatistics) -> None:
        """Raises ``ConfigError`` if the text has more domains than there are tasks."""
        _check_labels(text, self.num_tasks, "task", "num_tasks")

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """As the gate weighs its own choice."""
        return self.choice.weigh(gate, expert_TK)


class Sentence(Router):
    """A top-k gate on a mean of token vectors, so that a text is routed as a whole (Kudugunta et al. 2021, section 3).

    Args:
        pool: "mean": every token of a document is routed by the mean of all its real tokens. It looks at later tokens, so a
            decoder must ask for it by name; in generation it is the mean of what has been read. "prefix": by the mean of
            the document up to and including this token, which is causal.
        normalize, init_std: as in ``TopK``.

    Documents of a packed row are pooled apart; padding is left out.
    """

    facts = Facts(losses={"switch": 1e-2}, source="Kudugunta et al. 2021 (sentence-level routing)")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        pool: Literal["mean", "prefix"] = "prefix",
        normalize: Literal["none", "chosen"] = "chosen",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        one_of("pool", pool, ("mean", "prefix"))
        self.choice = TopK(dim, num_experts, k, normalize=normalize, init_std=init_std)
        self.num_experts, self.k, self.pool = num_experts, k, pool
        self.facts = replace(self.facts, causal=pool == "prefix", teaches=self.choice.facts.teaches)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens by the means of their documents."""
        plan: RoutingPlan = self.choice(self._pooled(x_TD.to(self.choice.gate.weight.dtype), ctx), ctx)
        return plan

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """As the gate weighs its own choice."""
        return self.choice.weigh(gate, expert_TK)

    def _pooled(self, x_TD: Tensor, ctx: TokenContext) -> Tensor:
        """(T, D) means. Sums run over the whole row and are differenced where documents begin."""
        T, D = x_TD.shape
        B, S = ctx.shape(T)
        real_BS1 = x_TD.new_ones(B, S, 1) if ctx.valid_T is None else ctx.valid_T.view(B, S, 1).to(x_TD.dtype)
        # One column more for the count, so that it is differenced and remembered with the sums.
        row_BSX = torch.cat([torch.where(real_BS1 > 0, x_TD.view(B, S, D), 0.0), real_BS1], dim=2)
        document_BS = ctx.documents(T, x_TD.device)
        sums_BSX = row_BSX.cumsum(dim=1)
        place_BS = torch.arange(S, device=x_TD.device).expand(B, S)
        # The place where a token's document begins in this row; -1 where it began in an earlier forward.
        begins_BS = document_BS.diff(dim=1, prepend=torch.zeros_like(document_BS[:, :1])) > 0
        start_BS = torch.where(begins_BS, place_BS, -1).cummax(dim=1).values
        before_BSX = _at(F.pad(sums_BSX, (0, 0, 1, 0)), start_BS.clamp(min=0))
        sums_BSX = sums_BSX - before_BSX
        carried_B1X = None if ctx.state is None else ctx.state.get("sums_B1X")
        if carried_B1X is not None:
            sums_BSX = sums_BSX + torch.where((document_BS == 0)[:, :, None], carried_B1X, 0.0)
        if ctx.state is not None and S:
            ctx.state["sums_B1X"] = sums_BSX[:, -1:].detach()
        if self.pool == "mean" and S:
            # The place where it ends: one before the next beginning.
            next_BS = torch.where(begins_BS, place_BS, S).flip(1).cummin(dim=1).values.flip(1)
            sums_BSX = _at(sums_BSX, F.pad(next_BS, (0, 1), value=S)[:, 1:] - 1)
        return (sums_BSX[:, :, :D] / sums_BSX[:, :, D:].clamp(min=1)).reshape(T, D)


class Demix(Router):
    """A domain's tokens go to the domain's expert: domain d to expert d, with weight 1 (DEMix).

    A token of unknown domain goes to the k most likely domains of ``mixture_TE``, weighted by it (rescaled to sum to 1); k = E
    mixes all. Without a mixture all domains are equally likely, and ties go to the lowest. Every token owns k rows; those of
    a known domain leave all but the first empty. The paper mixes the predictions of E whole models instead, one per forced
    domain: ``infer/domains.py`` does that; mixing inside each layer is one forward.
    """

    facts = Facts(
        experts="1", has_gate=False, teaches="none", needs=("task_T",), source="Gururangan et al. 2021 (DEMix)"
    )

    def __init__(self, dim: int, num_experts: int, k: int = 1) -> None:
        super().__init__()
        check_k(k, num_experts)
        self.num_experts, self.k, self.num_tasks = num_experts, k, num_experts
        if k > 1:
            self.facts = replace(self.facts, experts="1 if the domain is known, else k", varies=True)

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens by their domains; the vectors are not read."""
        task_T, mixture_TE = tasks_of(ctx, "demix", self.num_experts)
        if mixture_TE is None:
            mixture_TE = x_TD.new_ones(len(task_T), self.num_experts)
        mixture_TE = mixture_TE.to(torch.promote_types(x_TD.dtype, torch.float32))
        known_T1 = (task_T >= 0)[:, None]
        expert_TK = choose(mixture_TE, self.k, ctx.allowed_TE)
        weight_TK = mixture_TE.gather(1, expert_TK)
        weight_TK = weight_TK / weight_TK.sum(dim=1, keepdim=True).clamp(min=1e-20)
        first_K = torch.arange(self.k, device=task_T.device) == 0
        alone_TK = torch.where(first_K, task_T[:, None], self.num_experts)
        return self.plan(
            torch.where(known_T1, alone_TK, expert_TK), torch.where(known_T1, first_K.to(weight_TK), weight_TK), ctx
        )

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """Nothing."""
        return Cost(0, 0)

    @property
    def rows_per_token(self) -> float:
        """1: training knows its domains."""
        return 1.0

    def fit(self, text: TextStatistics) -> None:
        """Raises ``ConfigError`` if the text has more domains than there are experts."""
        _check_labels(text, self.num_experts, "demix", "num_experts")


class Constant(Router):
    """Every token uses all E experts (k = E) with the same trained weights, 1/E each to begin with."""

    facts = Facts(
        balance="exact", has_gate=False, teaches="all", source="what task-level routing leaves once extracted"
    )

    def __init__(self, dim: int, num_experts: int, k: int) -> None:
        super().__init__()
        check_k(k, num_experts)
        if k != num_experts:
            raise ConfigError(
                f'Router "constant" uses all its experts, so k must be num_experts={num_experts}, not {k}.'
            )
        self.num_experts, self.k = num_experts, k
        self.weight_E = nn.Parameter(torch.full((num_experts,), 1 / num_experts, dtype=router_dtype()))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Route (T, D) tokens; E rows each, in order."""
        shape = (x_TD.shape[0], self.num_experts)
        return self.plan(
            torch.arange(self.num_experts, device=x_TD.device).expand(shape), self.weight_E.expand(shape), ctx
        )

    @classmethod
    def cost(cls, T: int, D: int, E: int, k: int, **options: Any) -> Cost:
        """E weights."""
        return Cost(0, E)


def tasks_of(ctx: TokenContext, router: str, num_tasks: int) -> tuple[Tensor, Tensor | None]:
    """int64 (T,) task ids, -1 where unknown, and the mixture (T, A) that stands in for those, or None.

    Raises ``ConfigError`` if the caller gave neither ids nor a mixture, or a mixture over another number of tasks.
    """
    mixture_TA = ctx.mixture_TE
    if mixture_TA is not None and mixture_TA.shape[1] != num_tasks:
        raise ConfigError(
            f'Router "{router}" knows {num_tasks} tasks or domains, but the mixture is over {mixture_TA.shape[1]}.'
        )
    if ctx.task_T is None and mixture_TA is not None:
        return torch.full((len(mixture_TA),), -1, device=mixture_TA.device), mixture_TA
    task_T = ctx.need("task_T", router)
    return torch.where(task_T < num_tasks, task_T.clamp(min=-1), -1), mixture_TA


def _at(values_BSX: Tensor, place_BS: Tensor) -> Tensor:
    """(B, S, X): row b's entry at ``place_BS[b, s]``."""
    return values_BSX.gather(1, place_BS[:, :, None].expand(-1, -1, values_BSX.shape[2]))


def _check_labels(text: TextStatistics, room: int, router: str, setting: str) -> None:
    if len(text.labels) > room:
        raise ConfigError(
            f'The text has {len(text.labels)} domains, but {setting}={room} of router "{router}" leaves room for {room}; '
            "raise it, or label the text more coarsely (data.label_by)."
        )
