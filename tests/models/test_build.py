"""From a config to weights: what is drawn, from which seed, with which spread."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.cost.count import count_parameters
from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.models import ModelConfig, MoEConfig, RouterConfig, build_model, dense_twin
from moesaic.plan import CapacityRule
from moesaic.routing import ROUTERS, Facts, TopK
from tests.models.tiny import lively, some_ids, sparse, tiny

# A normal distribution cut at two standard deviations is narrower by this factor: sqrt(1 - 4 pdf(2) / (2 cdf(2) - 1)).
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))

WIDE = ModelConfig(
    vocab_size=512,
    dim=128,
    num_layers=3,
    num_heads=4,
    hidden=320,
    tie_embeddings=False,
    attention_bias="all",
    moe=MoEConfig(num_experts=4, k=2, hidden=200, shared=1, dense_first=1, constant=1),
)


def check_spread(weight: Tensor, std: float) -> None:
    assert weight.std().item() == pytest.approx(std * CUT, rel=0.03)
    assert abs(weight.mean().item()) < 0.05 * std
    assert weight.abs().max().item() <= 2 * std * 1.0001


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_every_matrix_has_the_spread_of_its_own_fan_in(scale: float) -> None:
    model = build_model(replace(WIDE, init_scale=scale), seed=0)
    weights = dict(model.named_parameters())
    depth = 1 / (2 * 3)
    dense, first = "blocks.0.", "blocks.1."
    for name in ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"):
        check_spread(weights[dense + name], math.sqrt(scale / 128))
    check_spread(weights[dense + "attention.wo.weight"], math.sqrt(scale * depth / 128))
    check_spread(weights[dense + "ffn.w_in.weight"], math.sqrt(scale / 128))
    check_spread(weights[dense + "ffn.w_out.weight"], math.sqrt(scale * depth / 320))
    check_spread(weights[first + "ffn.shared.mlp.w_out.weight"], math.sqrt(scale * depth / 200))
    check_spread(weights["head.weight"], math.sqrt(scale / 128))
    for expert in range(4):  # fan-in per expert: D for the input, H for the output, never E * something
        check_spread(weights[first + "ffn.experts.stacked.w_in"][expert], math.sqrt(scale / 128))
        check_spread(weights[first + "ffn.experts.stacked.w_out"][expert], math.sqrt(scale * depth / 200))
    assert weights["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights[first + "ffn.router.gate.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert all(bool((p == 0).all()) for n, p in weights.items() if n.endswith(("bias", "constant_v")))
    assert all(bool((p == 1).all()) for n, p in weights.items() if "norm" in n and n.endswith("weight"))


def test_experts_and_layers_start_different() -> None:
    weights = dict(build_model(WIDE, seed=0).named_parameters())
    stacks = [weights[f"blocks.{i}.ffn.experts.stacked.w_in"][e] for i in (1, 2) for e in range(4)]
    for i, one in enumerate(stacks):
        assert all(not torch.equal(one, other) for other in stacks[:i])
        assert all(abs(torch.corrcoef(torch.stack([one.flatten(), o.flatten()]))[0, 1]) < 0.05 for o in stacks[:i])


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, two, other = (build_model(WIDE, seed=s) for s in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        constant = name.endswith(("bias", "constant_v")) or "norm" in name
        assert torch.equal(a, c) == constant, name


def test_without_a_seed_the_callers_random_state_is_used() -> None:
    torch.manual_seed(4)
    drawn = build_model(WIDE)
    seeded = build_model(WIDE, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), seeded.parameters(), strict=True))
    assert not torch.equal(build_model(WIDE).embedding.weight, drawn.embedding.weight)


def test_building_on_the_meta_device_allocates_nothing_and_draws_nothing() -> None:
    huge = ModelConfig(
        vocab_size=100_000,
        dim=4096,
        num_layers=4,
        num_heads=32,
        hidden=16384,
        moe=MoEConfig(num_experts=256, hidden=2048),
    )
    state = torch.get_rng_state()
    model = build_model(huge, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) > 25e9
    real, meta = build_model(WIDE, seed=0), build_model(WIDE, device="meta")
    assert [(n, p.shape) for n, p in real.named_parameters()] == [(n, p.shape) for n, p in meta.named_parameters()]


def test_tied_and_untied_heads() -> None:
    tied, untied = build_model(tiny(), seed=0), build_model(tiny(tie_embeddings=False), seed=0)
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert untied.head.weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 64 * 16
    assert tied.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    tied(some_ids(1, 5)).logits.sum().backward()
    assert tied.embedding.weight.grad is not None


@pytest.mark.parametrize(("norm", "kind"), [("rmsnorm", "RMSNorm"), ("layernorm", "LayerNorm")])
def test_the_named_norm_is_everywhere(norm: str, kind: str) -> None:
    model = build_model(tiny(norm=norm, norm_eps=3e-4), seed=0)
    norms = [m for n, m in model.named_modules() if n.rsplit(".")[-1].startswith("norm")]
    assert len(norms) == 5
    assert {(type(m).__name__, m.eps) for m in norms} == {(kind, 3e-4)}


def test_settings_reach_the_modules() -> None:
    config = tiny(
        MoEConfig(num_experts=4, hidden=8, backend="loop", shared=1),
        activation="relu",
        qk_norm="head",
        sliding_window=(3, 0),
    )
    model = build_model(config, seed=0)
    first, second = model.blocks
    assert (first.attention.window, second.attention.window) == (3, None)
    assert first.attention.q_norm is not None
    assert (first.attention.layer, second.attention.layer) == (0, 1)
    layer = model.moe_layers()[0]
    assert (layer.experts.activation, layer.experts.backend, layer.experts.gated) == ("relu", "loop", True)
    assert layer.shared is not None
    assert layer.shared.mlp.activation == "relu"


def test_a_router_or_loss_that_cannot_be_is_refused_in_words() -> None:
    for config, words in [
        (sparse("topkk"), 'There is no router "topkk". Did you mean "topk"?'),
        (sparse("topk", {"normalise": "none"}), 'Router "topk" has no option "normalise". Did you mean "normalize"?'),
        (
            sparse("topk", k=1),
            'k=1 with normalize="chosen" makes every weight exactly 1, so the router gets no gradient',
        ),
        (sparse("switch", k=2), 'Router "switch" sends every token to one expert, so k must be 1, not 2'),
        (sparse(losses={"swich": 0.1}), 'There is no balancing loss "swich". Did you mean "switch"?'),
        (sparse(losses={"load": 0.1}), 'Loss "load" needs the load estimate of a noisy gate, and TopK has none'),
    ]:
        with pytest.raises(ConfigError) as caught:
            build_model(config, seed=0)
        assert str(caught.value).startswith(words)


class _Peeking(TopK):
    facts = Facts(causal=False)


def test_a_router_that_looks_ahead_is_refused_unless_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "peeking", _Peeking)
    with pytest.raises(ConfigError, match='Router "peeking" looks at later tokens.*allow_leak=true'):
        build_model(sparse("peeking"), seed=0)
    config = sparse("peeking")
    assert config.moe is not None
    asked = replace(config, moe=replace(config.moe, router=RouterConfig("peeking", allow_leak=True)))
    assert isinstance(build_model(asked, seed=0).moe_layers()[0].router, _Peeking)


def test_casting_a_model_keeps_its_routers_in_fp32() -> None:
    model = build_model(sparse("topk", {"gate_bias": True, "balance_bias": True}, shared=1), seed=0).to(torch.bfloat16)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    plan = model(some_ids(2, 6)).plans[0]
    assert plan.gate.logits_TE.dtype == plan.weight_N.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("fact", ["causal", "batch_invariant"])
def test_a_router_that_leaks_must_be_asked_for(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = type("Leaky", (TopK,), {"facts": Facts(**{fact: False})})
    monkeypatch.setitem(ROUTERS, "leaky", leaky)
    with pytest.raises(ConfigError, match='"leaky" looks at .*allow_leak=true'):
        build_model(sparse("leaky"), device="meta")
    build_model(sparse(RouterConfig("leaky", allow_leak=True)), device="meta")


def test_capacity_in_evaluation_must_be_asked_for() -> None:
    rule = CapacityRule(eval_factor=2.0)
    with pytest.raises(ConfigError, match=r"eval_factor=2.0 drops tokens in evaluation .*allow_leak=true"):
        build_model(sparse(capacity=rule), device="meta")
    build_model(sparse(RouterConfig(allow_leak=True), capacity=rule), device="meta")


def test_reset_reaches_constant_experts() -> None:
    layer = MoE(8, 8, 2, k=2, constant=2)
    with torch.no_grad():
        layer.experts.constant_v.fill_(7)
        layer.experts.constant_mix.fill_(7)
    layer.reset_parameters()
    assert (layer.experts.constant_v == 0).all()
    assert layer.experts.constant_mix.abs().max() < 1


def test_an_input_of_another_width_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="built for dim=8, but its input is 6 wide"):
        MoE(8, 8, 2)(torch.zeros(3, 6))


@pytest.mark.parametrize("router", ["topk", "noisy_topk", "gshard"])
def test_twin_counts_every_matrix_of_the_router(router: str) -> None:
    config = tiny(MoEConfig(num_experts=64, k=2, hidden=32, router=RouterConfig(router), losses={}))
    model, twin = build_model(config, device="meta"), build_model(dense_twin(config), device="meta")
    unit = 3 * config.dim * config.num_layers
    assert abs(count_parameters(model).active - count_parameters(twin).active) <= unit / 2


def test_a_document_number_used_twice_means_two_documents() -> None:
    model = lively(sparse())
    ids = some_ids(1, 12)
    reused = torch.tensor([[0] * 4 + [1] * 4 + [0] * 4])
    fresh = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])
    assert torch.equal(model(ids, document_BS=reused).logits, model(ids, document_BS=fresh).logits)
