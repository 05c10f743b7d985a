"""Prototype loss: tokens of one expert should look alike and unlike those of others. (Not ST-MoE's, whatever texts say.)

1. a_t = argmax_e p_te, ties to the lowest; A_e = the valid tokens with a_t = e.
2. mu_e = mean of v_t over the M tokens of A_e with the largest p_te (all if fewer); from the batch, or an EMA.
3. sim(v, mu) = cos(v, mu) / tau, or their product ("dot", unbounded).
4. loss = -mean over valid tokens of log softmax over the experts alive of sim(v_t, mu) at a_t.

An expert without tokens and without a remembered prototype is not alive: it is left out of the denominator. With fewer than
two alive the loss is 0.

What v is ("space"): "input", the router's input: gradient reaches the layers below and not the router, which argmax cuts off.
"logits", the gate's logits. "router_proj", the router's projection x W_r as it was before rules and noise touched it (for a
plain gate without either, the same). The last two teach the router too.

Unpublished defaults: M = 64, tau = 0.1, coefficient 1e-3. Prototypes are those of the micro-batch, of all its parts (which show
each other the scores of their M likeliest tokens per expert); the EMA follows sums over the whole step.

Legend: T tokens, E experts, V width of the space, P parts of the micro-batch, M as above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.peers import ALONE, Peers
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.routing.balance.context import PLAIN, LossContext, evidence, gate_of, masked, mean_over
from moesaic.routing.gate import KeepsFp32, StepStats, choose, router_dtype

Space = Literal["input", "logits", "router_proj"]
_SUMS, _COUNTS, _MEMORY, _KNOWN = "prototype_sums_EV", "prototype_counts_E", "prototype_EV", "prototype_known_E"


def prototype_loss(
    plan: RoutingPlan | SoftPlan,
    ctx: LossContext = PLAIN,
    *,
    space: Space = "input",
    most: int = 64,
    tau: float = 0.1,
    similarity: Literal["cosine", "dot"] = "cosine",
    detach: bool = True,
    ema: float | None = None,
    leave_one_out: bool = False,
    warmup: int = 1000,
) -> Tensor:
    """The loss above.

    Args:
        most: M.
        detach: prototypes carry no gradient.
        ema: rho of ``mu <- rho * mu + (1 - rho) * mu_batch``, 0.99 usual; the sparse layer remembers mu between steps.
        leave_one_out: a token is compared with the prototype of its expert without itself, which small M otherwise flatters;
            a token that is all of its expert's prototype is left out of the mean.
        warmup: the loss fades in linearly over this many steps, while experts have no prototype worth the name; 0: at once.
    """
    faded = 1.0 if ctx.step is None or ctx.step >= warmup else ctx.step / warmup
    vector_TV = masked(vectors(plan, space), plan.valid_T)
    home_TE, top_TE = members(plan, most, ctx.peers)
    counts_E = ctx.peers.total(top_TE.sum(dim=0))
    # Every part compares its tokens with these, so a token in a prototype matters to all parts.
    sums_EV = ctx.peers.pooled(top_TE.T @ (vector_TV.detach() if detach else vector_TV))
    alive_E = counts_E > 0
    mean_EV = sums_EV / counts_E.clamp(min=1)[:, None]
    share_E1 = torch.ones_like(counts_E)[:, None]  # how much of mu is the batch
    remembered_EV = torch.zeros_like(mean_EV)
    if ema is not None and _MEMORY in gate_of(plan).extra:
        remembered_EV, known_E = gate_of(plan).extra[_MEMORY], gate_of(plan).extra[_KNOWN]
        share_E1 = torch.where(known_E, torch.where(alive_E, 1 - ema, 0.0), 1.0)[:, None].to(mean_EV.dtype)
        alive_E = alive_E | known_E
    mu_EV = (1 - share_E1) * remembered_EV + share_E1 * mean_EV
    sim_TE = _similarity(vector_TV, mu_EV, similarity) / tau
    counted_T = torch.ones(plan.num_tokens, dtype=torch.bool, device=alive_E.device)
    if plan.valid_T is not None:
        counted_T = plan.valid_T
    if leave_one_out:
        own_T = (home_TE * top_TE).sum(dim=1)  # 1 where the token is in its expert's prototype
        others_T = home_TE @ counts_E - own_T
        self_TV = vector_TV.detach() if detach else vector_TV
        apart_TV = (home_TE @ sums_EV - own_T[:, None] * self_TV) / others_T.clamp(min=1)[:, None]
        # Without other tokens only what is remembered is left of the prototype.
        share_T1 = torch.where((others_T > 0)[:, None], home_TE @ share_E1, 0.0)
        mine_TV = home_TE @ remembered_EV * (1 - share_T1) + share_T1 * apart_TV
        mine_T = _paired(vector_TV, mine_TV, similarity) / tau
        sim_TE = torch.where(home_TE > 0, mine_T[:, None], sim_TE)
        counted_T = counted_T & ((others_T > 0) | (home_TE @ (share_E1[:, 0] < 1).to(home_TE.dtype) > 0))
    sim_TE = sim_TE.masked_fill(~alive_E, -1e30)  # not -inf: with none alive a row must stay finite
    loss_T = -(sim_TE.log_softmax(dim=1) * home_TE).sum(dim=1)
    return faded * torch.where(alive_E.sum() >= 2, mean_over(loss_T, counted_T, ctx.peers), 0.0)


def vectors(plan: RoutingPlan | SoftPlan, space: Space) -> Tensor:
    """(T, V) at least fp32: what is compared."""
    gate = gate_of(plan)
    if space == "input":
        return evidence(plan, "input_TD", "prototype").to(gate.logits_TE.dtype)
    if space == "router_proj":
        return evidence(plan, "free_logits_TE", "prototype")
    return torch.where(gate.logits_TE.isfinite(), gate.logits_TE, 0.0)  # rules put -inf on forbidden experts


def members(plan: RoutingPlan | SoftPlan, most: int, peers: Peers = ALONE) -> tuple[Tensor, Tensor]:
    """(T, E) each, 1 or 0: a token's argmax expert; and whether it is among that expert's ``most`` likeliest in all parts."""
    probs_TE = gate_of(plan).probs_TE.detach()
    home_T1 = choose(probs_TE, 1)
    home_TE = torch.zeros_like(probs_TE).scatter_(1, home_T1, 1.0)
    if plan.valid_T is not None:
        home_TE = home_TE * plan.valid_T[:, None]
    score_TE = torch.where(home_TE > 0, probs_TE, -1.0)
    sorted_TE, order_TE = torch.sort(score_TE, dim=0, descending=True, stable=True)
    seat_TE = torch.arange(plan.num_tokens, device=order_TE.device)[:, None].expand_as(order_TE)
    if peers.count > 1:
        seat_TE = seat_TE.clone()
        seat_TE[:most] += _ahead(sorted_TE, most, peers).T[: plan.num_tokens]
    place_TE = torch.empty_like(order_TE)
    place_TE.scatter_(0, order_TE, seat_TE)
    return home_TE, home_TE * (place_TE < most)


def _ahead(sorted_TE: Tensor, most: int, peers: Peers) -> Tensor:
    """int64 (E, M): members of other parts that come before our M best, M of each part at the most.

    Ties go to the earlier part, as they go to the earlier token where one process sorts them all.
    """
    best_EM = F.pad(sorted_TE[:most].T, (0, max(most - len(sorted_TE), 0)), value=-1.0)  # as those who are no members
    best_PEM = peers.each(best_EM)
    rising_PEM, ours_PEM = best_PEM.flip(2), best_EM.expand_as(best_PEM).contiguous()
    below_PEM = torch.searchsorted(rising_PEM, ours_PEM)
    up_to_PEM = torch.searchsorted(rising_PEM, ours_PEM, right=True)
    part_P11 = torch.arange(peers.count, device=best_EM.device)[:, None, None]
    ahead_PEM = most - torch.where(part_P11 < peers.index, below_PEM, up_to_PEM)
    return ahead_PEM.masked_fill(part_P11 == peers.index, 0).sum(dim=0)


def _similarity(a_TV: Tensor, b_EV: Tensor, kind: str) -> Tensor:
    if kind == "dot":
        return a_TV @ b_EV.T
    return _unit(a_TV) @ _unit(b_EV).T


def _paired(a_TV: Tensor, b_TV: Tensor, kind: str) -> Tensor:
    if kind == "dot":
        return (a_TV * b_TV).sum(dim=1)
    return (_unit(a_TV) * _unit(b_TV)).sum(dim=1)


def _unit(v_XV: Tensor) -> Tensor:
    # The norm has no gradient at 0, where padding and empty experts are.
    return v_XV / (v_XV.square().sum(dim=1, keepdim=True) + 1e-12).sqrt()


class PrototypeMemory(KeepsFp32):
    """The EMA of a sparse layer's prototypes, moved once per step and saved with the model."""

    def __init__(self, num_experts: int, width: int, *, space: Space, most: int, ema: float) -> None:
        super().__init__()
        self.space: Space = space
        self.most, self.ema = most, ema
        self.mean_EV: Tensor
        self.known_E: Tensor
        self.register_buffer("mean_EV", torch.zeros(num_experts, width, dtype=router_dtype()))
        self.register_buffer("known_E", torch.zeros(num_experts, dtype=torch.bool))

    def recall(self) -> dict[str, Tensor]:
        """For ``gate.extra``: copies, because ``after_step`` writes in place."""
        return {_MEMORY: self.mean_EV.clone(), _KNOWN: self.known_E.clone()}

    def statistics(self, plan: RoutingPlan | SoftPlan, peers: Peers = ALONE) -> dict[str, Tensor]:
        """This part's share of the sums and counts behind the prototypes of the micro-batch."""
        _, top_TE = members(plan, self.most, peers)
        vector_TV = masked(vectors(plan, self.space).detach(), plan.valid_T)
        return {_SUMS: top_TE.T @ vector_TV, _COUNTS: top_TE.sum(dim=0)}

    def after_step(self, stats: StepStats) -> None:
        """Move towards the step's prototypes; an expert seen for the first time takes its over, one without tokens stays."""
        counts_E = stats.sums[_COUNTS]
        batch_EV = (stats.sums[_SUMS] / counts_E.clamp(min=1)[:, None]).to(self.mean_EV.dtype)
        keep_E1 = torch.where(self.known_E, self.ema, 0.0)[:, None].to(self.mean_EV.dtype)
        moved_EV = keep_E1 * self.mean_EV + (1 - keep_E1) * batch_EV
        seen_E = counts_E > 0
        self.mean_EV.copy_(torch.where(seen_E[:, None], moved_EV, self.mean_EV))
        self.known_E.logical_or_(seen_E)


def check_prototype(options: Mapping[str, Any], num_experts: int) -> None:
    """Raises ``ConfigError`` for options that cannot be."""
    if not options.get("tau", 0.1) > 0:
        raise ConfigError(f'Option tau of loss "prototype" must be above 0, not {options["tau"]}.')
    if options.get("most", 64) < 1:
        raise ConfigError(f'Option most of loss "prototype" must be at least 1, not {options["most"]}.')
    if options.get("warmup", 0) < 0:
        raise ConfigError(f'Option warmup of loss "prototype" must be at least 0, not {options["warmup"]}.')
    ema = options.get("ema")
    if ema is not None and not 0 <= ema < 1:
        raise ConfigError(f'Option ema of loss "prototype" must be at least 0 and below 1, not {ema}; 0.99 is usual.')
