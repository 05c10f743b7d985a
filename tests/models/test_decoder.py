"""The decoder: its block written out, documents, padding, caches, causality, precision. Routing is compared exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.models import Decoder, MoEConfig, Output, RouterConfig, build_model
from moesaic.nn.attention import AttentionContext, attention_mask
from moesaic.nn.rope import rope_tables
from moesaic.plan import read
from moesaic.plan.capacity import CapacityRule
from moesaic.plan.plan import RoutingPlan
from moesaic.routing import LOSSES, LossContext, TokenContext
from tests.models.tiny import VOCAB, experts_of, lively, some_ids, sparse, tiny

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CONFIGS = {
    "dense": tiny(),
    "sparse": sparse(),
    "window": replace(sparse(), sliding_window=3),
    "window in one block": replace(sparse(), sliding_window=(0, 2), num_kv_heads=1),
    "post-norm": replace(sparse(), norm_placement="post", norm="layernorm", tie_embeddings=False),
    "uneven": replace(
        tiny(num_layers=3, qk_norm="head", attention_bias="all"),
        moe=MoEConfig(num_experts=(3, 5), k=(2, 3), hidden=8, dense_first=1, losses={}),
    ),
    "special": sparse(shared=1, shared_gate=True, zero=1, copy=1, constant=1, k=3),
}


def run(model: Decoder, ids_BS: Tensor, **more: Tensor) -> Output:
    with torch.no_grad():
        output: Output = model(ids_BS, **more)
    return output


def same_routing(plan_a: object, plan_b: object, keep_a: Tensor, keep_b: Tensor) -> None:
    """Exactly the same experts in the same order, and the same weights."""
    a, b = (experts_of(p, *k.shape)[k] for p, k in ((plan_a, keep_a), (plan_b, keep_b)))
    assert torch.equal(a, b)
    weights = [p.weight_TK[k.flatten()] for p, k in ((plan_a, keep_a), (plan_b, keep_b))]  # type: ignore[attr-defined]
    torch.testing.assert_close(weights[0], weights[1], **CLOSE)


@pytest.mark.parametrize("name", ["sparse", "post-norm", "uneven"])
def test_the_blocks_are_what_the_design_writes(name: str) -> None:
    """Pre: x + A(N1 x), then + F(N2 .). Post: N1(x + A x), then N2(. + F .)."""
    model = lively(CONFIGS[name])
    ids = some_ids(2, 6)
    position = torch.arange(6).expand(2, 6)
    mask = attention_mask(position, position, None)
    ctx = AttentionContext(*rope_tables(position, model.config.heads_dim, 1e4), {None: mask})
    x = model.embedding(ids)
    for block in model.blocks:
        if name == "post-norm":
            x = block.norm1(x + block.attention(x, ctx))
            y = block.ffn(x)
            x = block.norm2(x + (y[0] if isinstance(y, tuple) else y))
        else:
            x = x + block.attention(block.norm1(x), ctx)
            y = block.ffn(block.norm2(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
    expected = model.norm(x) @ model.head.weight.T
    torch.testing.assert_close(run(model, ids).logits, expected, **CLOSE)


def test_what_a_forward_returns() -> None:
    output = run(lively(CONFIGS["uneven"]), some_ids(2, 5))
    assert output.logits.shape == (2, 5, VOCAB)
    assert output.cache is None
    assert {layer: (p.num_tokens, p.num_experts, p.per_token) for layer, p in output.plans.items()} == {  # type: ignore[union-attr]
        1: (10, 3, 2),
        2: (10, 5, 3),
    }
    assert run(lively(CONFIGS["dense"]), some_ids(1, 5)).plans == {}


# ---- documents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_gives_what_each_document_gives_alone(name: str) -> None:
    model = lively(CONFIGS[name])
    sizes = ((5, 1, 4, 2), (3, 9))
    ids = some_ids(2, 12)
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(s)), torch.tensor(s)) for s in sizes])
    packed = run(model, ids, document_BS=documents)
    for row, lengths in enumerate(sizes):
        start = 0
        for length in lengths:
            alone = run(model, ids[row : row + 1, start : start + length])
            torch.testing.assert_close(packed.logits[row, start : start + length], alone.logits[0], **CLOSE)
            here = torch.zeros(2, 12, dtype=torch.bool)
            here[row, start : start + length] = True
            for layer, plan in alone.plans.items():
                same_routing(packed.plans[layer], plan, here, torch.ones(1, length, dtype=torch.bool))
            start += length
    whole = run(model, ids).logits
    assert not torch.allclose(whole[0, 6:], packed.logits[0, 6:], atol=1e-2)  # masking does something


# ---- padding --------------------------------------------------------------------------------------------------------


def padded(text: Tensor, left: int, right: int, others: int, fill: int) -> tuple[Tensor, Tensor]:
    """``text`` (L,) as row 0 of a batch, with other texts of other lengths below it."""
    width = left + len(text) + right
    ids, valid = torch.full((1 + others, width), fill), torch.zeros(1 + others, width, dtype=torch.bool)
    ids[0, left : left + len(text)] = text
    valid[0, left : left + len(text)] = True
    for other in range(1, 1 + others):
        length = 1 + (other * 5) % width
        ids[other, :length] = some_ids(1, length, seed=other)[0]
        valid[other, :length] = True
    return ids, valid


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 5), (2, 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_gives_the_same_alone_and_inside_a_padded_batch(name: str, left: int, right: int) -> None:
    model = lively(CONFIGS[name])
    text = some_ids(1, 9)
    alone = run(model, text)
    for fill in (0, VOCAB - 1, -1, 10**9):  # padding may hold any number, even one outside the vocabulary
        ids, valid = padded(text[0], left, right, others=3, fill=fill)
        batch = run(model, ids, valid_BS=valid)
        torch.testing.assert_close(batch.logits[0, left : left + 9], alone.logits[0], **CLOSE)
        mine = valid.clone()
        mine[1:] = False
        for layer, plan in alone.plans.items():
            same_routing(batch.plans[layer], plan, mine, torch.ones(1, 9, dtype=torch.bool))
        assert bool(batch.logits.isfinite().all())


@pytest.mark.parametrize("router", ["topk", "switch", "gshard", "noisy_topk"])
def test_padding_is_in_no_statistic(router: str) -> None:
    """Readings and losses of a padded batch equal those of the same texts without a single padding position."""
    model = lively(sparse(router))
    model.train(router == "noisy_topk")
    for module in model.modules():
        if router == "noisy_topk" and hasattr(module, "noise_gate"):
            module.eval()  # noise differs by position: compare the clean gate
    text = some_ids(1, 9)
    ids, valid = padded(text[0], 3, 2, others=0, fill=7)
    alone, batch = run(model, text), run(model, ids, valid_BS=valid)
    for layer, plan in alone.plans.items():
        other = batch.plans[layer]
        assert isinstance(plan, RoutingPlan)
        assert isinstance(other, RoutingPlan)
        assert not experts_of(other, 1, 14)[~valid].lt(other.num_experts).any()
        assert bool((other.weight_TK[~valid.flatten()] == 0).all())
        assert torch.equal(read.load(other), read.load(plan))
        assert int(read.load(other).sum()) == 9 * model.moe_layers()[layer].router.k
        assert torch.equal(other.counts_E, plan.counts_E)
        assert int(other.num_valid) == 9
        for reading in (read.router_entropy, read.margin, read.drop_rate):
            torch.testing.assert_close(reading(other).double(), reading(plan).double(), **CLOSE)
        torch.testing.assert_close(read.co_activation(other), read.co_activation(plan))
        for name, loss in LOSSES.items():
            if name == "prototype":  # needs the router's inputs, kept in training on request
                continue
            options = dict.fromkeys(loss.required, 2)
            values = [loss(one, LossContext(), **options) for one in (other, plan)]
            torch.testing.assert_close(values[0], values[1], **CLOSE, msg=name)
        ctx = LossContext(1, "sequence")
        torch.testing.assert_close(LOSSES["switch"](other, ctx), LOSSES["switch"](plan, ctx), **CLOSE)


@pytest.mark.parametrize("groups", [1, 2])
def test_padding_neither_takes_slots_nor_counts_as_dropped(groups: int) -> None:
    rule = CapacityRule(factor=0.5, eval_factor=0.5, minimum=0, groups=groups)
    model = lively(sparse(capacity=rule, router=RouterConfig("topk", allow_leak=True)))
    text = some_ids(1, 16)
    ids, valid = padded(text[0], 6, 4, others=0, fill=3)
    alone, batch = run(model, text), run(model, ids, valid_BS=valid)
    for layer in (0, 1):
        a, b = alone.plans[layer], batch.plans[layer]
        assert int(a.dropped) > 0  # type: ignore[union-attr]
        assert int(b.dropped) == int(a.dropped)  # type: ignore[union-attr]
        same_routing(b, a, valid, torch.ones(1, 16, dtype=torch.bool))
    torch.testing.assert_close(batch.logits[0, 6:22], alone.logits[0], **CLOSE)


def test_an_all_padding_row_harms_nobody() -> None:
    model = lively(sparse(shared=1))
    valid = torch.tensor([[True] * 5, [False] * 5])
    output = model(some_ids(2, 5), valid_BS=valid)
    torch.testing.assert_close(output.logits[0], run(model, some_ids(2, 5)[:1]).logits[0], **CLOSE)
    output.logits[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    nobody = run(model, some_ids(1, 4), valid_BS=torch.zeros(1, 4, dtype=torch.bool))
    assert int(read.load(nobody.plans[0]).sum()) == 0
    assert bool(nobody.logits.isfinite().all())


# ---- the cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1, 1, 1), (1, 3, 4, 3), (11,), (7, 4)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_through_a_cache_equal_one_forward(name: str, chunks: tuple[int, ...]) -> None:
    model = lively(CONFIGS[name])
    ids = some_ids(2, 11)
    full = run(model, ids)
    cache, start = model.new_cache(2, 12), 0
    for size in chunks:
        with torch.no_grad():
            output = model(ids[:, start : start + size], cache=cache)
        torch.testing.assert_close(output.logits, full.logits[:, start : start + size], **CLOSE)
        here = torch.zeros(2, 11, dtype=torch.bool)
        here[:, start : start + size] = True
        for layer, plan in output.plans.items():
            same_routing(full.plans[layer], plan, here, torch.ones(2, size, dtype=torch.bool))
        start += size
        assert output.cache is cache
        assert cache.length == start


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_logits_alone_are_those_of_all(name: str) -> None:
    model, ids = lively(CONFIGS[name]), some_ids(2, 9)
    full = run(model, ids)
    with torch.no_grad():
        last = model(ids, last_only=True)
        cache = model.new_cache(2, 9)
        parts = [model(ids[:, begin:end], cache=cache, last_only=True).logits for begin, end in ((0, 6), (6, 9))]
    assert last.logits.shape == (2, 1, VOCAB)
    torch.testing.assert_close(last.logits, full.logits[:, -1:], **CLOSE)
    torch.testing.assert_close(torch.cat(parts, dim=1), full.logits[:, [5, 8]], **CLOSE)
    for layer, plan in full.plans.items():  # every position was routed all the same
        same_routing(plan, last.plans[layer], *[torch.ones(2, 9, dtype=torch.bool)] * 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_mask_that_masks_nothing_changes_nothing(name: str) -> None:
    model, ids = lively(CONFIGS[name]), some_ids(2, 9)
    valid = torch.ones(2, 9, dtype=torch.bool)
    plain, masked = run(model, ids), run(model, ids, valid_BS=valid)
    torch.testing.assert_close(masked.logits, plain.logits, **CLOSE)
    for masks in ((True, False), (False, True)):  # masked then not, and the other way round
        cache = model.new_cache(2, 9)
        parts = [
            run(model, ids[:, places], valid_BS=valid[:, places] if mask else None, cache=cache).logits
            for mask, places in zip(masks, (slice(0, 5), slice(5, 9)), strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), plain.logits, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padded_prompts_through_a_cache_equal_each_alone(name: str) -> None:
    model = lively(CONFIGS[name])
    texts = [some_ids(1, n, seed=n)[0] for n in (6, 2, 9)]
    width = 5
    prompt, valid = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.bool)
    heads = [min(width, len(t) - 1) for t in texts]
    for row, (text, n) in enumerate(zip(texts, heads, strict=True)):
        prompt[row, width - n :] = text[:n]
        valid[row, width - n :] = True
    cache = model.new_cache(3, 20)
    with torch.no_grad():
        logits = [model(prompt, valid_BS=valid, cache=cache).logits]
        for step in range(4):  # after the prompt no mask is given: the cache remembers the padding
            column = torch.stack([t[min(n + step, len(t) - 1)] for t, n in zip(texts, heads, strict=True)])[:, None]
            logits.append(model(column, cache=cache).logits)
    together = torch.cat(logits, dim=1)
    for row, (text, n) in enumerate(zip(texts, heads, strict=True)):
        alone = run(model, text[None]).logits[0]
        usable = min(len(text), n + 4)
        torch.testing.assert_close(together[row, width - n : width - n + usable], alone[:usable], **CLOSE)


def test_what_is_too_long_is_refused_in_words() -> None:
    model = lively(tiny(max_seq_len=8))
    with pytest.raises(MoesaicError, match="The input is 9 tokens long, but this model's context is 8; shorten it."):
        model(some_ids(1, 9))
    cache = model.new_cache(1, 6)
    run(model, some_ids(1, 5), cache=cache)  # type: ignore[arg-type]
    with pytest.raises(MoesaicError, match="holds 6 positions; 5 are used and 2 more do not fit"):
        model(some_ids(1, 2), cache=cache)
    large = model.new_cache(1, 100)
    run(model, some_ids(1, 5), cache=large)  # type: ignore[arg-type]
    with pytest.raises(MoesaicError, match="The input is 9 tokens long"):
        model(some_ids(1, 4), cache=large)
    assert (cache.length, large.length) == (5, 5)
    with pytest.raises(MoesaicError, match="one document per row"):
        model(some_ids(1, 1), cache=cache, document_BS=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_outside_the_vocabulary_is_refused_in_words(token: int) -> None:
    with pytest.raises(MoesaicError, match=f"Token {token} is outside this model's vocabulary of {VOCAB}"):
        lively(tiny())(torch.tensor([[1, token, 2]]))


# ---- precision and context ------------------------------------------------------------------------------------------


def test_bf16_activations_leave_router_and_parameters_in_fp32() -> None:
    model = lively(sparse(shared=1, constant=1, k=3))
    exact = run(model, some_ids(2, 8)).logits
    model.compute_dtype = torch.bfloat16
    seen = []
    for layer in model.moe_layers().values():
        layer.experts.register_forward_pre_hook(lambda _m, args: seen.append(args[0].dtype))
    output = model(some_ids(2, 8))
    assert output.logits.dtype == torch.bfloat16
    assert seen == [torch.bfloat16] * 2
    for plan in output.plans.values():
        assert plan.gate.logits_TE.dtype == plan.gate.probs_TE.dtype == plan.weight_N.dtype == torch.float32
    # Near-ties may go to the other expert in half precision, so compare what is typical and not the worst.
    assert (output.logits.float() - exact).abs().median() < 0.1 * exact.abs().median()
    output.logits.float().sum().backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
    assert model.new_cache(1, 4).keys[0].dtype == torch.bfloat16


def test_routers_are_told_what_they_may_need() -> None:
    model = lively(sparse())
    told: list[TokenContext] = []
    model.moe_layers()[0].router.register_forward_pre_hook(lambda _m, args: told.append(args[1]))
    ids, tasks = some_ids(2, 4), torch.tensor([[3, 3, 4, 4], [0, 1, 2, 3]])
    valid = torch.tensor([[False, True, True, True], [True] * 4])
    generator = torch.Generator()
    documents = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
    model(ids, valid_BS=valid, task_BS=tasks, document_BS=documents, generator=generator)
    (ctx,) = told
    assert ctx.ids_T is not None
    assert torch.equal(ctx.ids_T[1:], ids.flatten()[1:])
    assert ctx.position_T is not None
    assert ctx.position_T.tolist() == [0, 0, 1, 0, 0, 1, 0, 1]
    assert ctx.sequence_T is not None
    assert ctx.sequence_T.tolist() == [0] * 4 + [1] * 4
    assert ctx.valid_T is not None
    assert torch.equal(ctx.valid_T, valid.flatten())
    assert ctx.task_T is not None
    assert torch.equal(ctx.task_T, tasks.flatten())
    assert ctx.generator is generator


def test_every_parameter_gets_a_gradient_even_of_experts_without_a_token() -> None:
    model = build_model(sparse(num_experts=16, k=2, constant=1), seed=0)
    model(some_ids(1, 2)).logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    stacked = model.moe_layers()[0].experts.stacked.w_in.grad
    assert int((stacked.abs().sum((1, 2)) == 0).sum()) >= 12
