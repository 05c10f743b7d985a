"""Hash layers: tables by hand, previous and next tokens across documents, padding and decoding; balance on real words."""

from __future__ import annotations

import argparse
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.nn.mlp import apply_activation
from moesaic.plan import RoutingPlan
from moesaic.plan.read import max_violation
from moesaic.routing import TextStatistics, TokenContext, build_router
from moesaic.routing.hashing import Hash


def build(experts: int, k: int = 1, V: int = 6, seed: int = 0, **options: Any) -> Hash:
    torch.manual_seed(seed)
    router = build_router("hash", 4, experts, k, {"vocab_size": V, **options})
    assert isinstance(router, Hash)
    return router


def route(router: Hash, ids: list[int] | Tensor, **more: Any) -> RoutingPlan:
    ids_T = torch.as_tensor(ids)
    return router(torch.zeros(len(ids_T), 4), TokenContext(ids_T=ids_T, **more))  # type: ignore[no-any-return]


def experts_of(router: Hash, ids: list[int], **more: Any) -> list[int]:
    found: list[int] = route(router, ids, **more).expert_TK[:, 0].tolist()
    return found


def statistics(ids_N: Tensor, V: int) -> TextStatistics:
    def pairs() -> Tensor:
        key, count = (ids_N[:-1] * V + ids_N[1:]).unique(return_counts=True)
        return torch.sparse_coo_tensor(torch.stack([key // V, key % V]), count, (V, V), check_invariants=True)

    return TextStatistics(V, lambda: torch.bincount(ids_N, minlength=V), pairs)


def test_the_table_is_looked_up_with_weight_one() -> None:
    router = build(3)
    router.table_KV.copy_(torch.tensor([[2, 0, 1, 1, 0, 2, 0]]))
    plan = route(router, [0, 1, 5, 3])
    assert plan.expert_N.tolist() == [2, 0, 2, 1]
    assert plan.weight_N.tolist() == [1.0] * 4
    assert plan.gate is None
    assert router.table_KV.dtype == torch.int64


def test_previous_and_bigram_by_hand() -> None:
    #                id: 0  1  2  3  4  5  none
    table = torch.tensor([[2, 0, 1, 1, 0, 2, 0]])
    shift = torch.tensor([[0, 1, 2, 0, 1, 2, 1]])
    previous, bigram = build(3, kind="previous"), build(3, kind="bigram")
    previous.table_KV.copy_(table)
    bigram.table_KV.copy_(table)
    assert bigram.shift_KV is not None
    bigram.shift_KV.copy_(shift)
    ids = [4, 0, 5, 3]
    assert experts_of(previous, ids) == [0, 0, 2, 2]  # of: none, 4, 0, 5
    assert experts_of(bigram, ids) == [1, 0, 2, 0]  # 0 + 1, 2 + 1, 2 + 0, 1 + 2; modulo 3
    # Two rows of two; then one row in which the third token begins a document.
    assert experts_of(previous, ids, num_sequences=2) == [0, 0, 0, 2]
    assert experts_of(previous, ids, position_T=torch.tensor([0, 1, 0, 1])) == [0, 0, 0, 2]


def test_next_by_hand() -> None:
    router = build(3, kind="future")
    router.table_KV.copy_(torch.tensor([[2, 0, 1, 1, 0, 2, 0]]))
    ids = [4, 0, 5, 3]
    assert experts_of(router, ids) == [2, 2, 1, 0]  # of: 0, 5, 3, none
    assert experts_of(router, ids, num_sequences=2) == [2, 0, 1, 0]
    assert experts_of(router, ids, position_T=torch.tensor([0, 1, 0, 1])) == [2, 0, 1, 0]
    valid = torch.tensor([True, True, True, False])
    assert experts_of(router, ids, valid_T=valid) == [2, 2, 0, 3]  # padding comes next: none
    assert not router.facts.causal


def test_previous_steps_over_padding_wherever_it_is() -> None:
    router = build(5, V=50, kind="previous")
    ids, gap = [7, 8, 9, 10], -100
    clean = experts_of(router, ids)
    for padded, position in [
        ([gap, gap, 7, 8, 9, 10], [0, 0, 0, 1, 2, 3]),
        ([7, gap, 8, gap, 9, 10], [0, 1, 1, 2, 2, 3]),
        ([7, 8, 9, 10, gap], [0, 1, 2, 3, 4]),
    ]:
        valid = torch.tensor(padded) != gap
        found = torch.tensor(experts_of(router, padded, valid_T=valid, position_T=torch.tensor(position)))
        assert found[valid].tolist() == clean
        assert found[~valid].tolist() == [5] * (len(padded) - 4)


def test_previous_is_remembered_across_decoding_of_a_padded_batch() -> None:
    router = build(5, V=50, kind="bigram")
    texts = [[7, 8, 9, 10, 11], [20, 21, 22]]
    alone = [experts_of(router, text) for text in texts]
    state: dict[str, Tensor] = {}
    # Left padding by two; row 1 ends after its third token and is fed padding.
    columns = [([7, 8, 9, 0, 0, 20], [1, 1, 1, 0, 0, 1], [0, 1, 2, 0, 0, 0]), ([10, 21], [1, 1], [3, 1])]
    columns += [([11, 22], [1, 1], [4, 2]), ([12, 0], [1, 0], [5, 3])]
    found: list[list[int]] = [[], []]
    for ids, valid, position in columns:
        valid_T = torch.tensor(valid, dtype=torch.bool)
        experts = torch.tensor(
            experts_of(router, ids, valid_T=valid_T, position_T=torch.tensor(position), num_sequences=2, state=state)
        )
        for row, part in enumerate(experts.view(2, -1)):
            found[row] += part[valid_T.view(2, -1)[row]].tolist()
    assert found[0][:5] == alone[0]
    assert found[1] == alone[1]


def test_a_bigram_hash_is_as_good_as_random() -> None:
    """Pairs spread evenly, and both members matter."""
    V, E = 300, 8
    router = build(E, V=V, kind="bigram")
    ids = torch.randint(V, (40_000,), generator=torch.Generator().manual_seed(1))
    counts_E = route(router, ids).counts_E
    # Tables of 300 random entries have bucket counts 37.5 +- 5.7 each; their convolution modulo 8 is far flatter.
    assert float(max_violation(counts_E)) < 0.1
    experts = [experts_of(router, [a, b])[1] for a in range(12) for b in range(12)]
    by_previous = [set(experts[12 * a : 12 * a + 12]) for a in range(12)]
    by_current = [set(experts[b::12]) for b in range(12)]
    assert all(len(found) > 2 for found in by_previous + by_current)


def test_layers_and_segments_draw_different_tables() -> None:
    torch.manual_seed(0)
    options = {"vocab_size": 200}
    a, b = (build_router("hash", 4, 8, 2, options) for _ in range(2))
    assert isinstance(a, Hash)
    assert isinstance(b, Hash)
    for first, second in ((a.table_KV[0], b.table_KV[0]), (a.table_KV[0], a.table_KV[1])):
        # Two independent tables over 4 agree on a quarter of 201 ids, standard error 6.1.
        assert int((first == second).sum()) == pytest.approx(201 / 4, abs=25)
    assert a.state_dict().keys() == {"table_KV"}


def test_multihash_is_one_network_cut_in_parts_with_a_hash_each() -> None:
    """E = 6, k = 2: each half of the hidden units is one of 3, chosen by its own table; the dense network is written out."""
    torch.manual_seed(0)
    layer = MoE(8, 5, 6, 2, "hash", {"vocab_size": 20}, gated=False).double()
    router, experts = layer.router, layer.experts
    assert isinstance(router, Hash)
    x_TD, ids_T = torch.randn(11, 8, dtype=torch.float64), torch.randint(20, (11,))
    y_TD, plan = layer(x_TD, TokenContext(ids_T=ids_T))
    for t in range(11):
        parts = [int(router.table_KV[0, ids_T[t]]), 3 + int(router.table_KV[1, ids_T[t]])]
        w_in = torch.cat([experts.w_in[e] for e in parts], dim=1)  # (D, 2H)
        w_out = torch.cat([experts.w_out[e] for e in parts], dim=0)  # (2H, D)
        expected = apply_activation(x_TD[t] @ w_in, "silu", gated=False) @ w_out
        torch.testing.assert_close(y_TD[t], expected, rtol=1e-10, atol=1e-12)
    assert (plan.expert_TK[:, 0] < 3).all()
    assert (plan.expert_TK[:, 1] >= 3).all()


@pytest.mark.parametrize("k", [1, 2])
def test_on_real_text_random_is_unbalanced_and_balanced_is_not(k: int) -> None:
    """Words of one module of the standard library, a few thousand of them."""
    words = inspect.getsource(argparse).split()
    vocabulary = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    ids = torch.tensor([vocabulary[word] for word in words])
    V = len(vocabulary)
    assert V > 1000
    violations: dict[str, float] = {}
    for kind in ("random", "balanced"):
        router = build(8, k, V, kind=kind)
        router.fit(statistics(ids, V))
        violations[kind] = float(max_violation(route(router, ids).counts_E))
    assert violations["random"] > 0.1
    assert violations["balanced"] < 0.01


def test_balanced_before_and_after_it_is_fitted() -> None:
    ids = torch.tensor([0] * 7 + [1] * 5 + [2] * 4 + [3] * 4 + [4] * 2 + [5])
    router, random = build(3, V=9, kind="balanced"), build(3, V=9)
    assert torch.equal(router.table_KV, random.table_KV)  # unfitted: the random table of the same seed
    router.fit(statistics(ids, 9))
    assert router.table_KV[0, :6].tolist() == [0, 1, 2, 2, 1, 0]  # worked out in test_tables
    assert torch.equal(router.table_KV[0, 6:], random.table_KV[0, 6:])  # ids that never occur, and "none", stay random
    random.fit(statistics(ids, 9))
    assert torch.equal(random.table_KV, build(3, V=9).table_KV)


def planted(V: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V // classes, (8000,), generator=torch.Generator().manual_seed(0)) * classes
    return ids + torch.arange(8000) % classes, torch.arange(V) % classes


def test_clusters_share_an_expert_and_dispersion_parts_them() -> None:
    ids, class_V = planted()
    text = statistics(ids, 40)
    tables = {}
    for kind in ("clustered", "dispersed"):
        router = build(4, V=40, kind=kind, embedding_dim=8)
        router.fit(text)
        crossed = torch.bincount(class_V * 4 + router.table_KV[0, :40], minlength=16).view(4, 4)
        tables[kind] = crossed
    assert sorted(tables["clustered"].flatten().tolist()) == [0] * 12 + [10] * 4
    assert set(tables["dispersed"].flatten().tolist()) == {2, 3}  # 10 ids of a class over 4 experts


def test_even_clusters_balance_the_load() -> None:
    ids, _ = planted()
    ids = torch.cat([ids, ids[ids % 4 == 0], ids[ids % 4 == 0]])  # one class three times as frequent
    load = {}
    for even in (False, True):
        router = build(4, V=40, kind="clustered", even=even, embedding_dim=8)
        router.fit(statistics(ids, 40))
        load[even] = float(max_violation(route(router, ids).counts_E))
    assert load[False] > 0.5
    assert load[True] < 0.2


def test_statistics_are_taken_once_for_all_layers_and_only_if_asked() -> None:
    ids, _ = planted()
    asked: list[str] = []
    plain = statistics(ids, 40)

    def counts() -> Tensor:
        asked.append("counts")
        return plain.counts_V()

    def pairs() -> Tensor:
        asked.append("pairs")
        return plain.pairs_VV()

    text = TextStatistics(40, counts, pairs)
    for kind in ("random", "bigram", "previous", "future"):
        build(4, V=40, kind=kind).fit(text)
    build_router("topk", 4, 4, 2).fit(text)
    assert asked == []
    layers = [build(4, V=40, seed=seed, kind="clustered", embedding_dim=8) for seed in range(3)]
    for layer in layers:
        layer.fit(text)
    assert asked == ["counts", "pairs"]
    assert all(torch.equal(layer.table_KV[0, :40], layers[0].table_KV[0, :40]) for layer in layers)


def test_refusals() -> None:
    for k, options, words in [
        (1, {"vocab_size": None}, "needs to know how many token ids there are"),
        (3, {}, "k=3 does not divide num_experts=4"),
        (1, {"kind": "blance"}, 'Did you mean "balanced"?'),
        (1, {"even": True}, 'even=True is for kind="clustered", not "random"'),
        (1, {"embedding_dim": 0}, "embedding_dim must be at least 1, not 0"),
    ]:
        with pytest.raises(ConfigError) as caught:
            build_router("hash", 8, 4, k, {"vocab_size": 9, **options})
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="text has a vocabulary of 40 and the hash router one of 9"):
        build(4, V=9, kind="balanced").fit(statistics(planted()[0], 40))
    with pytest.raises(ConfigError, match='Router "hash" needs ids_T'):
        build(4)(torch.zeros(3, 4))
