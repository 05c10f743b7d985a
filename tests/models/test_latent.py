"""Decoders with latent attention, and with sinks, biases and clamped gates, through everything a decoder goes through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.native import load_model, save_model
from moesaic.config import from_dict, to_dict
from moesaic.cost.traffic import cache_bytes, cache_width
from moesaic.errors import ConfigError
from moesaic.infer import SamplingConfig, generate_ids
from moesaic.models import Decoder, LatentConfig, ModelConfig, MoEConfig, Output, RouterConfig, build_model
from moesaic.nn.rope import RopeScaling
from moesaic.train.optim import parameter_groups
from moesaic.train.recompute import recompute_activations
from moesaic.train.step import train_step
from tests.models.tiny import experts_of, lively, some_ids, tiny
from tests.train.test_step import batch_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LATENT = {"num_kv_heads": None, "latent": LatentConfig(kv_rank=6, q_rank=10, nope_dim=4, rope_dim=4, value_dim=5)}
DEEPSEEK = MoEConfig(
    num_experts=8, k=2, hidden=12, dense_first=1, shared=1, shared_hidden=20, losses={},
    router=RouterConfig("topk", {"score": "sigmoid", "balance_bias": True, "groups": 4, "groups_kept": 2}),
)  # fmt: skip
GPT_OSS = MoEConfig(
    num_experts=4, k=2, hidden=12, expert_bias=True, losses={"switch": 0.1},
    router=RouterConfig("topk", {"gate_bias": True}),
)  # fmt: skip
CONFIGS: dict[str, ModelConfig] = {
    "latent": tiny(**LATENT),
    "latent, straight queries": tiny(num_kv_heads=None, latent=replace(LATENT["latent"], q_rank=None), attention_bias="all"),
    "DeepSeek": tiny(
        DEEPSEEK, **LATENT, tie_embeddings=False, attention_bias="all",
        rope_scaling=RopeScaling("yarn", 4.0, 8, mscale=1.0, mscale_all_dim=0.7),
    ),
    "sinks": tiny(attention_sinks=True),
    "gpt-oss": tiny(
        GPT_OSS, attention_sinks=True, attention_bias="all", activation="clamped_swiglu", sliding_window=(3, 0),
        rope_scaling=RopeScaling("yarn", 4.0, 8, truncate=False), tie_embeddings=False,
    ),
    "OLMoE": tiny(MoEConfig(num_experts=4, k=2, hidden=12, losses={}), qk_norm="projection", clip_qkv=0.9),
    "biases everywhere": tiny(attention_bias="qkv", mlp_bias=True, attention_sinks=True, num_kv_heads=1),
}  # fmt: skip
every = pytest.mark.parametrize("name", CONFIGS)


def model_of(name: str) -> Decoder:
    """Biases and sinks, which start at zero, made loud as well."""
    model = lively(CONFIGS[name])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("bias", "b_in", "b_out", "sinks")):
                parameter.normal_(std=0.5, generator=generator)
    return model


def run(model: Decoder, ids_BS: Tensor, **more: Any) -> Output:
    with torch.no_grad():
        output: Output = model(ids_BS, **more)
    return output


# ---- reading -------------------------------------------------------------------------------------------------------------


@every
def test_a_packed_row_gives_what_each_document_gives_alone(name: str) -> None:
    model, ids = model_of(name), some_ids(1, 12)
    sizes = [5, 1, 4, 2]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None]
    packed, start = run(model, ids, document_BS=documents), 0
    for size in sizes:
        alone = run(model, ids[:, start : start + size])
        torch.testing.assert_close(packed.logits[:, start : start + size], alone.logits, **CLOSE)
        start += size
    assert not torch.allclose(run(model, ids).logits[0, 6:], packed.logits[0, 6:], atol=1e-2)


@every
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model, ids = model_of(name), some_ids(3, 9)
    alone = [run(model, ids[:1]), run(model, ids[1:2, :6]), run(model, ids[2:, :4])]
    padded, valid = ids.clone(), torch.ones(3, 9, dtype=torch.bool)
    padded[1] = torch.cat([torch.full((3,), -7), ids[1, :6]])
    valid[1, :3] = False
    padded[2] = torch.cat([ids[2, :4], torch.full((5,), 10**6)])
    valid[2, 4:] = False
    batch = run(model, padded, valid_BS=valid)
    for row, want in enumerate(alone):
        torch.testing.assert_close(batch.logits[row, valid[row]], want.logits[0], **CLOSE)
    for layer, plan in batch.plans.items():
        experts = experts_of(plan, 3, 9)
        for row, want in enumerate(alone):
            assert torch.equal(experts[row, valid[row]], experts_of(want.plans[layer], 1, int(valid[row].sum()))[0])
    assert batch.logits.isfinite().all()


@every
def test_later_tokens_change_nothing(name: str) -> None:
    model, ids = model_of(name), some_ids(2, 10)
    full = run(model, ids).logits
    for length in (1, 4, 9):
        torch.testing.assert_close(run(model, ids[:, :length]).logits, full[:, :length], **CLOSE)


@pytest.mark.parametrize("sizes", [(1,) * 10, (5, 1, 1, 3), (10,)], ids=str)
@every
def test_a_cache_changes_nothing(name: str, sizes: tuple[int, ...]) -> None:
    model, ids = model_of(name), some_ids(2, 10)
    whole, cache, start = run(model, ids).logits, model.new_cache(2, 10), 0
    for size in sizes:
        part = run(model, ids[:, start : start + size], cache=cache).logits
        torch.testing.assert_close(part, whole[:, start : start + size], **CLOSE)
        start += size


@every
def test_a_batch_of_prompts_of_all_lengths_continues_as_each_alone(name: str) -> None:
    """Left padding, cache, one token at a time, against whole forwards without any of them."""
    model = model_of(name)
    prompts = [[5, 9, 2, 4, 8, 1, 44, 31], [7], [3, 3, 6]]
    together = generate_ids(model, prompts, max_new_tokens=8, sampling=SamplingConfig(temperature=0))
    for prompt, found in zip(prompts, together.ids, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(run(model, torch.tensor([ids])).logits[0, -1].argmax()))
        assert list(found) == ids[len(prompt) :]


@every
def test_what_the_cache_holds_is_what_the_count_says(name: str) -> None:
    """Bytes of the tensors themselves: latent attention keeps kv_rank + rope_dim numbers per token, and no values."""
    model = model_of(name)
    config = model.config
    for dtype in (None, torch.bfloat16):
        model.compute_dtype = dtype
        cache = model.new_cache(3, 10)
        tensors = cache.keys + cache.values
        assert {t.dtype for t in tensors} == {dtype or torch.float32}
        held = sum(t.numel() * t.element_size() for t in tensors)
        size = 2 if dtype else 4
        assert held == sum(t.untyped_storage().nbytes() for t in tensors)
        assert held == 2 * 3 * 10 * cache_width(config) * size
        if config.sliding_window is None:
            assert held == 3 * cache_bytes(model, 10)
    if config.latent is not None:
        assert cache_width(config) == 6 + 4
        assert not any(t.numel() for t in cache.values)
        run(model, some_ids(3, 10), cache=cache)
        assert all(bool(t.any(dim=-1).all()) for t in cache.keys)  # nothing is left unused
    else:
        assert cache_width(config) == 2 * config.kv_heads * 4


# ---- training ------------------------------------------------------------------------------------------------------------


def step_gradients(model: Decoder) -> tuple[dict[str, Tensor], float]:
    kept: dict[str, Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    reading, _ = train_step(model, Keep(model.parameters(), lr=1.0), [batch_of(4)], lr=1.0, clip=0.0, step=1)
    return kept, reading.loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@every
def test_recomputed_gradients_are_bit_for_bit_the_same(name: str, dtype: torch.dtype | None) -> None:
    torch.set_num_threads(1)
    plain, again = model_of(name), model_of(name)
    plain.compute_dtype = again.compute_dtype = dtype
    recompute_activations(again)
    (want, loss), (got, loss_2) = step_gradients(plain), step_gradients(again)
    assert set(want) == set(got) == {n for n, _ in plain.named_parameters()}
    assert loss == loss_2
    for key, gradient in want.items():
        assert torch.equal(got[key], gradient), key
        assert gradient.any() or "router" in key, key  # everything learns


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forgets what was compiled: dynamo gives up on a function after eight versions of it."""
    yield
    torch.compiler.reset()


