"""Equal sizes are the paper's algorithm to the bit, no cluster exceeds its cap, and shards and order move nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from model import balanced_kmeans, capped_kmeans
from model.balanced_kmeans import equal_kmeans
from model.capped_kmeans import cap_of, within_cap
from model.kmeans import Clusters, lloyd
from model.nearest import assign
from model.reduction import Alone
from model.rq_kmeans import encode, fit
from model.seeding import seed_centroids
from schemas.config import TokenizeConfig
from schemas.errors import ContractViolation
from tests.model.shards import on_ranks
from tests.model.test_kmeans import KINDS, rows_of, true_distances

capped = partial(capped_kmeans.capped_kmeans, iterations=3)
equal = partial(equal_kmeans, iterations=3)


def algorithm_1(x: np.ndarray, seeds: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Written from the paper, one row at a time, on integers, whose sums are exact; rows are in the order of their ids."""
    n, k = len(x), len(seeds)
    centroids, labels = seeds.astype(np.float64), np.full(n, -1)
    for _ in range(iterations):
        before, free = labels.copy(), list(range(n))
        distances = true_distances(x, centroids.astype(np.float32))
        for cluster in range(k):
            w = n // k + (cluster < n % k)
            nearest = sorted(free, key=lambda row, c=cluster: (distances[row, c], row))[:w]
            labels[nearest] = cluster
            if nearest:
                centroids[cluster] = x[nearest].astype(np.float64).sum(0) / len(nearest)
            free = [row for row in free if row not in nearest]
        assert not free
        if (labels == before).all():
            break
    return centroids.astype(np.float32), labels


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 20), values=st.sampled_from([1, 3, 40]), seed=st.integers(0, 10**6))
@pytest.mark.parametrize("scores", [1 << 22, 100])
def test_equal_sizes_are_the_papers_algorithm(scores: int, n: int, k: int, values: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-values, values + 1, (n, 4), generator=generator).float()
    ids, order = torch.randperm(10 * n, generator=generator)[:n].sort().values, torch.randperm(n, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced_kmeans, "SCORES", scores)
        result = equal_kmeans(x[order], ids[order], k, salt=seed, iterations=5)
    centroids, labels = algorithm_1(x.numpy(), seed_centroids(x, ids, k, seed, Alone()).numpy(), 5)
    assert np.array_equal(result.labels_N.numpy(), labels[order.numpy()])
    assert np.array_equal(result.centroids_KD.numpy(), centroids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_screen_of_equal_sizes_decides_as_the_truth(kind: str) -> None:
    """One pass on rows for which float32 is too coarse, against a sort of all true distances."""
    x, seeds = rows_of(kind, 300, 7, 1), rows_of(kind, 12, 7, 2)
    labels = balanced_kmeans._deal(x, seeds, [25] * 12).numpy()
    distances, free = true_distances(x.numpy(), seeds.numpy()), np.ones(300, bool)
    for cluster in range(12):
        nearest = [row for row in distances[:, cluster].argsort(kind="stable") if free[row]][:25]
        assert set(nearest) == set((labels == cluster).nonzero()[0])
        free[nearest] = False


def test_equal_sizes_stop_when_nothing_changes() -> None:
    x = rows_of("normal", 60, 3, 0)
    done = equal_kmeans(x, torch.arange(60), 3, iterations=200)
    assert len(done.inertia) < 200
    more = equal_kmeans(x, torch.arange(60), 3, iterations=400)
    assert torch.equal(more.labels_N, done.labels_N)
    again = balanced_kmeans._deal(x, done.centroids_KD, [20] * 3)
    assert torch.equal(again, done.labels_N)


def test_equal_sizes_refuse_a_large_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced_kmeans, "MOST_ROWS", 9)
    assert len(equal(torch.zeros(9, 2), torch.arange(9), 2).labels_N) == 9
    with pytest.raises(ContractViolation, match="up to 9 items, and table item_embeddings has 10"):
        equal(torch.zeros(10, 2), torch.arange(10), 2)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 80), k=st.integers(1, 20), slack=st.sampled_from([0.0, 0.1, 1.0]), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["normal", "grid", "duplicates", "equal"])
def test_no_cluster_exceeds_its_cap(kind: str, n: int, k: int, slack: float, seed: int) -> None:
    x = torch.ones(n, 3) if kind == "equal" else rows_of(kind, n, 3, seed)
    result = capped(x, torch.randperm(n), k, slack=slack)
    cap = cap_of(n, k, slack)
    assert math.ceil(n / k) <= cap <= max((1 + slack) * n / k, math.ceil(n / k))
    assert int(result.counts_K.max()) <= cap
    assert torch.equal(torch.bincount(result.labels_N, minlength=k), result.counts_K)
    own = true_distances(x.numpy(), result.centroids_KD.numpy())[np.arange(n), result.labels_N.numpy()].sum()
    assert result.inertia[-1] == pytest.approx(own, rel=1e-9, abs=1e-9)


