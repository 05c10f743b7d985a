"""Attention against sums written out per head with an explicit mask, in fp64; masks by hand; the cache's own refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.nn.attention import Attention, AttentionContext, attend_with_sinks, attention_mask
from moesaic.nn.cache import KVCache
from moesaic.nn.rope import rope_tables

F64 = torch.float64


def tables(position_BS: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """``rope_tables`` in fp64, so that outputs and gradients can be compared to the last digits."""
    cos, sin = rope_tables(position_BS, R, 1e4)
    angle = position_BS[:, None, :, None] * 1e4 ** (-2 * torch.arange(R // 2, dtype=F64) / R)
    wide = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    for ours, theirs in zip((cos, sin), wide, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    return wide


def written_out(attention: Attention, x_BSD: Tensor, position_BS: Tensor, allowed_BSS: Tensor) -> Tensor:
    """Softmax attention query by query: the specification."""
    B, S, _ = x_BSD.shape
    R, heads = attention.head_dim, attention.num_heads
    shared = heads // attention.num_kv_heads
    rate = 1e4 ** (-2 * torch.arange(R // 2, dtype=F64) / R)

    def normed(x: Tensor, norm: torch.nn.Module | None) -> Tensor:
        return x if norm is None else x / (x.square().mean() + norm.eps).sqrt() * norm.weight

    def project(linear: torch.nn.Linear, x: Tensor, norm: torch.nn.Module | None = None) -> Tensor:
        """(heads, R) of one token, before rotation."""
        out = linear.weight @ x
        if linear.bias is not None:
            out = out + linear.bias
        if not attention.norm_per_head:
            out = normed(out, norm)
        if attention.clip is not None:
            out = torch.where(out.abs() > attention.clip, attention.clip * out.sign(), out)
        rows = out.reshape(-1, R)
        return torch.stack([normed(row, norm) for row in rows]) if attention.norm_per_head else rows

    def turned(x: Tensor, position: Tensor) -> Tensor:
        z = torch.complex(x[: R // 2], x[R // 2 :]) * torch.exp(1j * position * rate)
        return torch.cat([z.real, z.imag])

    outputs = []
    for b in range(B):
        queries = [project(attention.wq, x_BSD[b, i], attention.q_norm) for i in range(S)]
        keys = [project(attention.wk, x_BSD[b, i], attention.k_norm) for i in range(S)]
        values = [project(attention.wv, x_BSD[b, i]) for i in range(S)]
        for i in range(S):
            seen, out = [j for j in range(S) if allowed_BSS[b, i, j]], []
            for h in range(heads):
                query = turned(queries[i][h], position_BS[b, i])
                scores = [query @ turned(keys[j][h // shared], position_BS[b, j]) / math.sqrt(R) for j in seen]
                total = sum(score.exp() for score in scores)
                if attention.sinks is not None:
                    total = total + attention.sinks[h].exp()
                out.append(sum(s.exp() / total * values[j][h // shared] for s, j in zip(scores, seen, strict=True)))
            y = attention.wo.weight @ torch.cat(out)
            outputs.append(y if attention.wo.bias is None else y + attention.wo.bias)
    return torch.stack(outputs).view(B, S, -1)


PADDED = [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"kv": 2},
    "one key head": {"kv": 1},
    "qk norm": {"qk_norm": "head", "kv": 2},
    "projection norm": {"qk_norm": "projection", "kv": 2},
    "bias": {"bias": "all"},
    "qkv bias": {"bias": "qkv", "kv": 2},
    "clip": {"clip": 0.8, "kv": 2},
    "norm, then clip": {"clip": 0.8, "qk_norm": "projection", "bias": "qkv"},
    "norm per head": {"clip": 0.8, "qk_norm": "head"},
    "sinks": {"sinks": True},
    "sinks, grouped": {"sinks": True, "kv": 2, "bias": "all"},
    "sinks, one key head": {"sinks": True, "kv": 1},
    "sinks and window": {"sinks": True, "window": 3, "kv": 2},
    "sinks and padding": {"sinks": True, "valid": PADDED, "kv": 2},
    "sinks, padding and window": {"sinks": True, "valid": PADDED, "kv": 2, "window": 2, "bias": "all"},
    "sinks and documents": {"sinks": True, "documents": [[0, 0, 0, 1, 1, 2, 2], [0] * 6 + [1]], "kv": 2},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window wider than the row": {"window": 50},
    "documents": {"documents": [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1]]},
    "documents and window": {"documents": [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]], "window": 2},
    "padding left and right": {"valid": PADDED},
    "padding inside and window": {"valid": [[0, 1, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1, 1]], "window": 2},
    "everything": {
        "valid": [[0, 0, 1, 1, 1, 1, 1], [1] * 7], "window": 3, "kv": 2, "qk_norm": "head", "bias": "all", "sinks": True,
        "clip": 1.5,
    },
    "one token": {"kv": 2, "length": 1},
    "one token, sinks": {"kv": 2, "length": 1, "sinks": True, "bias": "all"},
}  # fmt: skip
MASKLESS = {
    *("plain", "grouped", "one key head", "qk norm", "projection norm", "bias", "qkv bias", "clip", "norm, then clip"),
    *("norm per head", "sinks", "sinks, grouped", "sinks, one key head", "window wider than the row"),
    *("one token", "one token, sinks"),
}


class Setting:
    """Everything of one case: the layer with loud parameters, positions, what may be seen, the mask of it."""

    def __init__(self, case: str) -> None:
        has = CASES[case]
        self.window: int | None = has.get("window")
        options = {key: has[key] for key in ("window", "qk_norm", "bias", "clip", "sinks") if key in has}
        self.attention = Attention(8, 4, has.get("kv", 4), 6, **options).double()
        for parameter in self.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        S = has.get("length", 7)
        self.x = torch.randn(2, S, 8, dtype=F64)
        self.valid = torch.tensor(has["valid"]).bool() if "valid" in has else None
        documents = torch.tensor(has["documents"]) if "documents" in has else None
        position = torch.arange(S).expand(2, S)
        allowed = torch.ones(2, S, S).tril().bool()
        if self.valid is not None:
            position = self.valid.long().cumsum(1) - self.valid.long()
            allowed &= self.valid[:, None, :]
        if documents is not None:
            position = torch.stack([torch.tensor([int((d[:i] == d[i]).sum()) for i in range(S)]) for d in documents])
            allowed &= documents[:, :, None] == documents[:, None, :]
        if self.window:
            allowed &= position[:, :, None] - position[:, None, :] < self.window
        self.position, self.allowed = position, allowed | torch.eye(S).bool()
        self.real = torch.ones(2, S, dtype=torch.bool) if self.valid is None else self.valid
        self.mask = attention_mask(position, position, self.valid, query_document_BS=documents, window=self.window)
        self.tables = tables(position, 6)


@pytest.mark.parametrize("case", CASES)
def test_attention_is_what_is_written_out(case: str) -> None:
    """Output and all gradients."""
    has = Setting(case)
    assert (has.mask is None) == (case in MASKLESS)
    ctx = AttentionContext(*has.tables, {has.window: has.mask})
    upstream, found = torch.randn_like(has.x), []
    for run in (lambda x: has.attention(x, ctx), lambda x: written_out(has.attention, x, has.position, has.allowed)):
        x = has.x.clone().requires_grad_()
        has.attention.zero_grad()
        y = run(x)
        assert bool(y.isfinite().all())  # padding attends to itself: no softmax over nothing
        (y * upstream)[has.real].sum().backward()
        gradients = {n: p.grad for n, p in has.attention.named_parameters()}
        found.append({"output": y[has.real].detach(), "input": x.grad, **gradients})
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    if "sinks" in case:
        assert found[0]["sinks"].abs().min() > 1e-6


@pytest.mark.parametrize("sizes", [(4, 1, 1, 1), (1,) * 7, (3, 4)], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if "documents" not in case and "one token" not in case])
def test_a_cache_is_read_as_what_is_written_out(case: str, sizes: tuple[int, ...]) -> None:
    """A single token groups its queries, and takes no mask where it may see all."""
    has = Setting(case)
    cache = KVCache(1, 2, 7, has.attention.num_kv_heads, 6, F64)
    expected = written_out(has.attention, has.x, has.position, has.allowed)
    start = 0
    for size in sizes:
        now = slice(start, start + size)
        start += size
        place = cache.reserve(has.position[:, now], None if has.valid is None else has.valid[:, now])
        held = cache.valid_BL[:, :start] if cache.has_padding else None
        mask = attention_mask(has.position[:, now], cache.position_BL[:, :start], held, window=has.window)
        ctx = AttentionContext(*(t[:, :, now] for t in has.tables), {has.window: mask}, cache, place)
        with torch.no_grad():
            y = has.attention(has.x[:, now], ctx)
        real = has.real[:, now]
        torch.testing.assert_close(y[real], expected[:, now][real], rtol=1e-10, atol=1e-10)


def test_a_sink_by_hand() -> None:
    """Scores 0 (twice) and a sink of ln 2: weights 1/4 each, the sink takes 1/2. Alone with a sink of 0 a token keeps half."""
    q, k = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
    v = torch.tensor([[4.0], [8.0]]).expand(1, 2, 2, 1)
    y = attend_with_sinks(q, k, v.expand(1, 2, 2, 4), torch.tensor([math.log(2), 0.0]), None, causal=True)
    torch.testing.assert_close(y[0, 0, :, 0], torch.tensor([4 / 3, 4 / 4 + 8 / 4]))
    torch.testing.assert_close(y[0, 1, :, 0], torch.tensor([4 / 2, 4 / 3 + 8 / 3]))
    silent = attend_with_sinks(q, k, v.expand(1, 2, 2, 4), torch.full((2,), -1e4), None, causal=True)
    torch.testing.assert_close(silent[0, :, :, 0], torch.tensor([[4.0, 6.0]] * 2))


def test_large_scores_and_sinks_stay_finite_in_half_precision() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.bfloat16) * scale for scale in (60, 60, 1))
    sinks = torch.tensor([300.0, -300.0], dtype=torch.bfloat16, requires_grad=True)
    y = attend_with_sinks(q, k, v, sinks, None, causal=True)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert y.isfinite().all()
    assert sinks.grad is not None
    assert sinks.grad.isfinite().all()


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
