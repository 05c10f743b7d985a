"""Mixture-of-Depths blocks against a loop over tokens in both modes; caches, padding, documents, experts inside. In fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.checkpoint.native import load_model, save_model
from moesaic.cost.count import count_parameters
from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.infer.token_loop import generate_ids
from moesaic.lens.intervene import edit, trace
from moesaic.models import Decoder, DepthConfig, ModelConfig, MoEConfig, Output, RouterConfig, build_model, dense_twin
from moesaic.models.depth import DepthBlock
from moesaic.nn.attention import AttentionContext
from moesaic.nn.rope import rope_tables
from moesaic.plan import RoutingPlan, read
from moesaic.plan.capacity import CapacityRule
from tests.models.tiny import lively, some_ids, tiny

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
DEPTH = DepthConfig(capacity=0.4, every=2, allow_leak=True)
EXPERTS = MoEConfig(num_experts=4, k=2, hidden=12, losses={})


def config(moe: MoEConfig | None = None, depth: DepthConfig = DEPTH, **changes: Any) -> ModelConfig:
    return replace(tiny(moe, num_layers=3, **changes), depth=depth)


def routed(name: str, options: dict[str, Any], depth: DepthConfig = DEPTH, **changes: Any) -> ModelConfig:
    return config(replace(EXPERTS, router=RouterConfig(name, options, allow_leak=True), **changes), depth)


CONFIGS = {
    "dense": config(),
    "experts inside": config(EXPERTS),
    "every block": config(EXPERTS, replace(DEPTH, every=1)),
    "sigmoid, linear predictor": config(EXPERTS, replace(DEPTH, options={"weight": "sigmoid", "predictor_hidden": 0})),
    "window": config(EXPERTS, sliding_window=3),
    "post-norm": config(EXPERTS, norm_placement="post", norm="layernorm"),
    "one key head, shared": config(replace(EXPERTS, shared=1, zero=1), num_kv_heads=1, qk_norm="head"),
}
# Routers that look back must count positions among the tokens that arrived; loose rows and sub-tokens must come back right.
ROUTED = {
    "conv": routed("conv", {"width": 3}),
    "attention": routed("attention", {"head_dim": 4}),
    "segment": routed("segment", {"segment_len": 2, "coupling": 0.3}),
    "recurrent": routed("recurrent", {"hidden": 8}),
    "multi-head": routed("conv", {"width": 3}, heads=2),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
every_model = pytest.mark.parametrize("name", CONFIGS | ROUTED)


def model_of(name: str, training: bool = False, dtype: torch.dtype = torch.float64) -> Decoder:
    """A lively model whose depth routers and predictors say all kinds of things."""
    model = lively((CONFIGS | ROUTED)[name]).to(dtype)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for router in model.depth_routers().values():
            for parameter in router.parameters():
                parameter.normal_(std=0.6, generator=rng)
        for layer in model.moe_layers().values():
            for parameter in layer.router.parameters():
                parameter.normal_(std=0.6, generator=rng)
    return model.train(training)


def run(model: Decoder, ids_BS: Tensor, **more: Any) -> Output:
    with torch.no_grad():
        output: Output = model(ids_BS, **more)
    return output


def taken(output: Output, layer: int) -> Tensor:
    """bool (B, S)."""
    return output.depth[layer].kept_N.view(output.logits.shape[:2])


# ---- a loop over tokens ----------------------------------------------------------------------------------------------


def by_loop(
    model: Decoder, ids: list[int], documents: list[int]
) -> tuple[Tensor, dict[int, list[int]], dict[int, Any]]:
    """One row of real tokens: logits, the tokens each depth block takes, and the experts of each token in sparse blocks."""
    position = [documents[:t].count(documents[t]) for t in range(len(ids))]
    x = list(model.embedding.weight[ids])
    chosen_by: dict[int, list[int]] = {}
    experts_by: dict[int, Any] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block.attention, nn.Module)
        chosen, weight = list(range(len(ids))), [torch.ones((), dtype=x[0].dtype)] * len(ids)
        if isinstance(block, DepthBlock):
            scores = [block.depth.gate.weight[0] @ vector for vector in x]
            if model.training:
                room = math.ceil(block.depth.capacity * len(ids) - 1e-9)
                chosen = sorted(sorted(chosen, key=lambda t: (-scores[t].item(), t))[:room])
            else:
                chosen = [t for t in chosen if predicted(block, x[t]).item() > 0]
            weight = [s.sigmoid() if block.depth.weight == "sigmoid" else s for s in scores]
            chosen_by[layer] = chosen
        experts_by[layer] = {}
        if not chosen:
            continue
        old = torch.stack([x[t] for t in chosen])
        new = through(
            block, old, [position[t] for t in chosen], [documents[t] for t in chosen], model.config.rope_theta
        )
        for i, t in enumerate(chosen):
            y, plan = new[i]
            x[t] = x[t] + weight[t] * (y - x[t])
            if plan is not None:
                experts_by[layer][t] = sorted(plan.expert_N[plan.kept_N].tolist())
    return torch.stack([model.head(model.norm(vector)) for vector in x]), chosen_by, experts_by


def predicted(block: DepthBlock, vector: Tensor) -> Tensor:
    router = block.depth
    if router.hidden is not None:
        vector = nn.functional.silu(router.hidden.weight @ vector + router.hidden.bias)
    assert router.predictor.bias is not None
    return (router.predictor.weight @ vector + router.predictor.bias)[0]


def through(block: Any, x: Tensor, position: list[int], document: list[int], theta: float) -> Iterator[Any]:
    """The whole block for these tokens alone: who may see whom is written out, and experts work token by token."""
    n, window = len(x), block.attention.window
    mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            near = window is None or position[i] - position[j] < window
            mask[0, 0, i, j] = document[i] == document[j] and near
    ctx = AttentionContext(*rope_tables(torch.tensor([position]), block.attention.head_dim, theta), {window: mask})
    if block.pre:
        middle = x + block.attention(block.norm1(x[None]), ctx)[0]
    else:
        middle = block.norm1(x[None] + block.attention(x[None], ctx))[0]
    results = []
    for vector in middle:
        answer = block.ffn((block.norm2(vector) if block.pre else vector)[None])
        y, plan = answer if isinstance(answer, tuple) else (answer, None)
        results.append((vector + y[0] if block.pre else block.norm2(vector + y[0]), plan))
    return results  # type: ignore[return-value]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@every_config
def test_outputs_choices_and_all_gradients_are_those_of_a_loop(name: str, training: bool) -> None:
    """Three rows, padded left and right, two of them of several documents."""
    model = model_of(name, training)
    ids = some_ids(3, 12)
    spans, documents = [(0, 12), (3, 12), (1, 8)], torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 4 + [1] * 8])
    valid = torch.zeros(3, 12, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        valid[row, start:stop] = True
    output = model(ids, valid_BS=valid, document_BS=documents)
    upstream = torch.randn(output.logits.shape, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for row, (start, stop) in enumerate(spans):
        logits, chosen, experts = by_loop(model, ids[row, start:stop].tolist(), documents[row, start:stop].tolist())
        torch.testing.assert_close(output.logits[row, start:stop], logits, **CLOSE)
        total = total + (logits * upstream[row, start:stop]).sum()
        for layer, tokens in chosen.items():
            assert taken(output, layer)[row].nonzero().flatten().tolist() == [start + t for t in tokens]
        for layer, plan in output.plans.items():
            assert isinstance(plan, RoutingPlan)
            for t in range(12):
                here = plan.kept_N & (plan.token_N == row * 12 + t)
                assert sorted(plan.expert_N[here].tolist()) == experts[layer].get(t - start, [])
    fast = torch.where(valid[:, :, None], output.logits * upstream, 0.0).sum()
    named = dict(model.named_parameters())
    found, expected = (torch.autograd.grad(loss, list(named.values()), allow_unused=True) for loss in (fast, total))
    moved = 0
    for key, one, other in zip(named, found, expected, strict=True):
        zero = torch.zeros_like(named[key])
        torch.testing.assert_close(
            one if one is not None else zero, other if other is not None else zero, **CLOSE, msg=key
        )
        moved += one is not None and bool(one.any())
    assert moved > len(named) / 2


@every_config
def test_training_computes_only_the_chosen(name: str) -> None:
    model = model_of(name, training=True)
    seen: list[tuple[int, ...]] = []
    for layer in model.depth_routers():
        model.blocks[layer].attention.wq.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))  # type: ignore[union-attr]
    output = run(model, some_ids(2, 10))
    assert set(seen) == {(2, 4, 16)}  # ceil(0.4 * 10)
    for layer in model.depth_routers():
        assert taken(output, layer).sum(dim=1).tolist() == [4, 4]


@pytest.mark.parametrize("training", [True, False])
@every_model
def test_who_skips_passes_unchanged_bit_for_bit(name: str, training: bool) -> None:
    model = model_of(name, training)
    record: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in model.depth_routers():
        model.blocks[layer].register_forward_hook(
            lambda _m, args, out: record.append((args[0], out[0], out[2].kept_N.view(args[0].shape[:2])))
        )
    run(model, some_ids(3, 11))
    for before, after, chosen in record:
        assert torch.equal(before[~chosen], after[~chosen])
        assert bool((before[chosen] != after[chosen]).any(dim=1).all())
        assert bool(chosen.any())
        assert not bool(chosen.all())


# ---- causality -------------------------------------------------------------------------------------------------------


@every_model
def test_evaluation_looks_at_no_later_token_and_at_no_other_row(name: str) -> None:
    model, ids = model_of(name), some_ids(3, 11)
    full = run(model, ids)
    for length in (1, 4, 8):
        part = run(model, ids[1:2, :length])
        torch.testing.assert_close(full.logits[1, :length], part.logits[0], **CLOSE)
        for layer in part.depth:
            assert torch.equal(taken(full, layer)[1, :length], taken(part, layer)[0])


def test_training_does_look_at_later_tokens() -> None:
    model, leaked = model_of("dense", training=True), False
    for seed in range(10):
        ids = some_ids(1, 11, seed=seed)
        other = ids.clone()
        other[0, 10] = (ids[0, 10] + 1 + seed) % 64
        leaked |= bool((run(model, ids).logits[0, :10] - run(model, other).logits[0, :10]).abs().max() > 1e-3)
    assert leaked


# ---- caches, padding, documents --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(5, *[1] * 6), (1, 3, 4, 3), (11,)], ids=str)
@every_model
def test_pieces_through_a_cache_equal_one_forward(name: str, chunks: tuple[int, ...]) -> None:
    model, ids = model_of(name), some_ids(3, 11)
    full, cache, start = run(model, ids), model.new_cache(3, 12), 0
    for size in chunks:
        part = run(model, ids[:, start : start + size], cache=cache)
        torch.testing.assert_close(part.logits, full.logits[:, start : start + size], **CLOSE)
        for layer in part.depth:
            assert torch.equal(taken(part, layer), taken(full, layer)[:, start : start + size])
        for layer, plan in part.plans.items():
            whole = full.plans[layer]
            assert isinstance(plan, RoutingPlan)
            assert isinstance(whole, RoutingPlan)
            expert, wanted = (p.expert_TK.view(3, n, -1) for p, n in ((plan, size), (whole, 11)))
            assert torch.equal(expert, wanted[:, start : start + size])
        start += size
    for layer in full.depth:
        assert torch.equal(cache.held[layer][:, :11], taken(full, layer))


@every_model
def test_a_left_padded_batch_decodes_as_each_text_alone(name: str) -> None:
    model, ids = model_of(name), some_ids(2, 9)
    alone = [run(model, ids[:1]), run(model, ids[1:, :6])]
    padded = torch.cat([ids[:1], torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids[1:, :6]], dim=1)])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :3] = False
    cache = model.new_cache(2, 9)
    logits = torch.cat(
        [
            run(model, padded[:, places], valid_BS=valid[:, places], cache=cache).logits
            for places in (slice(0, 5), slice(5, 6), slice(6, 8), slice(8, 9))
        ],
        dim=1,
    )
    torch.testing.assert_close(logits[0], alone[0].logits[0], **CLOSE)
    torch.testing.assert_close(logits[1, 3:], alone[1].logits[0], **CLOSE)


@pytest.mark.parametrize("training", [True, False])
@every_model
def test_padding_changes_nothing_and_may_be_all_there_is(name: str, training: bool) -> None:
    model, text = model_of(name, training), some_ids(1, 8)
    alone = run(model, text)
    ids, valid = torch.full((2, 14), -1), torch.zeros(2, 14, dtype=torch.bool)
    ids[0, 3:11], valid[0, 3:11] = text[0], True
    batch = run(model, ids, valid_BS=valid)
    torch.testing.assert_close(batch.logits[0, 3:11], alone.logits[0], **CLOSE)
    assert bool(batch.logits.isfinite().all())
    for layer, plan in batch.depth.items():
        assert not bool(taken(batch, layer)[~valid].any())
        assert torch.equal(taken(batch, layer)[0, 3:11], taken(alone, layer)[0])
        assert int(plan.num_valid) == 8
    for layer, inner in batch.plans.items():
        assert torch.equal(read.load(inner), read.load(alone.plans[layer]))


@every_model
def test_a_document_reads_the_same_packed_or_alone(name: str) -> None:
    """In evaluation; in training packed documents compete for the row's places."""
    model, ids = model_of(name), some_ids(2, 12)
    packed = run(model, ids, document_BS=torch.tensor([[0] * 5 + [1] * 7] * 2))
    for places in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(packed.logits[:, places], run(model, ids[:, places]).logits, **CLOSE)


