"""Grouped-query self-attention through ``scaled_dot_product_attention``, and the mask it needs.

Legend: B batch, S queries, L keys (L = S without a cache), H heads, G key/value heads, R head width, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.nn.cache import KVCache
from moesaic.nn.linear import Linear, init_fan_in_
from moesaic.nn.norm import RMSNorm
from moesaic.nn.rope import rotate


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """What all layers of one forward share.

    Attributes:
        cos, sin: rotary tables of the query positions, fp32 (B, 1, S, R).
        masks: window -> bool (B, 1, S, L), True = may attend; None needs no mask.
        cache, place: the key/value cache and where this forward's keys go (see ``KVCache.append``); or None.
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None]
    cache: KVCache | None = None
    place: slice | Tensor | None = None


class Attention(nn.Module):
    """Causal self-attention with rotary positions; optionally grouped queries, QK-norm, biases and a sliding window.

    Args:
        window: a query sees itself and the ``window - 1`` tokens before it; None sees all.
        qk_norm: RMSNorm on queries and keys before rotation, over each "head" (Qwen3) or the whole "projection" (OLMoE).
        bias: of which projections.
        clip: queries, keys and values are clamped to plus and minus this (OLMoE); None leaves them.
        sinks: one trained logit per head takes part in the softmax and has no value (gpt-oss).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layer: int = 0,
        window: int | None = None,
        qk_norm: Literal["none", "head", "projection"] = "none",
        bias: Literal["none", "qkv", "all"] = "none",
        clip: float | None = None,
        sinks: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layer, self.window = layer, window
        self.wq = Linear(dim, num_heads * head_dim, bias=bias != "none")
        self.wk = Linear(dim, num_kv_heads * head_dim, bias=bias != "none")
        self.wv = Linear(dim, num_kv_heads * head_dim, bias=bias != "none")
        self.wo = Linear(num_heads * head_dim, dim, bias=bias == "all")
        self.norm_per_head, self.clip = qk_norm == "head", clip
        widths = (head_dim, head_dim) if self.norm_per_head else (num_heads * head_dim, num_kv_heads * head_dim)
        self.q_norm, self.k_norm = (None if qk_norm == "none" else RMSNorm(width, eps) for width in widths)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None

    def reset_parameters(self, scale: float, out_scale: float) -> None:
        """Fan-in initialisation, zero biases; ``out_scale`` multiplies the variance of the output projection."""
        for linear in (self.wq, self.wk, self.wv, self.wo):
            init_fan_in_(linear.weight, linear.in_features, scale * (out_scale if linear is self.wo else 1.0))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(self, x_BSD: Tensor, ctx: AttentionContext) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        B, S, _ = x_BSD.shape
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        normed = self.q_norm is not None and self.k_norm is not None
        if normed and not self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q_BSHR = q.view(B, S, self.num_heads, self.head_dim)
        k_BSGR = k.view(B, S, self.num_kv_heads, self.head_dim)
        v_BGSR = v.view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if normed and self.norm_per_head:
            q_BSHR, k_BSGR = self.q_norm(q_BSHR), self.k_norm(k_BSGR)  # type: ignore[misc]
        # Queries and keys turn together: a decoded token pays by the operation, not by the number.
        turned = rotate(torch.cat([q_BSHR, k_BSGR], dim=2).transpose(1, 2), ctx.cos, ctx.sin)
        q_BHSR, k_BGSR = turned.split([self.num_heads, self.num_kv_heads], dim=1)
        if ctx.cache is not None and ctx.place is not None:
            k_BGSR, v_BGSR = ctx.cache.append(self.layer, ctx.place, k_BGSR, v_BGSR)
            if k_BGSR.dtype != q_BHSR.dtype:
                k_BGSR, v_BGSR = k_BGSR.to(q_BHSR.dtype), v_BGSR.to(q_BHSR.dtype)
        mask = ctx.masks[self.window]
        grouped = self.num_kv_heads != self.num_heads
        if grouped and S == 1:
            # The queries of a group are rows over the same keys: one product each, where repeated heads cost 7 times as much.
            q_BHSR, grouped = q_BHSR.reshape(B, self.num_kv_heads, -1, self.head_dim), False
        if self.sinks is not None:
            y_BHSR = attend_with_sinks(q_BHSR, k_BGSR, v_BGSR, self.sinks, mask, causal=mask is None and S > 1)
        else:
            y_BHSR = F.scaled_dot_product_attention(
                q_BHSR, k_BGSR, v_BGSR, attn_mask=mask, is_causal=mask is None and S > 1, enable_gqa=grouped
            )
        if S > 1:
            y_BHSR = y_BHSR.transpose(1, 2)  # with S = 1 heads are side by side already, grouped or not
        y: Tensor = self.wo(y_BHSR.reshape(B, S, self.num_heads * self.head_dim))
        return y


def attend_with_sinks(
    q_BHSR: Tensor, k_BGLR: Tensor, v_BGLR: Tensor, sink_H: Tensor, mask: Tensor | None, *, causal: bool
) -> Tensor:
    """Attention whose softmax has one more term per head, ``exp(sink)``, that no value belongs to (gpt-oss).

    ``q`` may have the G heads of the keys, its own heads then being rows: ``sink_H`` follows heads in that order.
    """
    B, H, S, R = q_BHSR.shape
    G, L = k_BGLR.shape[1:3]
    rows_BGNR = q_BHSR.reshape(B, G, H // G * S, R)
    scores_BGNL = (rows_BGNR @ k_BGLR.transpose(2, 3)).to(
        sink_H.dtype if sink_H.dtype == torch.float64 else torch.float32
    )
    scores = scores_BGNL.view(B, H, S, L) * R**-0.5
    sink = sink_H.to(scores.dtype).view(1, H, -1, 1)
    if causal:
        mask = torch.ones(S, L, dtype=torch.bool, device=scores.device).tril(L - S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.cat([scores, sink.expand(B, H, S, 1)], dim=-1).softmax(dim=-1)[..., :-1].to(v_BGLR.dtype)
    return (weights.view(B, G, -1, L) @ v_BGLR).view(B, H, S, R)


def attention_mask(
    query_position_BS: Tensor,
    key_position_BL: Tensor,
    key_valid_BL: Tensor | None,
    *,
    query_document_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor | None:
    """bool (B, 1, S, L), True = may attend: causal, same document, inside the window, and not padding.

    Queries are the last S of the L keys. None where no mask is needed: plain causal attention over S = L, or one query that
    may see every key. Every query may attend to itself, padding included, so that no softmax is over nothing.
    """
    S, L = query_position_BS.shape[1], key_position_BL.shape[1]
    plain = query_document_BS is None and key_valid_BL is None and (window is None or window >= L)
    if plain and (S == L or S == 1):
        return None
    device = query_position_BS.device
    query_S1 = torch.arange(L - S, L, device=device)[:, None]
    key_1L = torch.arange(L, device=device)[None, :]
    allowed_BSL = (key_1L <= query_S1)[None]
    if query_document_BS is not None:
        allowed_BSL = allowed_BSL & (query_document_BS[:, :, None] == query_document_BS[:, None, :])
    if window is not None:
        # Distance in real tokens: positions skip padding, and within one document they are consecutive.
        allowed_BSL = allowed_BSL & (query_position_BS[:, :, None] - key_position_BL[:, None, :] < window)
    if key_valid_BL is not None:
        allowed_BSL = allowed_BSL & key_valid_BL[:, None, :]
    return (allowed_BSL | (key_1L == query_S1)[None])[:, None]
