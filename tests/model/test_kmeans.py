"""Labels equal the float64 truth, and neither shards nor the order of rows move a bit of the outcome."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import nearest, seeding
from model.kmeans import Clusters, lloyd
from model.nearest import Guess, assign, distinct, label_distances, rows_nearer
from model.reduction import Alone
from model.seeding import fixed_point_scale, hash64, seed_centroids
from schemas.errors import ContractViolation
from tests.model.shards import on_ranks

KINDS = ("normal", "grid", "duplicates", "far", "tiny", "huge")


def rows_of(kind: str, n: int, width: int, seed: int) -> Tensor:
    """Float32 rows that are easy (normal) or made of ties (grid, duplicates) or hard for float32 (the others)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, width, generator=generator)
    if kind == "grid":
        return torch.randint(-2, 3, (n, width), generator=generator).float()
    if kind == "duplicates":
        return normal[torch.randint(0, max(1, n // 4), (n,), generator=generator)]
    return {"normal": normal, "far": normal + 3000, "tiny": normal * 1e-25, "huge": normal * 1e17}[kind]


def true_distances(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The truth, written in NumPy once more: float64 terms, added by halving."""
    terms = (x[:, None, :].astype(np.float64) - centroids[None].astype(np.float64)) ** 2
    while (width := terms.shape[2]) > 1:
        half = width // 2
        terms = np.concatenate([terms[..., :half] + terms[..., half : 2 * half], terms[..., 2 * half :]], axis=2)
    return terms[..., 0]


def true_labels(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return true_distances(x, centroids).argmin(1)  # the first of equals


def plain_lloyd(x: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """Textbook Lloyd in float64 for data on which no cluster empties."""
    for _ in range(iterations):
        labels = true_labels(x, centroids)
        sums, counts = np.zeros(centroids.shape), np.bincount(labels, minlength=len(centroids))
        np.add.at(sums, labels, x.astype(np.float64))
        assert counts.all()
        centroids = (sums / counts[:, None]).astype(np.float32)
    return centroids, true_labels(x, centroids)


def sharded(x: Tensor, ids: Tensor, k: int, shards: int, order: Tensor, **options: float) -> tuple[Clusters, Tensor]:
    """Lloyd on `shards` ranks that own the rows in `order`, cut unevenly; labels back in the rows' own order."""
    cuts = sorted(int(c) for c in torch.randint(0, len(x) + 1, (shards - 1,)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
    results = on_ranks(shards, lambda reducer: lloyd(x[parts[reducer.rank]], ids[parts[reducer.rank]], k, reducer=reducer))
    labels = torch.empty(len(x), dtype=torch.int64)
    for part, result in zip(parts, results, strict=True):
        labels[part] = result.labels_N
        assert torch.equal(result.centroids_KD, results[0].centroids_KD)
        assert result.inertia == results[0].inertia
    return results[0], labels


@pytest.mark.parametrize("tile", [(7, 5), (1024, 512)])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 120), k=st.integers(1, 40), width=st.integers(1, 33), seed=st.integers(0, 99))
def test_labels_are_the_float64_truth(tile: tuple[int, int], kind: str, n: int, k: int, width: int, seed: int) -> None:
    x = rows_of(kind, n, width, seed)
    centroids = torch.cat([x, rows_of(kind, 8, width, seed + 1)])[torch.randperm(n + 8)[:k]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nearest.TILE, "cpu", tile)
        labels = assign(x, centroids, chunk=17)
        guesses = [labels, torch.randint(0, len(centroids), (n,), generator=torch.Generator().manual_seed(seed))]
        guided = [assign(x, centroids, 17, Guess(guess, x.norm(dim=1))) for guess in guesses]
    assert np.array_equal(labels.numpy(), true_labels(x.numpy(), centroids.numpy()))
    assert all(torch.equal(again, labels) for again in guided)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(1, 20), seed=st.integers(0, 99))
def test_no_row_that_a_centroid_is_nearer_to_is_left_out(kind: str, n: int, k: int, seed: int) -> None:
    x = rows_of(kind, n + 1, 9, seed)
    centroids = torch.cat([x, rows_of(kind, 4, 9, seed + 1)])[torch.randperm(n + 5)[:k]]
    before = label_distances(x, x[-1:], torch.zeros(len(x), dtype=torch.int64))
    nearer = torch.from_numpy(true_distances(x.numpy(), centroids.numpy())).amin(1) < before
    found = torch.zeros(len(x), dtype=torch.bool)
    found[rows_nearer(x, centroids, before)] = True
    assert not (nearer & ~found).any()


@given(st.lists(st.tuples(*[st.sampled_from([-1.0, -0.0, 0.0, 1.0])] * 2), min_size=1, max_size=30))
def test_equal_rows_are_found(rows: list[tuple[float, float]]) -> None:
    first, place = distinct(torch.tensor(rows))
    expected = [rows.index(row) for row in rows]  # to Python and to distances -0.0 equals 0.0
    assert first[place].tolist() == expected
    assert first.tolist() == sorted(set(expected))


def test_a_label_depends_on_its_row_alone() -> None:
    """Centroids one float32 step apart: the screen cannot tell them apart, and its answers would move with the batch."""
    x = rows_of("normal", 2000, 24, 0)
    base = x[:50].clone()
    centroids = torch.cat([base, torch.nextafter(base, torch.tensor(torch.inf)), base])
    whole = assign(x, centroids)
    order = torch.randperm(len(x))
    assert torch.equal(assign(x[order], centroids, chunk=333), whole[order])
    assert torch.equal(torch.cat([assign(row[None], centroids) for row in x[:100]]), whole[:100])
    assert np.array_equal(whole.numpy(), true_labels(x.numpy(), centroids.numpy()))


def test_lower_precision_elsewhere_moves_no_label() -> None:
    x = rows_of("normal", 500, 16, 3)
    expected = assign(x, x[:60] * 0.9)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(assign(x, x[:60] * 0.9), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 150), k=st.integers(1, 30), seed=st.integers(0, 99), data=st.data())
def test_shards_and_order_move_no_bit(kind: str, n: int, k: int, seed: int, data: st.DataObject) -> None:
    x = rows_of(kind, n, 7, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).choice(10**9, n, replace=False))
    alone = lloyd(x, ids, k)
    for shards in (1, 2, 4):
        order = torch.tensor(data.draw(st.permutations(range(n))))
        result, labels = sharded(x, ids, k, shards, order)
        assert result.centroids_KD.numpy().tobytes() == alone.centroids_KD.numpy().tobytes()
        assert torch.equal(labels, alone.labels_N)
        assert result.inertia == alone.inertia
        assert torch.equal(result.counts_K, alone.counts_K)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12), rounds=st.integers(1, 6))