def silent(name: str) -> Decoder:
    """A model whose predictors take nobody."""
    model = model_of(name)
    with torch.no_grad():
        for router in model.depth_routers().values():
            router.predictor.weight.zero_()
            router.predictor.bias.fill_(-1.0)  # type: ignore[union-attr]
    return model


@every_model
def test_a_step_in_which_no_row_is_chosen_computes_nothing(name: str) -> None:
    model, ids = silent(name), some_ids(2, 6)
    rows, attended = [], []
    for layer in model.depth_routers():
        block: Any = model.blocks[layer]
        block.attention.register_forward_hook(lambda *_: attended.append(1))
        if isinstance(block.ffn, MoE):
            block.ffn.experts.register_forward_pre_hook(lambda _m, args: rows.append(int(args[1].sum())))
        else:
            block.ffn.register_forward_hook(lambda *_: attended.append(1))
    cache = model.new_cache(2, 6)
    outputs = [run(model, ids[:, places], cache=cache) for places in (slice(0, 4), slice(4, 5), slice(5, 6))]
    assert not attended
    assert sum(rows) == 0
    torch.testing.assert_close(torch.cat([o.logits for o in outputs], dim=1), run(model, ids).logits, **CLOSE)
    for layer, sparse in model.moe_layers().items():
        plan = outputs[0].plans[layer]
        assert plan.num_tokens == 8 * getattr(sparse, "heads", 1)
        if layer in outputs[0].depth:
            assert int(read.load(plan).sum()) == 0


