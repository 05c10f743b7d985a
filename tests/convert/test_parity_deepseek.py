"""DeepSeek-V2 and V3, variant by variant, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.convert.parity import assert_parity, transformers
from tests.convert.variants import DYNAMIC, ROPES, TINY, rope

LATENT: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "head_dim"},
    "num_key_value_heads": None,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
GROUPS: dict[str, Any] = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
PUBLISHED: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
V2: dict[str, dict[str, Any]] = {
    "plain": {},
    "lite": {"q_lora_rank": None, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
    "groups": {**GROUPS, "routed_scaling_factor": 4.0},
    "groups_and_yarn": {**GROUPS, **rope("yarn_mscale"), "attention_bias": True},
    "all_groups": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 2},
    "tied_all_sparse": {"tie_word_embeddings": True, "first_k_dense_replace": 0},
    "two_dense": {"first_k_dense_replace": 2, "num_attention_heads": 2, "hidden_act": "gelu"},
    "no_shared": {"n_shared_experts": 0},
    "one_expert": {"num_experts_per_tok": 1, "q_lora_rank": None},
    "biases_lite": {"attention_bias": True, "q_lora_rank": None},
    "dynamic": DYNAMIC,
    "published_rope": {"rope_parameters": PUBLISHED, "q_lora_rank": None},
    **{name: rope(name) for name in ROPES if name != "yarn_mscale"},  # which is above, with groups
}
V3: dict[str, dict[str, Any]] = {
    "plain": {"n_group": 1, "topk_group": 1},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups_of_two": {"n_group": 4, "topk_group": 3, "num_experts_per_tok": 5, "n_shared_experts": 2},
    "halves": {"n_group": 2, "topk_group": 1, "rope_interleave": False},
    "halves_and_biases": {"n_group": 1, "topk_group": 1, "rope_interleave": False, "attention_bias": True},
    "not_normalised": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "lite_tied": {"q_lora_rank": None, "tie_word_embeddings": True, "n_group": 1, "topk_group": 1},
    "published_rope": {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 2, **rope("yarn_mscale")},
    "no_shared_biases": {"n_group": 2, "topk_group": 2, "n_shared_experts": 0, "attention_bias": True},
    "linear": {"n_group": 1, "topk_group": 1, **rope("linear")},
}


# Another draw where the first has near-ties of groups, which fp16 resolves otherwise.
SEEDS = {"groups": 1}
# Of a shared network of no width.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@pytest.mark.parametrize("name", V2)
def test_deepseek_v2(name: str, tmp_path: Path) -> None:
    config = transformers.DeepseekV2Config(**LATENT | V2[name])
    print("deepseek_v2", name, assert_parity(config, tmp_path, seed=SEEDS.get(name, 0)))


@pytest.mark.parametrize("name", V3)
def test_deepseek_v3(name: str, tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(**LATENT | V3[name])
    print("deepseek_v3", name, assert_parity(config, tmp_path))
