"""The balanced assignment against SciPy's, a loop auction, values worked by hand, and its own certificate."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.routing.assignment import Solution, assign_balanced, duality_gap, solve


def value(scores_TE: Tensor, expert_T: Tensor) -> float:
    return float(scores_TE.double().gather(1, expert_T[:, None]).sum())


def best(scores_TE: Tensor) -> float:
    """SciPy's optimum: columns tiled T // E times, and one more place per expert that a dummy token may take instead."""
    T, E = scores_TE.shape
    a_TE = scores_TE.double().numpy()
    columns = np.tile(a_TE, (1, T // E + (T % E > 0)))
    if T % E:
        # Dummies only fit into an expert's last place.
        dummies = np.full((E - T % E, columns.shape[1]), -1e3 * (1 + np.abs(a_TE).max()) * T)
        dummies[:, -E:] = 0.0
        columns = np.concatenate([columns, dummies])
    rows, chosen = linear_sum_assignment(columns, maximize=True)
    real = rows < T
    return float(columns[rows[real], chosen[real]].sum())


def auction(scores_TE: Tensor, epsilon: float) -> Tensor:
    """The loop that specifies it: unassigned tokens bid in turn for the cheapest place of the expert worth most to them.

    A bid raises the place's price by the margin over the best other expert, plus epsilon; ends within T * epsilon.
    """
    T, E = scores_TE.shape
    a = scores_TE.double().tolist()
    price = [[0.0] * (T // E) for _ in range(E)]
    holder: list[list[int]] = [[-1] * (T // E) for _ in range(E)]
    waiting = list(range(T))
    while waiting:
        t = waiting.pop()
        worth = [a[t][e] - min(price[e]) for e in range(E)]
        e = max(range(E), key=lambda e: worth[e])
        other = max((worth[f] for f in range(E) if f != e), default=worth[e])
        place = price[e].index(min(price[e]))
        if holder[e][place] >= 0:
            waiting.append(holder[e][place])
        holder[e][place] = t
        price[e][place] += worth[e] - other + epsilon
    expert_T = torch.empty(T, dtype=torch.int64)
    for e in range(E):
        expert_T[holder[e]] = e
    return expert_T


def check(scores_TE: Tensor, clean_TE: Tensor | None = None) -> Solution:
    """Balanced, certified, and as good as SciPy's; ``clean_TE`` are the scores with their non-finite ones replaced."""
    T, E = scores_TE.shape
    clean_TE = scores_TE if clean_TE is None else clean_TE
    solution = solve(scores_TE)
    counts_E = torch.bincount(solution.expert_T, minlength=E)
    assert solution.expert_T.dtype == torch.int64
    assert sorted(set(counts_E.tolist())) in ([T // E], [T // E, T // E + 1], [T // E + 1])
    scale = float((clean_TE.double().amax() - clean_TE.double().amin()).clamp(min=1e-300))
    assert abs(duality_gap(scores_TE, solution)) <= 1e-11 * scale
    assert value(clean_TE, solution.expert_T) == pytest.approx(best(clean_TE), rel=1e-12, abs=1e-11 * scale)
    return solution


def test_by_hand() -> None:
    # Expert 0 is everyone's favourite, but has two places. Going to expert 1 costs tokens 1, 1, 6 and 2: the two cheapest go.
    scores_TE = torch.tensor([[5.0, 4.0], [3.0, 2.0], [6.0, 0.0], [2.0, 0.0]])
    solution = solve(scores_TE)
    assert solution.expert_T.tolist() == [1, 1, 0, 0]
    assert value(scores_TE, solution.expert_T) == 14
    # At the prices, the premium of expert 0 is above what the leavers lose (1) and below what the last stayer would (2).
    assert 1 <= float(solution.price_E[0] - solution.price_E[1]) <= 2


def test_a_chain_by_hand() -> None:
    # Two of three tokens want expert 0. Token 0 would lose 1 at expert 1, whose own token 2 loses 1 more at expert 2: 2 in
    # all. Token 1 would lose 3 going there directly. So token 0 moves, and pushes token 2 on.
    scores_TE = torch.tensor([[9.0, 8.0, 0.0], [9.0, 0.0, 6.0], [0.0, 7.0, 6.0]])
    assert assign_balanced(scores_TE).tolist() == [1, 0, 2]


def test_the_experts_with_one_token_more_are_the_best_ones() -> None:
    # Five tokens, two experts: 3 + 2. All prefer expert 1 (by 1), so it takes three; token 4 would lose most.
    scores_TE = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 9.0]])
    expert_T = assign_balanced(scores_TE)
    assert torch.bincount(expert_T).tolist() == [2, 3]
    assert expert_T[4] == 1


@pytest.mark.parametrize(("T", "E"), [(6, 3), (6, 4), (5, 2), (3, 5), (7, 3)])
def test_against_every_balanced_assignment(T: int, E: int) -> None:
    for seed in range(5):
        scores_TE = torch.randint(-4, 5, (T, E), generator=torch.Generator().manual_seed(seed)).double()
        values = []
        for choice in itertools.product(range(E), repeat=T):
            counts = [choice.count(e) for e in range(E)]
            if max(counts) - min(counts) <= 1:
                values.append(value(scores_TE, torch.tensor(choice)))
        assert value(scores_TE, assign_balanced(scores_TE)) == max(values) == best(scores_TE)


@pytest.mark.parametrize(("T", "E"), [(24, 4), (60, 5), (64, 64)])
def test_an_auction_comes_within_its_tolerance(T: int, E: int) -> None:
    scores_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(T))
    optimum = value(scores_TE, assign_balanced(scores_TE))
    loops = value(scores_TE, auction(scores_TE, epsilon=1e-3))
    assert optimum - T * 1e-3 <= loops <= optimum + 1e-9


def random_scores(kind: str, T: int, E: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    normal_TE = torch.randn(T, E, generator=rng)
    token = torch.arange(T)
    return {
        "normal": normal_TE,
        "bf16, full of ties": normal_TE.bfloat16(),
        "one expert dominates": normal_TE + 1e6 * (torch.arange(E) == 3),
        "a gate on skewed vectors": (torch.randn(T, 8, generator=rng) + 2) @ torch.randn(8, E, generator=rng),
        "integer ties": torch.randint(3, (T, E), generator=rng).double(),
        "constant": torch.full((T, E), 0.1),
        "repeated tokens": normal_TE[(token**2) % 7],
        "tight clusters": 10 * normal_TE[token % 5] + 0.01 * torch.randn(T, E, generator=rng),
        "geometric in tokens": 2.0 ** torch.linspace(-60, 60, T)[:, None] * torch.rand(T, E, generator=rng),
        "geometric in experts": 2.0 ** torch.linspace(-60, 60, E) * normal_TE,
        "geometric": (10 * normal_TE).exp(),
        "a product": torch.rand(T, 1, generator=rng) * torch.rand(1, E, generator=rng),
        "heavy tails": normal_TE / torch.randn(T, E, generator=rng),
        "one column": torch.where(torch.arange(E) == 0, token[:, None].double(), 0.0),
        "on a line": -(token[:, None] * (E / T) - torch.arange(E)).abs(),
        "huge": 1e37 * normal_TE,
        "tiny": 1e-300 * normal_TE.double(),
    }[kind]


KINDS = """normal;bf16, full of ties;one expert dominates;a gate on skewed vectors;integer ties;constant;repeated tokens
tight clusters;geometric in tokens;geometric in experts;geometric;a product;heavy tails;one column;on a line;huge;tiny"""


@pytest.mark.parametrize(("T", "E"), [(240, 8), (250, 16)])
@pytest.mark.parametrize("kind", KINDS.replace("\n", ";").split(";"))
def test_as_good_as_scipy(kind: str, T: int, E: int) -> None:
    check(random_scores(kind, T, E))


def test_the_largest_doubles() -> None:
    # Their differences overflow; SciPy gets them divided by a power of two.
    scores_TE = random_scores("normal", 96, 8).double().sign() * 1.5e308
    assert value(scores_TE * 2.0**-64, assign_balanced(scores_TE)) == best(scores_TE * 2.0**-64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_count_as_the_smallest(bad: float) -> None:
    clean_TE = random_scores("normal", 96, 8)
    bad_TE = torch.rand(96, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    smallest = clean_TE[~bad_TE].min()
    check(clean_TE.masked_fill(bad_TE, bad), torch.where(bad_TE, smallest, clean_TE))


def test_nothing_finite_is_still_balanced() -> None:
    expert_T = assign_balanced(torch.full((12, 4), float("nan")))
    assert torch.bincount(expert_T).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("T", "E"), [(0, 4), (1, 1), (5, 1), (1, 4), (4, 4)])
def test_small_shapes(T: int, E: int) -> None:
    scores_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    counts_E = torch.bincount(assign_balanced(scores_TE), minlength=E)
    assert counts_E.sum() == T
    assert counts_E.max() - counts_E.min() <= 1


def test_repeated_tokens_move_together() -> None:
    """A constant matrix needs one path per expert, not one per token."""
    assert solve(torch.zeros(4096, 16)).paths <= 16


def test_good_prices_leave_few_paths() -> None:
    for seed in range(3):
        x_TD = torch.randn(4096, 16, generator=torch.Generator().manual_seed(seed)) + 1
        gate_DE = torch.randn(16, 32, generator=torch.Generator().manual_seed(10 + seed))
        assert solve(x_TD @ gate_DE).paths < 3 * 32


def test_the_certificate_tells_a_worse_assignment() -> None:
    scores_TE = random_scores("normal", 240, 8)
    good = solve(scores_TE)
    for solution in (
        good,
        Solution(good.expert_T.roll(1), good.price_E, 0),
        Solution(good.expert_T, good.price_E * 0, 0),
    ):
        missing = value(scores_TE, good.expert_T) - value(scores_TE, solution.expert_T)
        assert duality_gap(scores_TE, solution) >= missing - 1e-9
    assert duality_gap(scores_TE, Solution(good.expert_T.roll(1), good.price_E, 0)) > 1


def test_the_same_twice_and_no_gradient() -> None:
    scores_TE = random_scores("integer ties", 240, 8).requires_grad_()
    assert torch.equal(assign_balanced(scores_TE), assign_balanced(scores_TE.detach().clone()))
    assert not solve(scores_TE).price_E.requires_grad


def test_compilers_see_one_operator() -> None:
    torch.library.opcheck(assign_balanced, (random_scores("normal", 24, 4),))


scores = st.integers(1, 6).flatmap(
    lambda E: st.integers(1, 24).flatmap(
        lambda T: st.lists(
            st.one_of(st.integers(-3, 3), st.floats(-1e6, 1e6), st.sampled_from([0.0, 1e-9, 1e5, -1e5])),
            min_size=T * E,
            max_size=T * E,
        ).map(lambda flat: torch.tensor(flat, dtype=torch.float64).view(T, E))
    )
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(scores_TE=scores)
def test_any_scores(scores_TE: Tensor) -> None:
    check(scores_TE)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scores_TE=scores, seed=st.integers(0, 9))
def test_offsets_of_tokens_change_nothing(scores_TE: Tensor, seed: int) -> None:
    """A token's own offset raises every assignment alike, so the best one stays the best."""
    offset_T1 = torch.randn(scores_TE.shape[0], 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved_T = assign_balanced(scores_TE + offset_T1)
    assert value(scores_TE, moved_T) == pytest.approx(best(scores_TE), abs=1e-6)
