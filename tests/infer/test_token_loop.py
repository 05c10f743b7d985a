"""The decoding loop on ids: cache against recomputation, one row against a batch, ends, limits, streams and errors."""

import pytest
import torch

from moesaic.errors import ConfigError, NonFiniteError
from moesaic.infer.sampling import SamplingConfig
from moesaic.infer.token_loop import generate_ids
from tests.infer.fakes import FakeConfig, Rolling, Script

GREEDY = SamplingConfig(temperature=0)
PROMPTS = [[5, 9, 2, 4, 8, 1], [7], [3, 3, 6]]


def recompute(model: Rolling, prompt: list[int], steps: int) -> tuple[int, ...]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_greedy_with_cache_is_greedy_by_full_recompute():
    model = Rolling()
    result = generate_ids(model, PROMPTS, max_new_tokens=12, sampling=GREEDY)
    assert result.ids == tuple(recompute(model, prompt, 12) for prompt in PROMPTS)
    assert len(set(result.ids)) == 3
    assert result.finish == ("length",) * 3


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
        SamplingConfig(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5),
    ],
)
def test_a_row_does_not_depend_on_its_batch(sampling: SamplingConfig):
    model = Rolling()
    together = generate_ids(model, PROMPTS, max_new_tokens=12, sampling=sampling, seed=4).ids
    backwards = generate_ids(model, PROMPTS[::-1], max_new_tokens=12, sampling=sampling, seed=4).ids[::-1]
    alone = tuple(
        generate_ids(model, [prompt], max_new_tokens=12, sampling=sampling, seed=4).ids[0] for prompt in PROMPTS
    )
    assert together == alone == backwards


def test_the_seed_decides_and_a_repeated_prompt_is_sampled_afresh():
    model = Rolling(sharpness=0.3)
    first = generate_ids(model, [[5], [5]], max_new_tokens=12, seed=0).ids
    assert first == generate_ids(model, [[5], [5]], max_new_tokens=12, seed=0).ids
    assert first[0] == generate_ids(model, [[5]], max_new_tokens=12, seed=0).ids[0]
    assert len({first[0], first[1], generate_ids(model, [[5]], max_new_tokens=12, seed=1).ids[0]}) == 3
    per_row = generate_ids(model, [[5], [7]], max_new_tokens=12, seed=[1, 2]).ids
    assert per_row[1] == generate_ids(model, [[7]], max_new_tokens=12, seed=2).ids[0]


def test_padding_does_not_count_as_seen_for_the_penalties():
    class Close(Script):
        def read(self, ids_BS, valid_BS, held):  # type: ignore[no-untyped-def]
            logits_BSV = torch.zeros(*ids_BS.shape, self.config.vocab_size)
            logits_BSV[..., 7], logits_BSV[..., 8] = 2.0, 1.5
            return logits_BSV

    sampling = SamplingConfig(temperature=0, repetition_penalty=2.0)
    result = generate_ids(Close([]), [[7, 2], [3]], max_new_tokens=2, sampling=sampling, pad_id=7)
    # Row 0 holds a 7, so 7 falls from 2 to 1. Row 1 holds it as padding only, until it generates one itself.
    assert result.ids == ((8, 7), (7, 8))


def test_a_finished_row_is_fed_padding_marked_invalid():
    model = Script([[10, 0, 99], [20, 21, 22, 23]])
    result = generate_ids(model, [[5, 6, 7], [8]], max_new_tokens=4, sampling=GREEDY, eos_ids=[0], pad_id=1)
    assert result.ids == ((10,), (20, 21, 22, 23))
    assert result.finish == ("eos", "length")
    fed = model.caches[0].fed
    assert [ids.tolist() for ids, _ in fed] == [[[5, 6, 7], [1, 1, 8]], [[10], [20]], [[1], [21]], [[1], [22]]]
    assert [valid.int().tolist() for _, valid in fed] == [
        [[1, 1, 1], [0, 0, 1]],
        [[1], [1]],
        [[0], [1]],
        [[0], [1]],
    ]


def test_nothing_is_masked_without_padding_and_only_the_last_logits_are_asked_for():
    asked: list[tuple[bool, bool]] = []

    class Watching(Script):
        def forward(self, ids_BS, *, valid_BS=None, cache=None, last_only=False):  # type: ignore[no-untyped-def]
            asked.append((valid_BS is not None, last_only))
            return super().forward(ids_BS, valid_BS=valid_BS, cache=cache, last_only=last_only)

    generate_ids(Watching([[10]]), [[5, 6, 7]], max_new_tokens=3)
    assert asked == [(False, True)] * 3
    asked.clear()
    # A left-padded prompt is masked, the columns after it are not, until a row ends.
    generate_ids(Watching([[10, 11, 0], [20]]), [[5, 6, 7], [8]], max_new_tokens=4, sampling=GREEDY, eos_ids=[0])
    assert [masked for masked, _ in asked] == [True, False, False, True]


def test_callbacks_see_every_token_and_may_end_a_row():
    model = Script([[10, 11, 12, 13], [20, 0]])
    tokens: list[tuple[int, int]] = []
    ends: list[tuple[int, str]] = []

    def on_token(row: int, token: int) -> bool:
        tokens.append((row, token))
        return token == 12

    result = generate_ids(
        model, [[5], [5]], max_new_tokens=9, eos_ids=[0], on_token=on_token, on_finish=lambda *end: ends.append(end)
    )
    assert tokens == [(0, 10), (1, 20), (0, 11), (0, 12)]
    assert ends == [(1, "eos"), (0, "stop")]
    assert result.ids == ((10, 11, 12), (20,))