@pytest.mark.parametrize("name", ["dense", "experts inside", "conv"])
def test_generation_does_not_depend_on_the_rows_beside(name: str) -> None:
    model = model_of(name)
    prompts = [[5, 9, 2, 30, 7], [11], [4, 4, 60]]
    together = generate_ids(model, prompts, max_new_tokens=8)
    for row, prompt in enumerate(prompts):
        assert generate_ids(model, [prompt], max_new_tokens=8).ids[0] == together.ids[row]


# ---- experts inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["experts inside", *ROUTED])
def test_tokens_that_skip_are_in_no_statistic_of_the_experts(name: str, training: bool) -> None:
    model = model_of(name, training)
    output = run(model, some_ids(2, 10))
    plan, chosen_T = output.plans[1], taken(output, 1).flatten()
    heads = plan.num_tokens // 20
    assert plan.valid_T is not None
    assert torch.equal(plan.valid_T, chosen_T.repeat_interleave(heads))
    assert int(read.load(plan).sum()) == 2 * heads * int(chosen_T.sum())
    assert int(read.load(output.plans[0]).sum()) == 2 * heads * 20  # an ordinary block takes everybody


def test_capacity_counts_the_tokens_that_arrive() -> None:
    """Eight chosen tokens, two experts each, four experts: with a factor of 0.5 every expert has two places."""
    rule = CapacityRule(factor=0.5, minimum=0)
    model = lively(config(replace(EXPERTS, capacity=rule))).train()
    output = run(model, some_ids(2, 10))
    assert int(taken(output, 1).sum()) == 8
    assert int(output.plans[1].counts_E.max()) <= 2
    assert int(output.plans[1].dropped) >= 8  # type: ignore[union-attr]


