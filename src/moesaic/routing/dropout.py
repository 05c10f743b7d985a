"""Training with fewer experts than there are: two ways to narrow a batch's context, which every router obeys as it obeys rules.

- Expert masking: each expert is out with probability p, for all tokens of the batch alike, drawn per layer; k at least stay
  (sigma-MoE, Csordas et al. 2023; SMoE-Dropout, Chen et al. 2023, raises k over training instead).
- Gating dropout: with probability p a batch does without all experts outside a sequence's own group, in all layers at once
  (Liu et al. 2022).

Gating dropout saves the all-to-all of that step: groups are ranks, which hold sequences and experts alike. In one process they
are G equal runs of sequences and G runs of experts, matched by a draw, so that a small batch does not always meet the same
experts. Both are off in evaluation. A third thing of a similar name, dropout *inside* experts, is ``StackedExperts.dropout``;
taking experts out of a trained model is knockout (``lens``).

Rules stay: a token to which they and the draw together leave fewer than k experts (and fewer than rules alone) keeps all that
its rules permit. Draws come from ``ctx.generator`` or torch's global one, which checkpoints hold; they are about the whole
micro-batch, so where processes hold parts of it, the first one's are everybody's.

Legend: T tokens, B sequences, E experts, G groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.plan.peers import ALONE, Peers
from moesaic.routing.balance.devices import device_of
from moesaic.routing.context import TokenContext


def mask_whole_experts(
    ctx: TokenContext, num_tokens: int, num_experts: int, k: int, p: float, device: torch.device, peers: Peers = ALONE
) -> TokenContext:
    """The context without a random set of experts: each is out with probability p, but never so many that k are not left."""
    drawn_E = peers.first(_draw(ctx, num_experts, device))
    kept_E = drawn_E >= p
    kept_E[drawn_E.topk(k).indices] = True
    return narrowed(ctx, kept_E.expand(num_tokens, num_experts), k)


def keep_local(
    ctx: TokenContext,
    num_tokens: int,
    num_experts: int,
    k: int,
    groups: int,
    device: torch.device,
    peers: Peers = ALONE,
) -> TokenContext:
    """The context in which the tokens of every sequence keep to the experts of its group."""
    S = ctx.shape(num_tokens)[1]
    B = 1 if ctx.num_sequences is None else ctx.num_sequences
    shift = (peers.first(_draw(ctx, 1, device)) * groups).long()
    of_parts = peers.each(torch.tensor(B, device=device))
    seat_B = of_parts[: peers.index].sum() + torch.arange(B, device=device)
    group_B = (seat_B * groups // of_parts.sum().clamp(min=1) + shift) % groups
    local_BE = group_B[:, None] == device_of(num_experts, groups, device)
    return narrowed(ctx, local_BE.repeat_interleave(S, dim=0), k)


def falls_on(p: float, generator: torch.Generator | None = None) -> bool:
    """Whether a batch is one of the share p that skips the exchange."""
    device = "cpu" if generator is None else generator.device
    return bool(torch.rand((), generator=generator, device=device) < p)


def agreed(local: bool, device: torch.device, peers: Peers) -> bool:
    """What the first part has drawn for the batch."""
    return local if peers.count == 1 else bool(peers.first(torch.tensor(int(local), device=device)))


def narrowed(ctx: TokenContext, permitted_TE: Tensor, k: int) -> TokenContext:
    """The context with these experts only, for tokens to which its rules leave enough of them."""
    if ctx.allowed_TE is None:
        return replace(ctx, allowed_TE=permitted_TE)
    both_TE = ctx.allowed_TE & permitted_TE
    enough_T1 = both_TE.sum(dim=1, keepdim=True) >= ctx.allowed_TE.sum(dim=1, keepdim=True).clamp(max=k)
    return replace(ctx, allowed_TE=torch.where(enough_T1, both_TE, ctx.allowed_TE))


def _draw(ctx: TokenContext, size: int, device: torch.device) -> Tensor:
    drawn_on = device if ctx.generator is None else ctx.generator.device
    return torch.rand(size, generator=ctx.generator, device=drawn_on).to(device)
