"""Tables from text: the greedy balance by hand, embeddings and k-means on planted classes, even and dispersed clusters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moesaic.plan.read import max_violation
from moesaic.routing.tables import balanced_table, dispersed_table, fill_clusters, kmeans, token_embeddings


def loads(table_V: Tensor, counts_V: Tensor, buckets: int) -> Tensor:
    return torch.zeros(buckets, dtype=torch.int64).index_add(0, table_V, counts_V)


def zipf(V: int) -> Tensor:
    return (1e6 / (torch.arange(V) + 1)).long()


def test_greedy_balance_by_hand() -> None:
    # Counts 7 5 4 4 2 1 into 3: id 0 -> b0 (7); id 1 -> b1 (5); id 2 -> b2 (4); id 3 -> b2 (8, lightest was 4);
    # id 4 -> b1 (7); id 5 -> b0 (8: b0 and b1 tie at 7, the lower wins).
    counts = torch.tensor([7, 5, 4, 4, 2, 1])
    table = balanced_table(counts, 3)
    assert table.tolist() == [0, 1, 2, 2, 1, 0]
    assert loads(table, counts, 3).tolist() == [8, 7, 8]
    # Order is by count, not by id (of the equal ones, ids 2 and 3, the lower goes first: here the other one).
    assert balanced_table(counts.flip(0), 3).tolist() == [0, 1, 2, 2, 1, 0]
    assert balanced_table(torch.tensor([1, 1]), 4).tolist() == [0, 1]
    assert balanced_table(torch.zeros(0, dtype=torch.int64), 2).tolist() == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zipf_is_balanced_as_far_as_its_most_frequent_id_allows(seed: int) -> None:
    counts = zipf(4000)
    for buckets in (4, 8):  # the first id alone is 1/8.9 of all: below 1/8
        violation = float(max_violation(loads(balanced_table(counts, buckets, seed), counts, buckets)))
        assert violation < 0.01
        random = torch.randint(buckets, (4000,), generator=torch.Generator().manual_seed(seed))
        assert float(max_violation(loads(random, counts, buckets))) > 0.15
    # With 32 experts no table can help: one id alone is 3.6 times the mean.
    heavy = loads(balanced_table(counts, 32), counts, 32)
    assert int(heavy.max()) == int(counts[0])


def test_shaken_tables_differ() -> None:
    counts = zipf(1000)
    first, second = balanced_table(counts, 8, 0), balanced_table(counts, 8, 1)
    # Chance that two ids meet in both tables is 1/64 if the tables are independent, 1/8 if they are relabelled copies.
    together = (first[:, None] == first) & (second[:, None] == second)
    share = (int(together.sum()) - 1000) / (1000 * 999)
    assert share < 2 / 64


def planted(classes: int, per_class: int, length: int) -> tuple[Tensor, Tensor]:
    """Pairs (V, V) of a text in which a token of class c is always followed by one of class c + 1; and each id's class."""
    V = classes * per_class
    rng = torch.Generator().manual_seed(0)
    class_V = torch.arange(V) % classes
    ids = torch.randint(per_class, (length,), generator=rng) * classes + torch.arange(length) % classes
    key, count = (ids[:-1] * V + ids[1:]).unique(return_counts=True)
    pairs = torch.sparse_coo_tensor(torch.stack([key // V, key % V]), count, (V, V), check_invariants=True)
    return pairs, class_V


def test_pmi_by_hand() -> None:
    # Pairs: 0->1 three times, 2->3 once, n = 4. PMI(0,1) = ln(3 * 4 / (3 * 3)) = ln 4/3; PMI(2,3) = ln(1 * 4 / (1 * 1)) = ln 4.
    # Contexts are disjoint, so every token has a direction of its own; token 4 never occurs.
    pairs = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 3]]), torch.tensor([3, 1]), (5, 5), check_invariants=True)
    point = token_embeddings(pairs, 5)
    gram = point @ point.T
    torch.testing.assert_close(gram, torch.diag(torch.tensor([1.0, 1, 1, 1, 0])), atol=1e-5, rtol=0)


