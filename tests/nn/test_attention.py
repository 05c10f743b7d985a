"""Attention against sums written out per head with an explicit mask, in fp64; masks by hand; the cache's own refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.nn.attention import Attention, AttentionContext, attention_mask
from moesaic.nn.cache import KVCache
from moesaic.nn.rope import rope_tables

F64 = torch.float64


def written_out(attention: Attention, x_BSD: Tensor, position_BS: Tensor, allowed_BSS: Tensor) -> Tensor:
    """Softmax attention query by query: the specification."""
    B, S, _ = x_BSD.shape
    R, heads = attention.head_dim, attention.num_heads
    shared = heads // attention.num_kv_heads
    rate = 1e4 ** (-2 * torch.arange(R // 2, dtype=F64) / R)
    y = torch.zeros(B, S, heads * R, dtype=F64)

    def project(linear: torch.nn.Linear, x: Tensor, head: int) -> Tensor:
        out = linear.weight[head * R : head * R + R] @ x
        return out if linear.bias is None else out + linear.bias[head * R : head * R + R]

    def normed(x: Tensor, norm: torch.nn.Module | None) -> Tensor:
        return x if norm is None else x / (x.square().mean() + norm.eps).sqrt() * norm.weight

    def turned(x: Tensor, position: Tensor) -> Tensor:
        z = torch.complex(x[: R // 2], x[R // 2 :]) * torch.exp(1j * position * rate)
        return torch.cat([z.real, z.imag])

    for b in range(B):
        for h in range(heads):
            g = h // shared
            keys = [
                turned(normed(project(attention.wk, x_BSD[b, j], g), attention.k_norm), position_BS[b, j])
                for j in range(S)
            ]
            values = [project(attention.wv, x_BSD[b, j], g) for j in range(S)]
            for i in range(S):
                query = turned(normed(project(attention.wq, x_BSD[b, i], h), attention.q_norm), position_BS[b, i])
                seen = [j for j in range(S) if allowed_BSS[b, i, j]]
                share = torch.stack([query @ keys[j] / math.sqrt(R) for j in seen]).softmax(0)
                y[b, i, h * R : h * R + R] = sum(s * values[j] for s, j in zip(share, seen, strict=True))
    out: Tensor = attention.wo(y)
    return out


CASES = {
    "plain": {},
    "grouped": {"kv": 2},
    "one key head": {"kv": 1},
    "qk norm": {"qk_norm": "head", "kv": 2},
    "bias": {"bias": "all"},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window wider than the row": {"window": 50},
    "documents": {"documents": [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1]]},
    "documents and window": {"documents": [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], "window": 2},
    "padding left and right": {"valid": [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]},
    "padding inside and window": {"valid": [[0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1]], "window": 2},
    "everything": {"valid": [[0, 0, 1, 1, 1, 1, 1], [1] * 7], "window": 3, "kv": 2, "qk_norm": "head", "bias": "all"},
}


@pytest.mark.parametrize("case", CASES)
def test_attention_is_what_is_written_out(case: str) -> None:
    has = CASES[case]
    B, S = 2, 7
    attention = Attention(
        8,
        4,
        has.get("kv", 4),
        6,
        window=has.get("window"),
        qk_norm=has.get("qk_norm", "none"),
        bias=has.get("bias", "none"),
    ).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    valid = torch.tensor(has["valid"]).bool() if "valid" in has else None
    documents = torch.tensor(has["documents"]) if "documents" in has else None
    position = torch.arange(S).expand(B, S)
    if valid is not None:
        position = valid.long().cumsum(1) - valid.long()
    allowed = torch.ones(B, S, S).tril().bool()
    if documents is not None:
        position = torch.stack([torch.tensor([int((d[:i] == d[i]).sum()) for i in range(S)]) for d in documents])
        allowed &= documents[:, :, None] == documents[:, None, :]
    if has.get("window"):
        allowed &= position[:, :, None] - position[:, None, :] < has["window"]
    if valid is not None:
        allowed &= valid[:, None, :]
    real = torch.ones(B, S, dtype=torch.bool) if valid is None else valid
    x = torch.randn(B, S, 8, dtype=F64)
    mask = attention_mask(position, position, valid, query_document_BS=documents, window=has.get("window"))
    assert (mask is None) == (
        case in ("plain", "grouped", "one key head", "qk norm", "bias", "window wider than the row")
    )
    y = attention(x, AttentionContext(*rope_tables(position, 6, 1e4), {has.get("window"): mask}))
    expected = written_out(attention, x, position, allowed | torch.eye(S).bool())
    # Rotary tables are fp32, hence 1e-5 and not 1e-12.
    torch.testing.assert_close(y[real], expected[real], rtol=1e-5, atol=1e-5)
    assert bool(y.isfinite().all())  # padding attends to itself: no softmax over nothing


def test_a_chunk_of_queries_against_a_longer_past() -> None:
    query, keys = torch.tensor([[3, 4]]), torch.tensor([[0, 1, 2, 3, 4]])
    mask = attention_mask(query, keys, None)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    windowed = attention_mask(query, keys, None, window=2)
    assert windowed is not None
    assert windowed[0, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert attention_mask(query[:, 1:], keys, None) is None  # one query that may see every key needs no mask


def test_window_counts_real_tokens_and_not_padding() -> None:
    position = torch.tensor([[0, 1, 2, 2, 2]])  # the two before the last are padding
    valid = torch.tensor([[True, True, False, False, True]])
    mask = attention_mask(position, position, valid, window=2)
    assert mask is not None
    assert mask[0, 0, -1].int().tolist() == [0, 1, 0, 0, 1]


def test_initialisation_scales_the_output_projection_only() -> None:
    attention = Attention(64, 4, 2, 16, bias="all")
    attention.reset_parameters(1.0, 0.01)
    assert attention.wo.weight.abs().max() <= 2 * math.sqrt(0.01 / 64) < attention.wq.weight.abs().max()
    assert all(bool((linear.bias == 0).all()) for linear in (attention.wq, attention.wk, attention.wv, attention.wo))


def test_the_cache_refuses_in_words_and_stays_as_it_was() -> None:
    cache = KVCache(1, batch=2, max_len=4, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    assert cache.reserve(torch.zeros(2, 3, dtype=torch.int64), None) == slice(0, 3)
    with pytest.raises(MoesaicError, match="holds 4 positions; 3 are used and 2 more do not fit"):
        cache.reserve(torch.zeros(2, 2, dtype=torch.int64), None)
    with pytest.raises(MoesaicError, match="holds 2 rows, but the input has 3"):
        cache.reserve(torch.zeros(3, 1, dtype=torch.int64), None)
    assert (cache.length, cache.has_padding, cache.next_position_B1.tolist()) == (3, False, [[3], [3]])
    cache.reserve(torch.tensor([[3], [3]]), torch.tensor([[True], [False]]))
    assert (cache.length, cache.has_padding, cache.next_position_B1.tolist()) == (4, True, [[4], [3]])