def one_by_one(distances: np.ndarray, ids: np.ndarray, cap: int, moves: int) -> np.ndarray:
    """The rule of `within_cap`, a row at a time: rounds of wishes, each cluster keeping the nearest."""
    n, k = distances.shape
    labels, room = np.full(n, -1), np.full(k, cap)
    for _ in range(moves):
        is_open = room > 0
        wishes = {row: min(np.flatnonzero(is_open), key=lambda c, r=row: (distances[r, c], c)) for row in range(n)}
        for cluster in np.flatnonzero(is_open):
            asking = [row for row in range(n) if labels[row] < 0 and wishes[row] == cluster]
            kept = sorted(asking, key=lambda r, c=cluster: (distances[r, c], ids[r]))[: room[cluster]]
            labels[kept] = cluster
            room[cluster] -= len(kept)
        if (labels >= 0).all():
            return labels
    places = np.repeat(np.arange(k), room)
    for row, place in zip(sorted(np.flatnonzero(labels < 0), key=lambda r: ids[r]), places, strict=False):
        labels[row] = place
    return labels


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 12), moves=st.integers(1, 5), seed=st.integers(0, 999))
@pytest.mark.parametrize("kind", ["normal", "grid", "duplicates"])
def test_rows_are_moved_by_the_stated_rule(kind: str, n: int, k: int, moves: int, seed: int) -> None:
    x, centroids = rows_of(kind, n, 3, seed), rows_of(kind, k, 3, seed + 1)
    ids, cap = torch.randperm(10 * n)[:n] - 5 * n, math.ceil(n / k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capped_kmeans, "MOVES", moves)
        labels = within_cap(x, ids, centroids, assign(x, centroids), cap, 7, Alone())
    expected = one_by_one(true_distances(x.numpy(), centroids.numpy()), ids.numpy(), cap, moves)
    assert np.array_equal(labels.numpy(), expected)


def test_where_lloyd_stays_within_the_cap_it_is_lloyd() -> None:
    x, ids = rows_of("normal", 300, 5, 0), torch.arange(300)
    plain, wide = lloyd(x, ids, 8, iterations=3), capped(x, ids, 8, slack=7.0)
    assert torch.equal(plain.labels_N, wide.labels_N)
    assert plain.inertia == wide.inertia
    tight = capped(x, ids, 8, slack=0.0)
    assert int(tight.counts_K.max()) == 38 < int(plain.counts_K.max())


def transported(x: np.ndarray, centroids: np.ndarray, cap: int) -> float:
    """Inertia of capped K-means whose labels are the optimal transport to the centroids, by the Hungarian method."""
    for _ in range(10):
        places = linear_sum_assignment(np.repeat(true_distances(x, centroids), cap, axis=1))[1] // cap
        centroids = np.stack([x[places == c].mean(0) for c in range(len(centroids))])
    return float(((x - centroids[places]) ** 2).sum())


def test_the_cap_costs_little_inertia() -> None:
    """Near plain Lloyd on ordinary rows; on mixtures whose largest part is many caps large, near optimal transport."""
    normal, ids = rows_of("normal", 1000, 12, 0) * torch.linspace(1, 0.1, 12), torch.arange(1000)
    plain, near = (way(normal, ids, 16, iterations=10).inertia[-1] for way in (lloyd, capped_kmeans.capped_kmeans))
    assert near < 1.01 * plain
    ratios = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        centres, shares = torch.randn(15, 6, generator=generator), 1 / torch.arange(1, 16).float()
        x = centres[torch.multinomial(shares, 400, True, generator=generator)] + 0.3 * torch.randn(
            400, 6, generator=generator
        )
        result = capped_kmeans.capped_kmeans(x, ids[:400], 10)
        best = transported(x.numpy(), lloyd(x, ids[:400], 10).centroids_KD.numpy(), cap_of(400, 10, 0.1))
        ratios.append(result.inertia[-1] / best)
        assert result.inertia[-1] < 0.9 * equal_kmeans(x, ids[:400], 10).inertia[-1]
    assert np.mean(ratios) < 1.15


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 12), seed=st.integers(0, 999))
@pytest.mark.parametrize("kind", ["normal", "far", "tiny", "huge"])
def test_priced_labels_weigh_distance_and_price(kind: str, n: int, k: int, seed: int) -> None:
    x, centroids = rows_of(kind, n, 5, seed), rows_of(kind, k, 5, seed + 1)
    size = float(x.double().square().mean())
    price = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    labels = capped_kmeans.priced_labels(x, centroids, price, chunk=7)
    cost = true_distances(x.numpy(), centroids.numpy()) + price.numpy()
    chosen = cost[np.arange(n), labels.numpy()]
    assert (chosen <= cost.min(1) + 1e-6 * (size + cost.min(1))).all()
    free = torch.full_like(price, 3.0)
    assert torch.equal(capped_kmeans.priced_labels(x, centroids, free, chunk=7), assign(x, centroids))


