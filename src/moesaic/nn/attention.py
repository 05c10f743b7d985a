"""Grouped-query self-attention through ``scaled_dot_product_attention``, and the mask it needs.

Legend: B batch, S queries, L keys (L = S without a cache), H heads, G key/value heads, R head width, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        qk_norm: RMSNorm over each head's query and key before rotation (Qwen3, OLMoE style per head).
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
        qk_norm: bool = False,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layer, self.window = layer, window
        self.wq = Linear(dim, num_heads * head_dim, bias=bias)
        self.wk = Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.wv = Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.wo = Linear(num_heads * head_dim, dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else None

    def reset_parameters(self, scale: float, out_scale: float) -> None:
        """Fan-in initialisation, zero biases; ``out_scale`` multiplies the variance of the output projection."""
        for linear in (self.wq, self.wk, self.wv, self.wo):
            init_fan_in_(linear.weight, linear.in_features, scale * (out_scale if linear is self.wo else 1.0))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x_BSD: Tensor, ctx: AttentionContext) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        B, S, _ = x_BSD.shape
        q_BSHR = self.wq(x_BSD).view(B, S, self.num_heads, self.head_dim)
        k_BSGR = self.wk(x_BSD).view(B, S, self.num_kv_heads, self.head_dim)
        v_BGSR = self.wv(x_BSD).view(B, S, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHR, k_BSGR = self.q_norm(q_BSHR), self.k_norm(k_BSGR)
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
        y_BHSR = F.scaled_dot_product_attention(
            q_BHSR, k_BGSR, v_BGSR, attn_mask=mask, is_causal=mask is None and S > 1, enable_gqa=grouped
        )
        if S > 1:
            y_BHSR = y_BHSR.transpose(1, 2)  # with S = 1 heads are side by side already, grouped or not
        y: Tensor = self.wo(y_BHSR.reshape(B, S, self.num_heads * self.head_dim))
        return y


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