# dynamo's own look at a block's input
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["latent", "DeepSeek", "gpt-oss", "OLMoE"])
def test_a_block_compiles_in_one_piece(name: str) -> None:
    model, ids = model_of(name).train(), some_ids(2, 8)
    want = model(ids).logits
    want.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = model(ids).logits
    torch.testing.assert_close(got, want, **CLOSE)
    got.square().mean().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n.replace("_orig_mod.", "")], **CLOSE, msg=n)


@every
def test_only_matrices_decay(name: str) -> None:
    model = model_of(name)
    names = {id(p): n for n, p in model.named_parameters()}
    decay, plain = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))  # type: ignore[attr-defined]
    assert decay | plain == set(names.values())
    for n in decay:
        assert n.endswith((".weight", "w_in", "w_out")), n
        assert not {"norm", "router"} & set(n.replace("_", ".").split(".")), n
    for n in plain:
        assert "norm" in n or "router" in n or n.endswith(("bias", "b_in", "b_out", "sinks", "embedding.weight")), n


@every
def test_in_bf16_only_routers_stay_fp32(name: str) -> None:
    model, ids = model_of(name), some_ids(2, 8)
    want = run(model, ids).logits
    model.to(torch.bfloat16)
    for n, p in model.named_parameters():
        assert p.dtype == (torch.float32 if ".router." in n else torch.bfloat16), n
    output = run(model, ids)
    assert output.logits.dtype == torch.bfloat16
    if model.config.moe is None:  # a near-tie may send a token elsewhere
        torch.testing.assert_close(output.logits.float(), want, rtol=0, atol=0.1 * float(want.abs().max()))
    cache = model.new_cache(2, 8)
    for i in range(8):
        assert run(model, ids[:, i : i + 1], cache=cache).logits.isfinite().all()