def test_embeddings_are_the_dense_formula() -> None:
    """Cosines of all pairs of rows against PMI written out and a full SVD (all dimensions kept, signs cannot matter)."""
    counts_VV = torch.randint(0, 4, (6, 6), generator=torch.Generator().manual_seed(1))
    n, first_V, second_V = int(counts_VV.sum()), counts_VV.sum(1), counts_VV.sum(0)
    gain = torch.zeros(6, 12, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            if counts_VV[i, j]:
                ratio = float(counts_VV[i, j]) * n / (float(first_V[i]) * float(second_V[j]))
                gain[i, j] = gain[j, 6 + i] = max(0.0, math.log(ratio))
    left, strength, _ = torch.linalg.svd(gain, full_matrices=False)
    point = torch.nn.functional.normalize(left * strength.sqrt(), dim=1)
    found = token_embeddings(counts_VV.to_sparse(), 6).double()
    torch.testing.assert_close(found @ found.T, point @ point.T, atol=1e-4, rtol=0)


def test_embeddings_and_kmeans_find_planted_classes() -> None:
    pairs, class_V = planted(classes=4, per_class=40, length=20_000)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    label_V, _ = kmeans(token_embeddings(pairs, 8), 4)
    assert torch.equal(torch.get_rng_state(), before)  # the run's random state is not touched
    crossed = torch.bincount(class_V * 4 + label_V, minlength=16).view(4, 4)
    assert sorted(crossed.flatten().tolist()) == [0] * 12 + [40] * 4  # one label per class


def test_kmeans_by_hand() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0]])
    label, centre = kmeans(x, 2)
    assert label[0] == label[1] != label[2] == label[3] == label[4]
    assert sorted(centre.flatten().tolist()) == [0.5, 11.0]


def test_kmeans_with_too_few_or_equal_points() -> None:
    label, centre = kmeans(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), 4)
    assert sorted(label.tolist()) == [0, 1]
    assert centre[2:].isinf().all()
    label, _ = kmeans(torch.zeros(5, 3), 3)
    assert sorted(torch.bincount(label, minlength=3).tolist()) == [1, 1, 3]  # empty clusters take a point
    assert kmeans(torch.zeros(0, 3), 2)[0].tolist() == []


def test_even_clusters_by_hand() -> None:
    # Mean load 10 / 2 = 5. By frequency: x=0 (4) to centre 0; x=1 (3) to centre 0, which holds 4 < 5 and is full at 7;
    # x=2 (2) is nearer to centre 0, which is full, so it goes to 1; x=9 (1) to centre 1.
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    centre = torch.tensor([[0.0], [10.0]], dtype=torch.float64)
    assert fill_clusters(x, centre, torch.tensor([4, 3, 2, 1])).tolist() == [0, 0, 1, 1]


def test_even_clusters_are_nearly_equal_where_nearest_ones_are_not() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 4, generator=rng) * torch.rand(2000, 1, generator=rng)
    counts = zipf(2000)[torch.randperm(2000, generator=rng)]
    label, centre = kmeans(x, 4)
    assert float(max_violation(loads(label, counts, 4))) > 0.1
    assert float(max_violation(loads(fill_clusters(x, centre, counts), counts, 4))) < 0.05


def test_dispersion_by_hand_and_in_general() -> None:
    # One cluster of 3 ids, one of 2, into 2 buckets; counts 9 8 3 | 7 1. In order of count: id 0 -> b0 (9); id 1 -> b1 (8);
    # id 3, of the other cluster, which has none anywhere, to the lighter b1 (15); id 2: b0 and b1 hold one of its cluster each,
    # b0 is lighter -> b0 (12); id 4 -> b0, which holds none of its cluster (13).
    label, counts = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([9, 8, 3, 7, 1])
    assert dispersed_table(label, counts, 2).tolist() == [0, 1, 0, 1, 0]
    rng = torch.Generator().manual_seed(0)
    label, counts = torch.randint(5, (600,), generator=rng), zipf(600)
    table = dispersed_table(label, counts, 8)
    held = torch.bincount(label * 8 + table, minlength=40).view(5, 8)
    assert int((held.amax(dim=1) - held.amin(dim=1)).max()) <= 1
