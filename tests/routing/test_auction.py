"""The auction: balanced, within T * epsilon of SciPy's optimum, and it ends whatever the scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.auction import auction


def best_sum(scores_TE: Tensor) -> float:
    """SciPy's optimum with T/E columns per expert (E divides T)."""
    T, E = scores_TE.shape
    tiled = scores_TE.double().repeat_interleave(T // E, dim=1).numpy()
    rows, columns = linear_sum_assignment(tiled, maximize=True)
    return float(tiled[rows, columns].sum())


def counts(expert_T: Tensor, E: int) -> list[int]:
    return torch.bincount(expert_T, minlength=E).tolist()


def scores(kind: str, T: int, E: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    random_TE = torch.randn(T, E, generator=rng, dtype=torch.float64)
    kinds: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: random_TE,
        "uniform": lambda: torch.rand(T, E, generator=rng, dtype=torch.float64),
        "low rank": lambda: random_TE[:, :2] @ torch.randn(min(2, E), E, generator=rng, dtype=torch.float64),
        "everyone wants expert 0": lambda: random_TE * 0.01 + torch.eye(E, dtype=torch.float64)[0] * 10,
        "the same wishes": lambda: random_TE[:1].expand(T, E).clone() + 1e-3 * random_TE,
        "small integers": lambda: torch.randint(3, (T, E), generator=rng).double(),
        "constant": lambda: torch.zeros(T, E, dtype=torch.float64),
        "geometric": lambda: 2.0 ** -(torch.arange(E).double() % 20) * torch.ones(T, 1, dtype=torch.float64),
        "product": lambda: torch.arange(T).double()[:, None] * torch.arange(E).double(),
        "huge": lambda: random_TE * 1e300,
    }
    return kinds[kind]()


KINDS = (
    "normal", "uniform", "low rank", "everyone wants expert 0", "the same wishes", "small integers", "constant", "geometric",
    "product", "huge",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "E"), [(12, 3), (64, 8), (64, 64), (240, 16)])
def test_within_t_epsilon_of_scipy(kind: str, T: int, E: int) -> None:
    scores_TE = scores(kind, T, E)
    found = auction(scores_TE, 1e-4)
    assert not found.capped
    assert counts(found.expert_T, E) == [T // E] * E
    spread = float(scores_TE.amax() - scores_TE.amin()) if kind != "huge" else float(scores_TE.abs().amax()) * 2
    assert found.epsilon <= 1e-4 * spread * (1 + 1e-9)
    mine = float(scores_TE.gather(1, found.expert_T[:, None]).sum())
    assert best_sum(scores_TE) - mine <= T * found.epsilon + 1e-9 * spread


def test_integer_scores_are_solved_exactly_below_one_over_t() -> None:
    scores_TE = scores("small integers", 60, 6)
    found = auction(scores_TE, 1 / (2 * 61))  # range 2: epsilon is 1/61 < 1/T
    assert float(scores_TE.gather(1, found.expert_T[:, None]).sum()) == best_sum(scores_TE)


def test_by_hand() -> None:
    # Token 0 gains 9 by having expert 0 and token 1 only 1, so token 1 gives way: 10 + 7 beats 8 + 1.
    assert auction(torch.tensor([[10.0, 1.0], [8.0, 7.0]])).expert_T.tolist() == [0, 1]
    assert auction(torch.tensor([[8.0, 7.0], [10.0, 1.0]])).expert_T.tolist() == [1, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 17), st.integers(0, 1000), st.sampled_from(KINDS[:7]))
def test_counts_differ_by_at_most_one_and_the_extra_places_are_used_best(E: int, T: int, seed: int, kind: str) -> None:
    scores_TE = scores(kind, T, E, seed) if T else torch.zeros(0, E)
    found = auction(scores_TE, 1e-3)
    assert max(counts(found.expert_T, E)) - min(counts(found.expert_T, E)) <= 1
    assert not found.capped
    if T:
        # The oracle: every expert has ceil(T/E) columns; dummies may fill one column of an expert each.
        places = -(-T // E)
        tiled = scores_TE.double().repeat_interleave(places, dim=1)
        low = float(tiled.amin()) - 1e6
        dummies = torch.full((-T % E, E * places), low, dtype=torch.float64)
        dummies[:, places - 1 :: places] = 0.0
        square = torch.cat([tiled, dummies]).numpy()
        rows, columns = linear_sum_assignment(square, maximize=True)
        best = float(square[rows, columns].sum())
        mine = float(scores_TE.double().gather(1, found.expert_T[:, None]).sum())
        assert best - mine <= (T + E) * max(found.epsilon, 1e-12) + 1e-9


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_ends_on_what_is_not_finite(poison: float) -> None:
    scores_TE = scores("normal", 24, 4)
    scores_TE[3, 1] = scores_TE[7] = poison
    found = auction(scores_TE)
    assert counts(found.expert_T, 4) == [6] * 4
    smallest = scores_TE[scores_TE.isfinite()].min()
    clean = torch.where(scores_TE.isfinite(), scores_TE, smallest)
    assert best_sum(clean) - float(clean.gather(1, found.expert_T[:, None]).sum()) <= 24 * found.epsilon
    assert counts(auction(torch.full((8, 4), poison)).expert_T, 4) == [2] * 4


@pytest.mark.parametrize(("T", "E"), [(24, 4), (22, 4), (3, 5)])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_round_limit_still_gives_a_balanced_assignment_and_says_so(T: int, E: int, rounds: int) -> None:
    found = auction(scores("the same wishes", T, E), most_rounds=rounds)
    assert found.capped
    assert max(counts(found.expert_T, E)) - min(counts(found.expert_T, E)) <= 1


def test_the_same_twice_in_any_dtype_and_refusals() -> None:
    scores_TE = scores("normal", 32, 4).float()
    assert torch.equal(auction(scores_TE).expert_T, auction(scores_TE).expert_T)
    assert counts(auction(scores_TE.bfloat16()).expert_T, 4) == [8] * 4
    assert auction(torch.zeros(0, 4)).expert_T.tolist() == []
    assert auction(torch.randn(5, 1)).expert_T.tolist() == [0] * 5
    with pytest.raises(ConfigError, match="epsilon above 0"):
        auction(scores_TE, 0.0)