# ---- at rest -------------------------------------------------------------------------------------------------------------


@every
def test_it_saves_and_loads_with_its_configuration(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    assert from_dict(ModelConfig, to_dict(model.config)) == model.config
    save_model(model, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(run(loaded.eval(), some_ids(1, 6)).logits, run(model, some_ids(1, 6)).logits)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({**LATENT, "num_kv_heads": 2}, "model.latent has head widths of its own and no key/value heads"),
        ({**LATENT, "qk_norm": "head"}, "model.qk_norm='head' does not go with model.latent; leave it out."),
        (
            {**LATENT, "attention_sinks": True},
            "model.attention_sinks=True does not go with model.latent; leave it out.",
        ),
        ({**LATENT, "clip_qkv": 1.0}, "model.clip_qkv=1.0 does not go with model.latent; leave it out."),
        ({**LATENT, "sliding_window": 4}, "model.sliding_window=4 does not go with model.latent; leave it out."),
        ({**LATENT, "attention_bias": "qkv"}, 'model.attention_bias must be "none" or "all" with model.latent.'),
        ({**LATENT, "latent": LatentConfig(0)}, "model.latent.kv_rank must be at least 1, not 0."),
        ({**LATENT, "latent": LatentConfig(4, q_rank=0)}, "model.latent.q_rank must be at least 1, not 0."),
        ({**LATENT, "latent": LatentConfig(4, rope_dim=3)}, "The head width must be even for rotary positions, not 3."),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert said in str(error.value)


def test_shapes_are_built_without_memory() -> None:
    for config in CONFIGS.values():
        model, shapes = build_model(config, seed=0), build_model(config, device="meta").state_dict()
        assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in shapes.items()}