def test_speed_counts_the_tokens_of_each_phase():
    model = Script([[10, 0], [20, 21, 22]])
    result = generate_ids(model, [[5, 6], [7]], max_new_tokens=3, eos_ids=[0])
    assert (result.prefill_tokens, result.decode_tokens) == (3, 3)  # the eos is sampled too
    assert result.prefill_tokens_per_s == pytest.approx(3 / result.prefill_seconds)
    assert result.decode_tokens_per_s == pytest.approx(3 / result.decode_seconds)
    one = generate_ids(Script([[10]]), [[5]], max_new_tokens=1)
    assert one.decode_tokens_per_s == 0.0


def test_banned_ids_are_never_chosen():
    assert generate_ids(Script([[10]]), [[5]], max_new_tokens=3, sampling=GREEDY, banned_ids=[10, 0]).ids == (
        (1, 1, 1),
    )


def test_the_context_limits_each_row_by_itself_with_a_warning():
    model = Rolling(FakeConfig(max_seq_len=10))
    with pytest.warns(
        UserWarning, match="Prompt 0 has 8 tokens .* context is 10, .* at most 2 new tokens instead of 5"
    ):
        result = generate_ids(model, [[5] * 8, [5]], max_new_tokens=5, sampling=GREEDY)
    assert [len(ids) for ids in result.ids] == [2, 5]
    assert result.ids[1] == generate_ids(model, [[5]], max_new_tokens=5, sampling=GREEDY).ids[0]
    assert len(generate_ids(model, [[5] * 8], max_new_tokens=2).ids[0]) == 2  # exactly full: no warning


@pytest.mark.parametrize("length", [10, 11])
def test_a_prompt_that_fills_the_context_is_refused_with_both_lengths(length: int):
    with pytest.raises(ConfigError, match=f"Prompt 1 has {length} tokens.*context of 10; .*at most 9"):
        generate_ids(Rolling(FakeConfig(max_seq_len=10)), [[5], [5] * length])


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_an_impossible_number_of_new_tokens_is_refused(count: int):
    with pytest.raises(ConfigError, match="max_new_tokens must be a whole number of at least 1"):
        generate_ids(Rolling(), [[5]], max_new_tokens=count)


@pytest.mark.parametrize("token", [300, -1])
def test_ids_the_model_does_not_know_are_refused(token: int):
    with pytest.raises(ConfigError, match=f"Prompt 0 holds token id {token}, .* ids 0 to 299"):
        generate_ids(Rolling(), [[5, token]])


def test_empty_prompts_wrong_seeds_and_models_without_a_cache_are_refused():
    with pytest.raises(ConfigError, match="Prompt 1 has no token"):
        generate_ids(Rolling(), [[5], []])
    with pytest.raises(ConfigError, match="2 prompts need one seed or as many seeds, but 1"):
        generate_ids(Rolling(), [[5], [6]], seed=[1])
    with pytest.raises(ConfigError, match="Linear has none"):
        generate_ids(torch.nn.Linear(2, 2), [[5]])  # type: ignore[arg-type]


def test_no_prompts_give_no_rows():
    assert generate_ids(Rolling(), []).ids == ()


def test_each_module_gets_its_own_mode_back_even_after_an_error():
    model = Rolling()
    model.child = torch.nn.Dropout()
    model.train()
    model.child.eval()
    generate_ids(model, [[5]], max_new_tokens=2)
    assert (model.training, model.child.training) == (True, False)
    with torch.no_grad():
        model.head[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 0"):
        generate_ids(model, [[5]], max_new_tokens=2)
    assert (model.training, model.child.training) == (True, False)
    assert not torch.is_inference_mode_enabled()


def test_a_finished_row_may_compute_nonsense():
    class Nonsense(Script):
        def read(self, ids_BS, valid_BS, held):  # type: ignore[no-untyped-def]
            logits_BSV = super().read(ids_BS, valid_BS, held)
            return torch.where(valid_BS[..., None], logits_BSV, torch.nan)

    result = generate_ids(Nonsense([[0], [20]]), [[5], [5]], max_new_tokens=4, eos_ids=[0])
    assert result.ids == ((), (20, 20, 20, 20))


def test_rows_that_do_not_fit_side_by_side_run_one_after_the_other():
    # 8 columns of prompt and 9 tokens to go for the short row would be 16 columns in a context of 10.
    model = Rolling(FakeConfig(max_seq_len=10))
    prompts = [[5] * 8, [7], [3, 4]]
    with pytest.warns(UserWarning, match="Prompt 0 has 8 tokens"):
        result = generate_ids(model, prompts, max_new_tokens=9, sampling=SamplingConfig(temperature=0.5))
    assert [len(ids) for ids in result.ids] == [2, 9, 8]
    assert [cache.fed[0][0].shape[0] for cache in model.caches] == [2, 1]
    model.head.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="row 1"), pytest.warns(UserWarning, match="Prompt 0"):
        generate_ids(model, prompts, max_new_tokens=9)