def test_agrees_with_textbook_lloyd_bit_for_bit(seed: int, k: int, rounds: int) -> None:
    """On a grid of integers textbook float64 sums are exact too, so nothing may differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-50, 51, (300, 5), generator=generator).float()
    ids = torch.arange(300)
    result = lloyd(x, ids, k, salt=seed, iterations=rounds, tolerance=-1.0)
    if len(result.inertia) <= rounds:  # nothing moved any more, so further rounds change nothing
        rounds = len(result.inertia)
    centroids, labels = plain_lloyd(x.numpy(), seed_centroids(x, ids, k, seed, Alone()).numpy(), rounds)
    assert np.array_equal(result.centroids_KD.numpy(), centroids)
    assert np.array_equal(result.labels_N.numpy(), labels)


@pytest.mark.parametrize("kind", KINDS)
def test_inertia_never_increases_and_is_the_labels_own(kind: str) -> None:
    x = rows_of(kind, 800, 9, 5)
    result = lloyd(x, torch.arange(800), 40, tolerance=0.0)
    slack = 1e-6 * result.inertia[0]  # centroids are rounded to float32
    assert all(later <= earlier + slack for earlier, later in zip(result.inertia, result.inertia[1:], strict=False))
    own = true_distances(x.numpy(), result.centroids_KD.numpy())[np.arange(800), result.labels_N.numpy()].sum()
    assert result.inertia[-1] == pytest.approx(own, rel=1e-9, abs=1e-9 * float((x.double() ** 2).sum()))
    assert torch.equal(assign(x, result.centroids_KD), result.labels_N)


@pytest.mark.parametrize("shards", [1, 3])
def test_empty_clusters_are_split_from_the_largest(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """A pool of four rows gives four seeds for twenty clusters; the rule for empty ones must find the other sixteen."""
    monkeypatch.setattr(seeding, "POOL_ROWS", 4)
    monkeypatch.setattr(seeding, "POOL_ROWS_A_SEED", 0)
    x, ids = rows_of("normal", 400, 6, 1), torch.arange(400) * 31
    result, _ = sharded(x, ids, 20, shards, torch.randperm(400))
    assert (result.counts_K > 0).all()
    assert result.inertia[-1] < result.inertia[0]
    assert torch.equal(result.centroids_KD, lloyd(x, ids, 20).centroids_KD)


def test_more_clusters_than_distinct_rows_leaves_the_rest_unused() -> None:
    distinct = rows_of("normal", 5, 4, 2)
    x = distinct.repeat(20, 1)
    result = lloyd(x, torch.arange(100), 32)
    assert int((result.counts_K > 0).sum()) == 5
    assert result.inertia[-1] <= 1e-12 * result.inertia[0]
    assert torch.equal(result.centroids_KD[result.labels_N], x)
    assert result.centroids_KD.isfinite().all()


def test_seeds_are_distinct_rows() -> None:
    x = rows_of("grid", 500, 3, 4)  # 125 distinct values
    seeds = seed_centroids(x, torch.arange(500), 100, 0, Alone())
    assert len(torch.unique(seeds, dim=0)) == 100
    assert {tuple(row) for row in seeds.tolist()} <= {tuple(row) for row in x.tolist()}


@given(total=st.integers(1, 2**40), largest=st.floats(1e-45, 3e38))
def test_no_sum_of_fixed_points_overflows(total: int, largest: float) -> None:
    scale = fixed_point_scale(total, largest)
    most = total * round(largest * scale)  # Python's integers do not overflow
    assert most < 2**62
    assert 4 * total * largest * scale >= 2**62 * 0.99  # and the grid is no coarser than it must be, but for powers of two


def test_extreme_values_sum_exactly() -> None:
    """All rows at the largest magnitude: the sum comes closest to the limit, and the mean is still the value."""
    x = torch.full((4096, 3), 3e37)
    result = lloyd(x, torch.arange(4096), 2)
    assert torch.equal(result.centroids_KD[0], x[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_on_every_rank(bad: float) -> None:
    x = torch.zeros(10, 2)
    x[7, 1] = bad
    refused = []

    def program(reducer) -> None:
        rows = slice(reducer.rank * 5, reducer.rank * 5 + 5)
        with pytest.raises(ContractViolation, match="not finite"):
            lloyd(x[rows], torch.arange(10)[rows], 2, reducer=reducer)
        refused.append(reducer.rank)

    on_ranks(2, program)
    assert sorted(refused) == [0, 1]


def test_no_rows_are_refused() -> None:
    with pytest.raises(ContractViolation, match="no rows"):
        lloyd(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2)


def test_hashes_spread_and_depend_on_the_salt() -> None:
    ids = np.arange(100_000)
    assert len(np.unique(hash64(ids, 1))) == len(ids)
    assert hash64(ids, 1).min() >= 0
    assert abs(np.corrcoef(hash64(ids, 1), hash64(ids, 2))[0, 1]) < 0.02
    assert abs(np.corrcoef(hash64(ids, 1), ids)[0, 1]) < 0.02
