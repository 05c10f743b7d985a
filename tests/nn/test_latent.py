"""Latent attention against loops from the paper (DeepSeek-V2, section 2.1), its one-token path, and what its cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.nn.attention import AttentionContext, attention_mask
from moesaic.nn.cache import KVCache
from moesaic.nn.latent import LatentAttention

F64 = torch.float64
S = 6


def written_out(layer: LatentAttention, x_BSD: Tensor, position_BS: Tensor, allowed_BSS: Tensor) -> Tensor:
    """Equations 9 to 19, head by head and token by token, with the RMS norms on both bottlenecks."""
    N, P, V, C = layer.nope_dim, layer.rope_dim, layer.value_dim, layer.kv_rank
    rate = 1e4 ** (-2 * torch.arange(P // 2, dtype=F64) / P)

    def normed(x: Tensor, norm: torch.nn.Module) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * norm.weight

    def through(linear: torch.nn.Linear, x: Tensor) -> Tensor:
        return linear.weight @ x if linear.bias is None else linear.weight @ x + linear.bias

    def turned(x: Tensor, position: Tensor) -> Tensor:
        z = torch.complex(x[: P // 2], x[P // 2 :]) * torch.exp(1j * position * rate)
        return torch.cat([z.real, z.imag])

    outputs = []
    for b, x_SD in enumerate(x_BSD):
        queries, latents, shared_keys = [], [], []
        for t, x in enumerate(x_SD):
            if layer.q_rank is None:
                query = through(layer.wq, x)
            else:
                query = through(layer.wq_b, normed(through(layer.wq_a, x), layer.q_norm))
            queries.append(
                [
                    torch.cat([head[:N], turned(head[N:], position_BS[b, t])])
                    for head in query.view(layer.num_heads, N + P)
                ]
            )
            down = through(layer.wkv_a, x)
            latents.append(normed(down[:C], layer.kv_norm))
            shared_keys.append(turned(down[C:], position_BS[b, t]))
        for t in range(len(x_SD)):
            heads = []
            for h in range(layer.num_heads):
                up = layer.wkv_b.weight[h * (N + V) : (h + 1) * (N + V)]
                seen = [j for j in range(len(x_SD)) if allowed_BSS[b, t, j]]
                keys = [torch.cat([up[:N] @ latents[j], shared_keys[j]]) for j in seen]
                share = torch.stack([queries[t][h] @ key * layer.scale for key in keys]).softmax(0)
                heads.append(sum(s * (up[N:] @ latents[j]) for s, j in zip(share, seen, strict=True)))
            outputs.append(through(layer.wo, torch.cat(heads)))
    return torch.stack(outputs).view(x_BSD.shape)


PADDED = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "query bottleneck": {"q_rank": 5},
    "biases": {"bias": True},
    "biases, query bottleneck": {"q_rank": 5, "bias": True},
    "score scale": {"score_scale": 1.7},
    "one head": {"num_heads": 1},
    "wide values": {"value_dim": 9, "q_rank": 3},
    "padding": {"valid": PADDED, "q_rank": 5, "bias": True},
    "documents": {"documents": [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1]]},
    "padding and documents": {
        "valid": PADDED,
        "documents": [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]],
        "score_scale": 0.6,
    },
}


class Setting:
    def __init__(self, case: str) -> None:
        has = dict(CASES[case])
        valid, documents = has.pop("valid", None), has.pop("documents", None)
        sizes = {"num_heads": 3, "kv_rank": 7, "nope_dim": 5, "rope_dim": 4, "value_dim": 6}
        self.layer = LatentAttention(8, **(sizes | has)).double()
        for parameter in self.layer.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        self.x = torch.randn(2, S, 8, dtype=F64)
        self.valid = None if valid is None else torch.tensor(valid).bool()
        self.real = torch.ones(2, S, dtype=torch.bool) if self.valid is None else self.valid
        before = self.real.long().cumsum(1) - self.real.long()
        allowed = torch.ones(2, S, S).tril().bool() & self.real[:, None, :]
        document_BS = None if documents is None else torch.tensor(documents)
        if document_BS is not None:
            starts = document_BS.diff(dim=1, prepend=document_BS[:, :1] - 1) != 0
            before = before - torch.where(starts, before, 0).cummax(dim=1).values
            allowed &= document_BS[:, :, None] == document_BS[:, None, :]
        self.position, self.allowed = before, allowed | torch.eye(S).bool()
        self.mask = attention_mask(before, before, self.valid, query_document_BS=document_BS)
        angle = before[:, None, :, None] * 1e4 ** (-2 * torch.arange(2, dtype=F64) / 4)
        self.cos, self.sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, AttentionContext(self.cos, self.sin, {None: self.mask}))
        return y


@pytest.mark.parametrize("case", CASES)
def test_latent_attention_is_what_the_paper_writes(case: str) -> None:
    """Output and all gradients."""
    has = Setting(case)
    upstream, found = torch.randn_like(has.x), []
    for run in (has.run, lambda x: written_out(has.layer, x, has.position, has.allowed)):
        x = has.x.clone().requires_grad_()
        has.layer.zero_grad()
        y = run(x)
        assert y.isfinite().all()
        (y * upstream)[has.real].sum().backward()
        gradients = {n: p.grad for n, p in has.layer.named_parameters()}
        found.append({"output": y[has.real].detach(), "input": x.grad, **gradients})
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sizes", [(1,) * S, (3, 1, 1, 1), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "documents" not in case])
def test_tokens_one_by_one_are_the_whole_forward(case: str, sizes: tuple[int, ...]) -> None:
    """One token reads the vectors themselves, more make keys and values of them: the same numbers."""
    has = Setting(case)
    cache, start = KVCache(1, 2, S, 1, 7 + 4, F64, value_dim=0), 0
    with torch.no_grad():
        whole = has.run(has.x)
        for size in sizes:
            now = slice(start, start + size)
            start += size
            place = cache.reserve(has.position[:, now], None if has.valid is None else has.valid[:, now])
            held = cache.valid_BL[:, :start] if cache.has_padding else None
            mask = attention_mask(has.position[:, now], cache.position_BL[:, :start], held)
            ctx = AttentionContext(has.cos[:, :, now], has.sin[:, :, now], {None: mask}, cache, place)
            y = has.layer(has.x[:, now], ctx)
            real = has.real[:, now]
            torch.testing.assert_close(y[real], whole[:, now][real], rtol=1e-10, atol=1e-10)


def test_gradients_of_the_one_token_path() -> None:
    has = Setting("biases, query bottleneck")
    x = has.x[:, :1].clone().requires_grad_()
    ctx = AttentionContext(has.cos[:, :, :1], has.sin[:, :, :1], {None: None})
    found = []
    for run in (
        lambda: has.layer(x, ctx),
        lambda: written_out(has.layer, x, has.position[:, :1], has.allowed[:, :1, :1]),
    ):
        gradients = torch.autograd.grad(run().square().sum(), [x, *has.layer.parameters()], materialize_grads=True)
        found.append(gradients)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_initialisation_scales_the_output_projection_only() -> None:
    sizes = {"kv_rank": 64, "q_rank": 64, "nope_dim": 16, "rope_dim": 16, "value_dim": 16}
    layer = LatentAttention(64, 4, **sizes, bias=True)  # type: ignore[arg-type]
    layer.reset_parameters(1.0, 0.01)
    inputs = (layer.wq_a, layer.wq_b, layer.wkv_a, layer.wkv_b)
    assert layer.wo.weight.abs().max() <= 2 * (0.01 / 64) ** 0.5 < min(part.weight.abs().max() for part in inputs)
    assert not any(part.bias.any() for part in (layer.wq_a, layer.wkv_a, layer.wo))


@pytest.mark.parametrize("length", [1, 5])
def test_half_precision_weights_and_half_precision_tokens(length: int) -> None:
    """fp32 weights beside bf16 tokens, and all in bf16: close to fp32, in the tokens' dtype."""
    torch.manual_seed(3)
    layer = LatentAttention(32, 4, kv_rank=16, q_rank=16, nope_dim=8, rope_dim=4, value_dim=8)
    layer.reset_parameters(1.0, 1.0)
    x = torch.randn(2, length, 32)
    angle = torch.arange(length)[None, None, :, None] * torch.tensor([1.0, 0.01])
    tables = torch.cat([angle.cos()] * 2, -1).expand(2, 1, -1, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    ctx = AttentionContext(*tables, {None: None})
    with torch.no_grad():
        want = layer(x, ctx)
        for module in (layer, layer.to(torch.bfloat16)):
            y = module(x.bfloat16(), ctx)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y.float(), want, rtol=0, atol=0.03 * float(want.abs().max()))
