"""Tables from token ids to buckets, made from the training text before the first step: greedy balance, clusters, dispersion.

The embeddings that clusters are made of come from the text alone: positive pointwise mutual information of neighbouring tokens,
``max(0, ln(n_ij n / (n_i n_j)))``, of what follows and of what precedes a token, reduced by a truncated SVD (Levy & Goldberg
2014). Everything runs on the CPU and draws from its own seeds, so that making a table disturbs no training run.

Legend: V vocabulary, N points, C clusters or buckets, D width of an embedding.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def balanced_table(counts_V: Tensor, buckets: int, seed: int = 0) -> Tensor:
    """int64 (V,): the most frequent ids first, each into the bucket that is lightest so far (ties: lowest id, lowest bucket).

    No bucket can be lighter than the heaviest one without its last id, so loads differ by less than the count of the most
    frequent id, and in practice by far less, for the many rare ids fill the gaps. ``seed`` above 0 shakes the order (counts
    times ``exp(N(0, 1))``), which gives another table, nearly as balanced: the hashes of one MultiHash must differ.
    """
    order_V = counts_V
    if seed:
        noise_V = torch.randn(counts_V.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        order_V = counts_V * noise_V.exp()
    table_V = torch.zeros(counts_V.shape, dtype=torch.int64)
    loads = [(0, bucket) for bucket in range(buckets)]  # a heap already
    counts = counts_V.tolist()
    for token in torch.sort(order_V, descending=True, stable=True).indices.tolist():
        load, bucket = loads[0]
        table_V[token] = bucket
        heapq.heapreplace(loads, (load + counts[token], bucket))
    return table_V


def token_embeddings(pairs_VV: Tensor, dim: int, seed: int = 0) -> Tensor:
    """fp32 (V, D'), rows of length 1, D' = min(dim, V); a token without neighbours gets zeros.

    Args:
        pairs_VV: sparse int64 COO, how often token j follows token i.
    """
    pairs_VV = pairs_VV.coalesce()
    before, after = pairs_VV.indices()
    count = pairs_VV.values().double()
    V = pairs_VV.shape[0]
    as_first_V = count.new_zeros(V).index_add(0, before, count)
    as_second_V = count.new_zeros(V).index_add(0, after, count)
    gain = (count * count.sum() / (as_first_V[before] * as_second_V[after])).log().clamp(min=0).float()
    context_V2 = torch.sparse_coo_tensor(
        torch.stack([torch.cat([before, after]), torch.cat([after, before + V])]),
        torch.cat([gain, gain]),
        (V, 2 * V),
        check_invariants=True,
    )
    kept = min(dim, V)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left_VD, strength_D, _ = torch.svd_lowrank(context_V2, q=min(kept + 8, V), niter=4)
    # The root of the singular values weighs words better than all or none of them (Levy, Goldberg & Dagan 2015).
    point_VD = left_VD[:, :kept] * strength_D[:kept].sqrt()
    met_V = (as_first_V + as_second_V) > 0
    return torch.where(met_V[:, None], torch.nn.functional.normalize(point_VD, dim=1), 0.0)


def kmeans(x_ND: Tensor, clusters: int, seed: int = 0, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from a k-means++ start: int64 (N,) labels and fp64 (C, D) centres.

    A cluster that loses its last point takes the point farthest from its centre. With fewer points than clusters the last
    clusters stay empty, their centres at infinity.
    """
    x_ND = x_ND.double()
    rng = torch.Generator().manual_seed(seed)
    N, D = x_ND.shape
    some = min(clusters, N)
    centre_CD = x_ND.new_full((clusters, D), float("inf"))
    gap_N = x_ND.new_ones(N)
    for c in range(some):
        # Where every point already is a centre (duplicates), any will do.
        start = int(torch.multinomial(gap_N if gap_N.sum() > 0 else torch.ones_like(gap_N), 1, generator=rng))
        centre_CD[c] = x_ND[start]
        new_gap_N = (x_ND - x_ND[start]).square().sum(1)
        gap_N = torch.minimum(gap_N, new_gap_N) if c else new_gap_N
    label_N = torch.full((N,), -1)
    for _ in range(rounds if N else 0):
        distance_NC = torch.cdist(x_ND, centre_CD[:some])
        new_N = distance_NC.argmin(dim=1)
        size_C = torch.bincount(new_N, minlength=some)
        for empty in torch.nonzero(size_C == 0).flatten().tolist():
            # Only from clusters that can spare one, or this would empty another.
            far_N = distance_NC.gather(1, new_N[:, None])[:, 0].masked_fill(size_C[new_N] < 2, -1.0)
            moved = int(far_N.argmax())
            size_C[new_N[moved]] -= 1
            size_C[empty] = 1
            new_N[moved] = empty
        if torch.equal(new_N, label_N):
            break
        label_N = new_N
        sums_CD = x_ND.new_zeros(some, D).index_add(0, label_N, x_ND)
        centre_CD[:some] = sums_CD / size_C[:, None].clamp(min=1)
    return label_N, centre_CD


def fill_clusters(x_ND: Tensor, centre_CD: Tensor, counts_N: Tensor) -> Tensor:
    """int64 (N,): clusters of nearly equal total count. The most frequent first, each to its nearest centre that is not full.

    A cluster is full at the mean load; the point that fills it may go over by its own count.
    """
    mean = float(counts_N.sum()) / len(centre_CD)
    nearest_NC = torch.cdist(x_ND.double(), centre_CD).nan_to_num(nan=float("inf")).argsort(dim=1, stable=True)
    label_N = torch.zeros(len(x_ND), dtype=torch.int64)
    load_C = [0.0] * len(centre_CD)
    counts = counts_N.tolist()
    for point in torch.sort(counts_N, descending=True, stable=True).indices.tolist():
        choices = nearest_NC[point].tolist()
        cluster = next((c for c in choices if load_C[c] < mean), choices[0])
        label_N[point] = cluster
        load_C[cluster] += counts[point]
    return label_N


def dispersed_table(label_N: Tensor, counts_N: Tensor, buckets: int) -> Tensor:
    """int64 (N,): the ids of every cluster spread evenly over all buckets, so that similar tokens part.

    The most frequent ids first, each to the bucket that holds fewest of its cluster, of those the lightest, then the lowest:
    the numbers of ids of one cluster in two buckets differ by at most one.
    """
    held: dict[int, list[int]] = {}
    load = [0] * buckets
    table_N = torch.zeros(len(label_N), dtype=torch.int64)
    labels, counts = label_N.tolist(), counts_N.tolist()
    for point in torch.sort(counts_N, descending=True, stable=True).indices.tolist():
        mine = held.setdefault(labels[point], [0] * buckets)
        bucket = min(range(buckets), key=lambda b: (mine[b], load[b], b))
        table_N[point] = bucket
        mine[bucket] += 1
        load[bucket] += counts[point]
    return table_N