def test_a_state_passed_from_layer_to_layer_passes_by_those_who_skip() -> None:
    model = model_of("recurrent")
    output = run(model, some_ids(2, 10))
    states = [output.plans[layer].gate.extra["recurrent_TR"] for layer in (0, 1, 2)]  # type: ignore[union-attr]
    took = taken(output, 1).flatten()
    assert torch.equal(states[1][~took], states[0][~took])
    assert bool((states[1][took] != states[0][took]).any(dim=1).all())


@pytest.mark.parametrize("name", ["experts inside", "multi-head"])
def test_trace_knockout_and_replay_speak_of_the_whole_batch(name: str) -> None:
    model, ids = model_of(name), some_ids(2, 9)
    with trace(model) as recorded:
        plain = run(model, ids)
    for layer, plan in recorded.plans[0].items():
        assert torch.equal(plan.expert_N, plain.plans[layer].expert_N)  # type: ignore[union-attr]
    with edit(model, layer=1, knockout=[0, 1]):
        without = run(model, ids)
    assert without.plans[1].counts_E[:2].tolist() == [0, 0]
    assert int(plain.plans[1].counts_E[:2].sum()) > 0
    assert not torch.equal(without.logits, plain.logits)
    with torch.no_grad():
        for moe in model.moe_layers().values():
            moe.router.get_parameter("gate.weight").neg_()
    assert not torch.allclose(run(model, ids).logits, plain.logits, atol=1e-3)
    with edit(model, replay=recorded.plans[0]):  # type: ignore[arg-type]
        torch.testing.assert_close(run(model, ids).logits, plain.logits, **CLOSE)