def test_a_price_falls_when_fewer_want_it_and_never_below_zero() -> None:
    prices = capped_kmeans.Prices(3, 10.0, 1.0, torch.device("cpu"))
    seen = []
    for wishes in ([30, 10, 5], [20, 10, 5], [5, 10, 20], [20, 10, 20]):
        prices.move(torch.tensor(wishes))
        seen.append(prices.price_K.tolist())
    # Steps of the first: 0.1, 0.12, turned 0.06, turned 0.03. Of the third: 0.1, 0.12, turned 0.06, 0.072.
    expected = [[0.1, 0, 0], [0.22, 0, 0], [0.19, 0, 0.06], [0.22, 0, 0.132]]
    assert np.array(seen) == pytest.approx(np.array(expected))


Fitted = Callable[..., Clusters]


@pytest.mark.parametrize("way", [equal, capped])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "far", "huge"])
@settings(max_examples=2, deadline=None)
@given(n=st.integers(1, 100), k=st.integers(1, 24), seed=st.integers(0, 99), data=st.data())
def test_shards_and_order_move_no_bit(kind: str, way: Fitted, n: int, k: int, seed: int, data: st.DataObject) -> None:
    x = rows_of(kind, n, 7, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).choice(10**9, n, replace=False))
    alone = way(x, ids, k)
    for shards in (2, 4):
        order = torch.tensor(data.draw(st.permutations(range(n))))
        parts = order.tensor_split(sorted(data.draw(st.lists(st.integers(0, n), min_size=shards - 1, max_size=shards - 1))))
        results = on_ranks(shards, lambda r, parts=parts: way(x[parts[r.rank]], ids[parts[r.rank]], k, reducer=r))
        for part, result in zip(parts, results, strict=True):
            assert result.centroids_KD.numpy().tobytes() == alone.centroids_KD.numpy().tobytes()
            assert torch.equal(result.labels_N, alone.labels_N[part])
            assert torch.equal(result.counts_K, alone.counts_K)
            assert result.inertia == alone.inertia


def test_chunks_move_no_label() -> None:
    x, ids = rows_of("duplicates", 200, 5, 0), torch.arange(200)
    assert torch.equal(capped(x, ids, 16).labels_N, capped(x, ids, 16, chunk=57).labels_N)


def test_fewer_rows_than_codes_get_a_code_each() -> None:
    x = torch.ones(5, 3)
    for way in (equal, capped):
        result = way(x, torch.arange(5), 9)
        assert len(result.labels_N.unique()) == 5
        assert result.centroids_KD.isfinite().all()


@pytest.mark.parametrize("way", [equal, capped])
def test_no_rows_and_values_that_are_not_finite_are_refused(way: Fitted) -> None:
    with pytest.raises(ContractViolation, match="no rows"):
        way(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2)
    with pytest.raises(ContractViolation, match="not finite"):
        way(torch.full((3, 2), torch.nan), torch.arange(3), 2)


@pytest.mark.parametrize("balance", ["equal", "capped"])
def test_residuals_subtract_the_centroid_of_the_balanced_code(balance: str) -> None:
    x, ids = rows_of("normal", 400, 6, 0), torch.arange(400)
    options = TokenizeConfig(codes=16, iterations=3, balance=balance)  # type: ignore[arg-type]
    residual = x.clone()
    result = fit(residual, ids, options)
    expected = x.clone()
    for level, centroids in enumerate(result.codebook.centroids):
        codes = result.codes_NL[:, level].long()
        assert int(torch.bincount(codes).max()) <= (25 if balance == "equal" else 27)
        expected -= centroids[codes]
    assert torch.equal(residual, expected)
    assert torch.equal(fit(x.clone(), ids, options).codes_NL, result.codes_NL)
    nearest = encode(result.codebook, x)
    assert torch.equal(nearest[:, 0], assign(x, result.codebook.centroids[0]).int())  # a later item's code, by the formula
    assert not torch.equal(nearest, result.codes_NL)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenize.balance_tolerance must be at least 0"):
        TokenizeConfig(balance_tolerance=-0.1)
