"""Generation with real tiny decoders, dense and sparse: the cache, the batch and the padding change no token."""

import re
import warnings
from dataclasses import replace

import pytest
import torch

from moesaic.errors import RoutingWarning
from moesaic.infer import SamplingConfig, generate, generate_ids
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.plan import CapacityRule
from moesaic.tokenizer import train_bpe

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[5, 9, 2, 4, 8, 1, 44, 31], [7], [3, 3, 6]]
TINY = ModelConfig(
    vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden=48, max_seq_len=40, tie_embeddings=False
)
SPARSE = replace(TINY, moe=MoEConfig(num_experts=4, k=2, hidden=24, shared=1))
CONFIGS = {
    "dense": TINY,
    "sparse": SPARSE,
    "window": replace(SPARSE, sliding_window=4),
    "mixed": replace(
        SPARSE, sliding_window=(3, 0), qk_norm="head", moe=MoEConfig(num_experts=6, k=3, dense_first=1, hidden=24)
    ),
}


def lively(config: ModelConfig) -> Decoder:
    """A random model that does not repeat one token for ever: loud blocks, so that the whole context counts."""
    model = build_model(config, seed=1)
    for parameter in model.blocks.parameters():
        parameter.data *= 3
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Decoder:
    return lively(CONFIGS[request.param])


def recompute(model: Decoder, prompt: list[int], steps: int) -> tuple[int, ...]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_with_cache_is_greedy_by_full_recompute(model: Decoder):
    for prompt in PROMPTS:
        result = generate_ids(model, [prompt], max_new_tokens=10, sampling=GREEDY)
        assert result.ids == (recompute(model, prompt, 10),)
        assert len(set(result.ids[0])) > 3


def test_a_prompt_alone_is_the_prompt_in_a_left_padded_batch(model: Decoder):
    for sampling in (GREEDY, SamplingConfig(top_p=0.9, repetition_penalty=1.2)):
        together = generate_ids(model, PROMPTS, max_new_tokens=10, sampling=sampling).ids
        alone = [generate_ids(model, [prompt], max_new_tokens=10, sampling=sampling).ids[0] for prompt in PROMPTS]
        assert list(together) == alone
        assert together == generate_ids(model, PROMPTS, max_new_tokens=10, sampling=sampling, pad_id=63).ids


def test_a_row_that_ended_early_disturbs_nobody_and_is_not_routed():
    model = lively(SPARSE)
    free = generate_ids(model, PROMPTS, max_new_tokens=10, sampling=GREEDY).ids
    end = next(token for token in free[0] if token not in free[1] + free[2])
    cut = free[0].index(end)
    routed: list[list[int]] = []
    hook = model.register_forward_hook(
        lambda module, args, output: routed.append([int(plan.counts_E.sum()) for plan in output.plans.values()])
    )
    result = generate_ids(model, PROMPTS, max_new_tokens=10, sampling=GREEDY, eos_ids=[end])
    hook.remove()
    assert result.ids == (free[0][:cut], free[1], free[2])
    assert result.finish == ("eos", "length", "length")
    # k = 2 rows per real token and layer: 12 prompt tokens, then 3 rows, then 2 once the first has ended.
    assert routed == [[24, 24]] + [[6, 6]] * cut + [[4, 4]] * (9 - cut)


def test_a_full_context_is_used_to_its_last_token():
    model = lively(SPARSE)
    with pytest.warns(UserWarning, match="context is 40"):
        result = generate_ids(model, [[5] * 36, [7]], max_new_tokens=99, sampling=GREEDY)
    assert [len(ids) for ids in result.ids] == [4, 39]
    assert result.ids[0] == recompute(model, [5] * 36, 4)


def test_text_from_a_sparse_model_in_bfloat16():
    tokenizer = train_bpe([], 258)
    model = build_model(replace(SPARSE, vocab_size=tokenizer.get_vocab_size()), seed=1).to(torch.bfloat16)
    model.tokenizer = tokenizer
    pieces: list[str] = []
    text = generate(model, "hello", max_new_tokens=12, on_text=lambda row, piece: pieces.append(piece))
    assert text
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ("base", "trained by another routing .*unbalanced"),
        ("soft_moe", "read at once and text generated differ"),
        ("topk", ""),
    ],
)
def test_generation_says_when_it_routes_by_another_rule(router: str, words: str) -> None:
    k = 1 if router == "base" else 2
    moe = MoEConfig(num_experts=4, k=k, hidden=8, losses={}, router=RouterConfig(router, allow_leak=True))
    model = build_model(replace(TINY, moe=moe), seed=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generate_ids(model, [[1, 2, 3], [4]], max_new_tokens=2)
    found = [str(w.message) for w in said if issubclass(w.category, RoutingWarning)]
    assert len(found) == (1 if words else 0)  # two layers, one sentence
    assert re.search(words, " ".join(found))


@pytest.mark.parametrize(("eval_factor", "words"), [(None, "generation drops none"), (1.0, "depends on its company")])
def test_generation_says_what_capacity_does(eval_factor: float | None, words: str) -> None:
    rule = CapacityRule(eval_factor=eval_factor)
    moe = MoEConfig(num_experts=4, k=2, hidden=8, capacity=rule, router=RouterConfig(allow_leak=True))
    with pytest.warns(RoutingWarning, match=words):
        generate_ids(build_model(replace(TINY, moe=moe), seed=0), [[1, 2, 3]], max_new_tokens=2)
