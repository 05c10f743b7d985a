"""Each logit processor against values worked by hand on four tokens, then properties that must hold for any logits."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import ConfigError, NonFiniteError
from moesaic.infer import sampling
from moesaic.infer.sampling import History, SamplingConfig, process, sample

INF = math.inf


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def log(*probs: float) -> torch.Tensor:
    return torch.tensor([probs], dtype=torch.float32).log()


def kept(logits_BV: torch.Tensor) -> list[int]:
    return [i for i, value in enumerate(logits_BV[0].tolist()) if value > -INF]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_temperature_divides_the_distance_to_the_largest_logit():
    assert sampling.temperature(row(0, 2, 4, 6), 2.0).tolist() == [[-3, -2, -1, 0]]
    assert sampling.temperature(row(0, 2, 4, 6), 0.5).tolist() == [[-12, -8, -4, 0]]
    same = sampling.temperature(row(0, 2, 4, 6), 2.0).softmax(-1)
    assert torch.allclose(same, (row(0, 2, 4, 6) / 2).softmax(-1))


@pytest.mark.parametrize("value", [5e-324, 1e-50, 1e-6])
def test_a_tiny_temperature_is_the_largest_logit_and_no_nan(value: float):
    probs = sampling.temperature(row(1, 3, 3, -2), value).softmax(-1)
    assert torch.equal(probs, row(0, 0.5, 0.5, 0))


def test_top_k_keeps_exactly_k_and_the_lowest_of_equal_ids():
    assert sampling.top_k(row(1, 4, 2, 3), 2).tolist() == [[-INF, 4, -INF, 3]]
    assert kept(sampling.top_k(row(5, 5, 5, 5), 2)) == [0, 1]
    assert kept(sampling.top_k(row(1, 4, 4, 4), 2)) == [1, 2]
    for k in (0, 4, 99):
        assert sampling.top_k(row(1, 4, 2, 3), k).tolist() == [[1, 4, 2, 3]]


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-9, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.74, [1, 3]),
        (0.76, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_is_the_smallest_prefix_that_reaches_p(p: float, expected: list[int]):
    assert kept(sampling.top_p(log(0.1, 0.5, 0.15, 0.25), p)) == expected


def test_top_p_stops_where_the_sum_equals_p_and_ranks_equal_tokens_by_id():
    four_equal = row(0, 0, 0, 0)  # 1/4 each, exact in binary
    assert kept(sampling.top_p(four_equal, 0.5)) == [0, 1]
    assert kept(sampling.top_p(four_equal, 0.500001)) == [0, 1, 2]


def test_min_p_compares_with_the_most_likely_token():
    logits = log(0.1, 0.5, 0.15, 0.25)
    assert kept(sampling.min_p(logits, 0.19)) == [0, 1, 2, 3]
    assert kept(sampling.min_p(logits, 0.21)) == [1, 2, 3]
    assert kept(sampling.min_p(logits, 0.49)) == [1, 3]
    assert kept(sampling.min_p(logits, 1.0)) == [1]
    assert kept(sampling.min_p(row(2, 2, 1, 2), 1.0)) == [0, 1, 3]


def test_repetition_penalty_divides_positive_and_multiplies_negative():
    seen = torch.tensor([[True, True, False, True]])
    assert sampling.repetition_penalty(row(4, -1, 3, 0), seen, 2.0).tolist() == [[2, -2, 3, 0]]


def test_presence_counts_once_and_frequency_counts_each_time():
    generated = torch.tensor([[0, 1, 3, 0]])
    assert sampling.count_penalties(row(1, 1, 1, 1), generated, 0.5, 0.25).tolist() == [[1, 0.25, -0.25, 1]]


def test_history_skips_padding_and_tells_prompt_from_generated():
    history = History(  # pad, prompt 2, then generated 1 1 and a finished column
        torch.tensor([[3, 2, 1, 1, 0]]), torch.tensor([[False, True, True, True, False]]), prompt=2
    )
    assert history.seen_BV(4).tolist() == [[False, True, True, False]]
    assert history.generated_BV(4).tolist() == [[0, 2, 0, 0]]


def test_the_order_is_penalties_temperature_top_k_top_p_min_p():
    history = History(torch.tensor([[3]]), torch.tensor([[True]]), prompt=1)
    # The penalty takes token 3 from 8 to 4; the temperature halves the distances 0 1 2 2; top-k drops the later tie.
    config = SamplingConfig(repetition_penalty=2.0, temperature=2.0, top_k=3)
    assert process(row(6, 5, 4, 8), history, config).tolist() == [[0, -0.5, -1, -INF]]
    # After top-k the rest is renormalised: 0.4 / 0.6 = 0.67 already reaches 0.65, which 0.4 of the whole would not.
    assert kept(process(log(0.4, 0.2, 0.2, 0.2), None, SamplingConfig(top_k=2, top_p=0.65))) == [0]
    # A flat temperature brings unlikely tokens back over min-p.
    assert kept(process(log(0.9, 0.04, 0.03, 0.03), None, SamplingConfig(min_p=0.1))) == [0]
    assert kept(process(log(0.9, 0.04, 0.03, 0.03), None, SamplingConfig(min_p=0.1, temperature=3.0))) == [0, 1, 2, 3]


def test_greedy_takes_the_lowest_of_equal_ids_after_penalties():
    assert sample(row(1, 7, 7, 0), None, SamplingConfig(temperature=0), []).tolist() == [1]
    history = History(torch.tensor([[1]]), torch.tensor([[True]]), prompt=0)
    config = SamplingConfig(temperature=0, presence_penalty=1.0)
    assert sample(row(1, 7, 7, 0), history, config, []).tolist() == [2]


def test_sampled_frequencies_match_the_probabilities():
    draw = generators(0)
    counts = Counter(int(sample(log(0.1, 0.5, 0.15, 0.25), None, SamplingConfig(), draw)) for _ in range(4000))
    for token, p in enumerate((0.1, 0.5, 0.15, 0.25)):  # five standard deviations
        assert abs(counts[token] / 4000 - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_a_forbidden_token_is_never_drawn():
    draw = generators(1)
    logits = row(-INF, 0, -INF, 0)
    assert {int(sample(logits, None, SamplingConfig(), draw)) for _ in range(100)} == {1, 3}


def test_a_row_draws_the_same_with_and_without_other_rows():
    torch.manual_seed(0)
    logits_BV = torch.randn(3, 50)
    for temperature in (0.0, 1.0):
        config = SamplingConfig(temperature=temperature, top_p=0.9)
        together = sample(logits_BV, None, config, generators(5, 6, 7))
        alone = [sample(logits_BV[i : i + 1], None, config, generators(5 + i)) for i in range(3)]
        assert together.tolist() == [int(token) for token in alone]


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_non_finite_logits_name_the_row(bad: float):
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    for temperature in (0.0, 1.0):
        with pytest.raises(NonFiniteError, match="row 1"):
            sample(logits, None, SamplingConfig(temperature=temperature), generators(0, 0))
    with pytest.raises(NonFiniteError, match="row 0"):
        sample(torch.full((1, 4), -INF), None, SamplingConfig(), generators(0))


def test_greedy_is_what_every_filter_leaves_first():
    """Temperature 0 takes the largest logit without filtering; filters never remove it."""
    logits_BV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    greedy = sample(logits_BV, None, SamplingConfig(temperature=0, top_k=5, top_p=0.3, min_p=0.5), [])
    filtered_BV = process(logits_BV, None, SamplingConfig(temperature=0, top_k=5, top_p=0.3, min_p=0.5))
    assert greedy.tolist() == filtered_BV.argmax(-1).tolist() == logits_BV.argmax(-1).tolist()


def test_missing_history_or_generators_are_sentences():
    with pytest.raises(ConfigError, match="pass history"):
        sample(row(0, 1, 2, 3), None, SamplingConfig(repetition_penalty=1.2), generators(0))
    with pytest.raises(ConfigError, match="1 rows need as many generators, but 2"):
        sample(row(0, 1, 2, 3), None, SamplingConfig(), generators(0, 1))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* it is -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": INF}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a number, but it is 'hot'"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_k": True}, "top_k must be a number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p must be a finite"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"min_p": 1.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be between 0.01 and 100"),
        ({"presence_penalty": 101}, "presence_penalty must be between -100 and 100"),
        ({"frequency_penalty": -INF}, "frequency_penalty must be a finite"),
    ],
)
def test_impossible_settings_are_refused_in_words(settings_: dict[str, float], message: str):
    with pytest.raises(ConfigError, match=message):
        SamplingConfig(**settings_)


logit_rows = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12).map(lambda values: row(*values))


@settings(max_examples=100, deadline=None)
@given(logit_rows, st.floats(1e-6, 1.0))
def test_top_p_mass_reaches_p_and_no_smaller_prefix_does(logits: torch.Tensor, p: float):
    probs = logits.double().softmax(-1)[0]
    keep = kept(sampling.top_p(logits, p))
    assert keep
    assert probs[keep].sum() >= p - 1e-12
    if p < 1:
        assert probs[keep].sum() - probs[keep].min() < p + 1e-12
        assert all(probs[i] <= probs[keep].min() for i in range(len(probs)) if i not in keep)


@settings(max_examples=100, deadline=None)
@given(logit_rows, st.floats(0.0, 1.0))
def test_min_p_keeps_exactly_the_tokens_over_the_fraction(logits: torch.Tensor, p: float):
    probs = logits.double().softmax(-1)[0]
    keep = kept(sampling.min_p(logits, p))
    assert int(probs.argmax()) in keep
    for i, prob in enumerate(probs):
        if abs(prob - p * probs.max()) > 1e-12:
            assert (i in keep) == bool(prob > p * probs.max())


@settings(max_examples=50, deadline=None)
@given(
    logit_rows, st.integers(0, 14), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 5.0), st.integers(0, 99)
)
def test_the_drawn_token_survived_every_filter(
    logits: torch.Tensor, k: int, p: float, least: float, heat: float, seed: int
):
    config = SamplingConfig(temperature=heat, top_k=k, top_p=p, min_p=least)
    token = int(sample(logits, None, config, generators(seed)))
    keep = kept(process(logits, None, config))
    assert token in keep
    assert len(keep) <= (k or len(keep))
