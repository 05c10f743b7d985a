"""Segment routing: the tokens of a segment share one decision (the routing side of Lory, Zhong et al. 2024).

Documents are cut into segments of ``segment_len`` tokens. With gate logits ``u_t = x_t W``, all tokens of segment s are
routed by

| ``pool`` | ``z_s`` | causal |
|---|---|---|
| "prev_segment" | mean of u over segment s - 1; for the first segment, u of its own first token | yes |
| "first" | u of the segment's first token | yes |
| "mean" | mean of u over the segment itself | no |

(the mean of logits is the logit of the mean input). ``coupling`` c draws neighbours together: ``(1 - c) z_s + c z_{s-1}`` where
the pool is causal, ``(1 - c) z_s + c mean(z_{s-1}, z_{s+1})`` over those that exist where it is not.

Lory merges expert parameters per segment; here tokens go to the top k of the shared scores like anywhere else. A last, shorter
segment is a segment. Segments never cross documents, and padding belongs to none.

Legend: T tokens (B sequences of S), D model width, E experts, K experts per token, M segments a row may hold (S + 1; the first
continues what an earlier forward of the same generation began).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moesaic.errors import ConfigError, one_of
from moesaic.routing.context import TokenContext
from moesaic.routing.contextual import ContextRouter, Weights
from moesaic.routing.gate import LinearGate

Pool = Literal["prev_segment", "first", "mean"]


class Segment(ContextRouter):
    """One decision per segment.

    Args:
        segment_len: tokens of a segment.
        pool: see the table.
        coupling: c, in [0, 1).

    ``ctx.state`` holds, for each row's unfinished segment: ``sum`` (B, E) and ``count`` (B, 1) of its logits so far, ``z``
    (B, E) and ``before`` (B, E), the scores of the segment and of the one before it (its own, for a document's first).
    Generation with "mean" can pool only what has been read, so it differs from reading the text at once.
    """

    facts = replace(ContextRouter.facts, source="Zhong et al. 2024 (Lory), routing only")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        segment_len: int = 16,
        pool: Pool = "prev_segment",
        coupling: float = 0.0,
        normalize: Weights = "chosen",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_experts, k, normalize)
        one_of("pool", pool, ("prev_segment", "first", "mean"))
        if segment_len < 1:
            raise ConfigError(f"segment_len must be at least 1, not {segment_len}.")
        if not 0 <= coupling < 1:
            raise ConfigError(
                f"coupling must be at least 0 and below 1, not {coupling}: 1 would leave only the neighbours."
            )
        self.segment_len, self.pool, self.coupling = segment_len, pool, coupling
        if pool == "mean" and (segment_len > 1 or coupling):
            self.facts = replace(self.facts, causal=False)
        self.gate = LinearGate(dim, num_experts, init_std=init_std)

    def logits(self, x_TD: Tensor, ctx: TokenContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Every token gets its segment's logits."""
        B, S = ctx.shape(len(x_TD))
        u_BSE = self.gate(x_TD).view(B, S, self.num_experts)
        position_BS = ctx.positions(len(x_TD), x_TD.device)
        valid_BS = torch.ones_like(position_BS, dtype=torch.bool)
        if ctx.valid_T is not None:
            valid_BS = ctx.valid_T.view(B, S)
            u_BSE = torch.where(valid_BS[:, :, None], u_BSE, 0.0)
        old = ctx.state or {}
        cut = _cut(u_BSE, position_BS, valid_BS, self.segment_len, old)
        z_BME = self._pool(cut, old)
        coupled_BME, before_BME = self._couple(z_BME, cut, old)
        if ctx.state is not None:
            row_B = torch.arange(B, device=x_TD.device)
            parts = {"sum": cut.sum_BME, "count": cut.count_BM1, "z": z_BME, "before": before_BME}
            ctx.state.update({name: part[row_B, cut.last_B].detach() for name, part in parts.items()})
        segment_BSE = cut.segment_BS[:, :, None].expand(B, S, self.num_experts)
        return coupled_BME.gather(1, segment_BSE).flatten(0, 1), {}

    def _pool(self, cut: _Cut, old: dict[str, Tensor]) -> Tensor:
        """z, (B, M, E)."""
        mean_BME = cut.sum_BME / cut.count_BM1.clamp(min=1)
        if self.pool == "mean":
            return mean_BME
        z_BME = cut.first_BME
        if self.pool == "prev_segment":
            z_BME = torch.where(cut.opens_BM1, z_BME, mean_BME.roll(1, dims=1))
        going_on_BE = old.get("z", torch.zeros_like(z_BME[:, 0]))
        return torch.cat([going_on_BE[:, None], z_BME[:, 1:]], dim=1)

    def _couple(self, z_BME: Tensor, cut: _Cut, old: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """z drawn towards its neighbours, and z of the segment before each (its own where there is none)."""
        before_BME = torch.where(cut.opens_BM1, z_BME, z_BME.roll(1, dims=1))
        before_BME = torch.cat([old.get("before", z_BME[:, 0])[:, None], before_BME[:, 1:]], dim=1)
        if not self.coupling:
            return z_BME, before_BME
        near_BME = before_BME
        if self.pool == "mean":
            follows_BM1 = torch.cat([cut.goes_on_BM1[:, 1:], torch.zeros_like(cut.opens_BM1[:, :1])], dim=1)
            after_BME = torch.where(follows_BM1, z_BME.roll(-1, dims=1), before_BME)
            near_BME = (torch.where(cut.opens_BM1, after_BME, before_BME) + after_BME) / 2
        return (1 - self.coupling) * z_BME + self.coupling * near_BME, before_BME


@dataclass(frozen=True, eq=False)
class _Cut:
    """Rows cut into segments.

    Attributes:
        segment_BS, last_B: int64, the segment of each token and of each row's end, in [0, M).
        sum_BME, count_BM1, first_BME: logits of each segment's tokens summed, their number, and the first one's logits.
        opens_BM1: bool, the segment is the first of its document.
        goes_on_BM1: bool, the segment begins here and is not the first of its document.
    """

    segment_BS: Tensor
    last_B: Tensor
    sum_BME: Tensor
    count_BM1: Tensor
    first_BME: Tensor
    opens_BM1: Tensor
    goes_on_BM1: Tensor


def _cut(u_BSE: Tensor, position_BS: Tensor, valid_BS: Tensor, length: int, old: dict[str, Tensor]) -> _Cut:
    B, S, E = u_BSE.shape
    begins_BS = valid_BS & (position_BS % length == 0)
    segment_BS = begins_BS.long().cumsum(dim=1)
    at_BSE = segment_BS[:, :, None].expand(B, S, E)
    empty_BME = u_BSE.new_zeros(B, S + 1, E)
    sum_BME = empty_BME.scatter_add(1, at_BSE, u_BSE)
    count_BM1 = u_BSE.new_zeros(B, S + 1, 1).scatter_add(
        1, segment_BS[:, :, None], valid_BS[:, :, None].to(u_BSE.dtype)
    )
    if "sum" in old:
        first_M1 = torch.arange(S + 1, device=u_BSE.device)[:, None] == 0
        sum_BME = sum_BME + torch.where(first_M1, old["sum"][:, None], 0.0)
        count_BM1 = count_BM1 + torch.where(first_M1, old["count"][:, None], 0.0)
    first_BME = empty_BME.scatter_add(1, at_BSE, torch.where(begins_BS[:, :, None], u_BSE, 0.0))
    kinds = (begins_BS & (position_BS == 0), begins_BS & (position_BS > 0))
    opens_BM1, goes_on_BM1 = (
        torch.zeros(B, S + 1, 1, dtype=torch.int64, device=u_BSE.device).scatter_add(
            1, segment_BS[:, :, None], kind_BS[:, :, None].long()
        )
        > 0
        for kind_BS in kinds
    )
    return _Cut(segment_BS, begins_BS.sum(dim=1), sum_BME, count_BM1, first_BME, opens_BM1, goes_on_BM1)
