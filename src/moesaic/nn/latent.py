"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads are made from one short vector per token.

The cache holds that vector and one rotary key, ``kv_rank + rope_dim`` numbers per token, not ``2 * heads * width``. One decoded
token attends to the vectors themselves: the products that would make keys and values move to the query's and the output's side.

Legend: B batch, S positions, L keys held, D model width, H heads, C kv_rank, N and P parts of a query without and with rotary
positions, V width of a value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.nn.attention import AttentionContext
from moesaic.nn.linear import Linear, init_fan_in_
from moesaic.nn.norm import RMSNorm
from moesaic.nn.rope import rotate


class LatentAttention(nn.Module):
    """Causal self-attention over latent vectors.

    Args:
        kv_rank, q_rank: C, and the width of the queries' own bottleneck (None: straight from D).
        nope_dim, rope_dim, value_dim: N, P, V.
        bias: biases in the projections into the bottlenecks and in the output's.
        score_scale: factor on the scores besides ``(N + P)^-0.5`` (YaRN in DeepSeek).

    Parameters: ``wq`` (H * (N + P), D), or ``wq_a``, ``q_norm``, ``wq_b``; ``wkv_a`` (C + P, D), ``kv_norm`` (C,), ``wkv_b``
    (H * (N + V), C); ``wo`` (D, H * V). Of a head's query and of ``wkv_a`` the rotary part comes last, split into halves.
    The norms' epsilon is 1e-6 in every published model, whatever that of the blocks.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_rank: int,
        q_rank: int | None = None,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        layer: int = 0,
        bias: bool = False,
        score_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.kv_rank, self.layer = num_heads, kv_rank, layer
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.window: int | None = None
        self.scale = score_scale * (nope_dim + rope_dim) ** -0.5
        query = num_heads * (nope_dim + rope_dim)
        if q_rank is None:
            self.wq = Linear(dim, query, bias=False)
        else:
            self.wq_a = Linear(dim, q_rank, bias=bias)
            self.q_norm = RMSNorm(q_rank, 1e-6)
            self.wq_b = Linear(q_rank, query, bias=False)
        self.q_rank = q_rank
        self.wkv_a = Linear(dim, kv_rank + rope_dim, bias=bias)
        self.kv_norm = RMSNorm(kv_rank, 1e-6)
        self.wkv_b = Linear(kv_rank, num_heads * (nope_dim + value_dim), bias=False)
        self.wo = Linear(num_heads * value_dim, dim, bias=bias)

    def reset_parameters(self, scale: float, out_scale: float) -> None:
        """Fan-in initialisation, zero biases; ``out_scale`` multiplies the variance of the output projection."""
        for linear in (module for module in self.children() if isinstance(module, Linear)):
            init_fan_in_(linear.weight, linear.in_features, scale * (out_scale if linear is self.wo else 1.0))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x_BSD: Tensor, ctx: AttentionContext) -> Tensor:
        """(B, S, D) to (B, S, D). The cache's keys are ``[latent | rotary key]`` of one head; it holds no values."""
        B, S, _ = x_BSD.shape
        q = self.wq(x_BSD) if self.q_rank is None else self.wq_b(self.q_norm(self.wq_a(x_BSD)))
        q_BHSR = q.view(B, S, self.num_heads, -1).transpose(1, 2)
        latent_BSC, key_BSP = self.wkv_a(x_BSD).split([self.kv_rank, self.rope_dim], dim=-1)
        latent_BSC = self.kv_norm(latent_BSC)
        nope_BHSN, rope_BHSP = q_BHSR.split([self.nope_dim, self.rope_dim], dim=-1)
        turned = rotate(torch.cat([rope_BHSP, key_BSP[:, None]], dim=1), ctx.cos, ctx.sin)
        rope_BHSP, key_B1SP = turned.split([self.num_heads, 1], dim=1)
        held_B1LR = torch.cat([latent_BSC[:, None], key_B1SP], dim=-1)
        if ctx.cache is not None and ctx.place is not None:
            held_B1LR, _ = ctx.cache.append(self.layer, ctx.place, held_B1LR, held_B1LR[..., :0])
            held_B1LR = held_B1LR.to(q.dtype)
        mask = ctx.masks[None]
        attend = self._over_latents if S == 1 else self._over_keys
        y_BHSV = attend(nope_BHSN, rope_BHSP, held_B1LR, mask)
        y: Tensor = self.wo(y_BHSV.transpose(1, 2).reshape(B, S, self.num_heads * self.value_dim))
        return y

    def _over_keys(self, nope_BHSN: Tensor, rope_BHSP: Tensor, held_B1LR: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values made for every token held."""
        B, H, S, _ = nope_BHSN.shape
        latent_B1LC, key_B1LP = held_B1LR.split([self.kv_rank, self.rope_dim], dim=-1)
        made_BHLR = self.wkv_b(latent_B1LC[:, 0]).view(B, -1, H, self.nope_dim + self.value_dim).transpose(1, 2)
        key_BHLN, value_BHLV = made_BHLR.split([self.nope_dim, self.value_dim], dim=-1)
        return F.scaled_dot_product_attention(
            torch.cat([nope_BHSN, rope_BHSP], dim=-1),
            torch.cat([key_BHLN, key_B1LP.expand(-1, H, -1, -1)], dim=-1),
            value_BHLV,
            attn_mask=mask,
            is_causal=mask is None and S > 1,
            scale=self.scale,
        )

    def _over_latents(self, nope_BH1N: Tensor, rope_BH1P: Tensor, held_B1LR: Tensor, mask: Tensor | None) -> Tensor:
        """One query: ``q . (W c) = (W^T q) . c``, so no key or value is made, and heads are rows over the same keys."""
        made_HRC = self.wkv_b.weight.to(nope_BH1N.dtype).view(self.num_heads, -1, self.kv_rank)
        to_key_HNC, to_value_HVC = made_HRC.split([self.nope_dim, self.value_dim], dim=1)
        query_BHC = torch.einsum("bhn,hnc->bhc", nope_BH1N[:, :, 0], to_key_HNC)
        query_B1HR = torch.cat([query_BHC, rope_BH1P[:, :, 0]], dim=-1)[:, None]
        y_B1HC = F.scaled_dot_product_attention(
            query_B1HR, held_B1LR, held_B1LR[..., : self.kv_rank], attn_mask=mask, scale=self.scale
        )
        return torch.einsum("bhc,hvc->bhv", y_B1HC[:, 0], to_value_HVC)[:, :, None]