# ---- building, counting, saving --------------------------------------------------------------------------------------


def test_which_blocks() -> None:
    for depth, layers in (
        ({}, [1, 3]),
        ({"every": 1}, [0, 1, 2, 3]),
        ({"every": 1, "first": 3}, [3]),
        ({"first": 1}, [2]),
    ):
        built = build_model(replace(tiny(num_layers=4), depth=DepthConfig(allow_leak=True, **depth)), device="meta")
        assert list(built.depth_routers()) == layers == list(built.config.depth_layers)
    assert tiny().depth_layers == ()


@pytest.mark.parametrize(
    ("depth", "words"),
    [
        ({"allow_leak": False}, '"mixture_of_depths" looks at later tokens in training.*model.depth.allow_leak=true'),
        ({"router": "mixture_of_depth"}, 'no depth router "mixture_of_depth". Did you mean "mixture_of_depths"'),
        ({"options": {"weigth": "score"}}, 'has no option "weigth". Did you mean "weight"'),
        ({"options": {"capacity": 0.5}}, 'has no option "capacity"'),
        ({"options": {"threshold": 2.0}}, "threshold must be between 0 and 1, not 2.0"),
        ({"capacity": 0.0}, "model.depth.capacity must be above 0 and at most 1, not 0.0"),
        ({"capacity": 1.1}, "model.depth.capacity must be above 0 and at most 1, not 1.1"),
        ({"every": 0}, "model.depth.every must be at least 1, not 0"),
        ({"first": -1}, "model.depth.first must be at least 0, not -1"),
        ({"every": 5}, "No block is a Mixture-of-Depths one: 3 layers with depth.first=0 and depth.every=5"),
    ],
)
def test_refusals(depth: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(config(depth=DepthConfig(**({"allow_leak": True} | depth))), device="meta")


@every_model
def test_every_parameter_is_counted_and_the_twin_is_of_the_same_depth(name: str) -> None:
    model = model_of(name)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters()) == sum(counts.parts.values())
    routers = model.depth_routers().values()
    assert counts.parts["depth router"] == sum(p.numel() for router in routers for p in router.parameters())
    twin = build_model(dense_twin(model.config), seed=0)
    assert list(twin.depth_routers()) == list(model.depth_routers())
    assert not twin.moe_layers()
    assert bool(run(twin, some_ids(2, 6)).logits.isfinite().all())


@every_model
def test_saving_and_loading_is_bitwise(name: str, tmp_path: Path) -> None:
    model, ids = model_of(name, dtype=torch.float32), some_ids(2, 9)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m").eval()
    assert again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(run(again, ids).logits, run(model, ids).logits)


def test_a_dense_model_becomes_one_by_adding_depth_routers() -> None:
    """The names of everything else stay, so weights of a model without depth fit."""
    plain = lively(tiny(EXPERTS, num_layers=3))
    missing, unexpected = build_model(config(EXPERTS), seed=5).load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".depth." in key for key in missing)


def test_half_precision_keeps_the_decision_in_fp32() -> None:
    model = model_of("experts inside", dtype=torch.float32).to(torch.bfloat16)
    output = run(model, some_ids(2, 9))
    assert output.logits.dtype == torch.bfloat16
    assert output.depth[1].weight_N.dtype == torch.float32
    assert all(p.dtype == torch.float32 for router in model.depth_routers().values() for p in router.parameters())
