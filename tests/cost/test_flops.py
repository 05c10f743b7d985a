"""FLOPs of whole models against PyTorch's own count of what runs, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.cost.flops import mean_keys, model_flops, part_flops
from moesaic.models import LatentConfig, MoEConfig, build_model
from moesaic.models.config import ModelConfig
from tests.models.tiny import tiny

MOE = MoEConfig(num_experts=4, k=2, hidden=12, backend="loop")
CONFIGS = {
    "dense": tiny(),
    "sparse": tiny(MOE),
    "wide heads": tiny(MOE, head_dim=10, num_kv_heads=1, tie_embeddings=False, gated=False),
    "shared": tiny(MoEConfig(num_experts=4, k=2, hidden=12, shared=1, dense_first=1, backend="loop")),
    "latent": tiny(num_kv_heads=None, latent=LatentConfig(6, 10, 4, 4, 5), tie_embeddings=False),
    "latent, straight queries": tiny(
        MOE, num_kv_heads=None, latent=LatentConfig(6, None, 4, 2, 9), attention_bias="all", num_heads=3
    ),
    "biases": tiny(
        MoEConfig(
            num_experts=4, k=2, hidden=12, dense_first=1, expert_bias=True, shared=1, shared_hidden=7, backend="loop"
        ),
        attention_bias="all",
        mlp_bias=True,
        activation="clamped_swiglu",
    ),
    "sinks, window, norms": tiny(attention_sinks=True, sliding_window=5, qk_norm="projection", attention_bias="qkv"),
    "heads": tiny(MoEConfig(num_experts=4, k=2, hidden=12, heads=2, backend="loop")),
}
B, S = 3, 32


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_is_what_pytorch_counts(name: str) -> None:
    """Attention by plain products, which compute the whole square: what the count has without ``causal``."""
    model = build_model(CONFIGS[name], seed=0)
    ids_BS = torch.randint(64, (B, S))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids_BS)
    stated = part_flops(CONFIGS[name], B * S, B, causal=False)
    assert counter.get_total_flops() / (B * S) == pytest.approx(sum(stated.values()), rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_backward_is_twice_the_forward(name: str) -> None:
    model = build_model(CONFIGS[name], seed=0).train()
    ids_BS = torch.randint(64, (B, S))
    with sdpa_kernel(SDPBackend.MATH):
        loss = model(ids_BS).logits.sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
    stated = 2 * sum(part_flops(CONFIGS[name], B * S, B, causal=False).values())
    assert counter.get_total_flops() / (B * S) == pytest.approx(stated, rel=1e-6)


def test_by_hand() -> None:
    config = ModelConfig(vocab_size=50, dim=8, num_layers=2, num_heads=4, num_kv_heads=2, hidden=20)
    parts = part_flops(config, 4, 1)
    projections = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8)  # heads are 2 wide; two key/value heads
    scores = 4 * 4 * 2 * 2.5  # two products, four heads, of 1, 2, 3 and 4 keys
    assert parts == {"attention": 2 * (projections + scores), "feed-forward": 2 * 2 * 3 * 8 * 20, "head": 2 * 8 * 50}
    assert model_flops(config, 4, 1) == parts["feed-forward"]


def test_latent_attention_by_hand() -> None:
    """3 heads of 2 + 2, values of 5: queries through 6, keys and values through 4 numbers and a rotary key of 2."""
    config = ModelConfig(vocab_size=50, dim=8, num_layers=1, num_heads=3, hidden=20, latent=LatentConfig(4, 6, 2, 2, 5))
    queries = 8 * 6 + 6 * 3 * 4
    keys_and_values = 8 * (4 + 2) + 4 * 3 * (2 + 5)
    scores = 2 * 3 * (4 + 5) * 2.5  # a score of 4 and a value of 5, three heads, 1, 2, 3 and 4 keys
    assert part_flops(config, 4, 1)["attention"] == 2 * (queries + keys_and_values + 3 * 5 * 8) + scores


def test_biases_are_no_products() -> None:
    moe = {"num_experts": 4, "k": 2, "hidden": 12, "shared": 1, "dense_first": 1}
    plain, biased = (
        part_flops(tiny(MoEConfig(**moe, expert_bias=on), mlp_bias=on, attention_bias="all" if on else "none"), 32, 1)
        for on in (False, True)
    )
    assert plain == biased


def test_keys_that_a_query_sees() -> None:
    assert mean_keys(4) == 2.5
    assert mean_keys(4, 2) == (1 + 2 + 2 + 2) / 4
    assert mean_keys(4, 9) == 2.5
    assert mean_keys(1) == 1
